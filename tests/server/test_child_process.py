"""A child process answers, is told from one that does not, and never outlives its end."""

import gc
import json

import psutil
import pytest

from cluster.server.child_process import ChildError, ChildProcess, EndedError, TooSlowError

PROGRAM = """
import json, os, sys, time
from multiprocessing.connection import Connection

link = Connection(int(sys.argv[1]))
time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
link.send_bytes(b"{}" if sys.argv[2] == "fine" else b'{"error": "will not start"}')
while True:
    asked = json.loads(link.recv_bytes())
    if asked == "die":
        os._exit(1)
    time.sleep(10 if asked == "sleep" else 0)
    answer = {"error": "refuses"} if asked == "bad" else {"asked": asked}
    link.send_bytes(json.dumps(answer).encode())
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def started(program, *arguments, **options):
    return ChildProcess(program, *(arguments or ["fine"]), **{"start_timeout_s": 20} | options)


def ask(process, asked, time_limit_s=20):
    return process.ask(json.dumps(asked).encode(), time_limit_s)


def children_of(program):
    ours = psutil.Process().children()
    return [child for child in ours if str(program) in child.cmdline()]


def test_answers_in_turn_good_ones_and_bad_ones(program):
    process = started(program)
    assert ask(process, "x") == {"asked": "x"}
    with pytest.raises(ChildError, match=r"^refuses$"):
        ask(process, "bad")
    assert ask(process, "y") == {"asked": "y"}
    assert not process.ended
    process.close()
    assert process.ended
    assert children_of(program) == []


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("sleep", TooSlowError, "takes longer than 0.2 s"),
        ("die", EndedError, "has ended its process"),
        ("x" * 1000, EndedError, "has ended its process"),
    ],
)
def test_without_an_answer_it_is_ended(program, asked, error, message):
    process = started(program, max_answer_bytes=500)
    with pytest.raises(error, match=message):
        ask(process, asked, 0.2 if asked == "sleep" else 20)
    assert process.ended
    assert children_of(program) == []
    with pytest.raises(EndedError):
        ask(process, "x")


@pytest.mark.parametrize(
    ("arguments", "timeout_s", "error", "message"),
    [
        (["badly"], 20, ChildError, "^will not start$"),
        (["fine", 10], 0.2, TooSlowError, "takes longer"),
        ([], 20, EndedError, "has ended"),
    ],
)
def test_what_does_not_start_leaves_nothing(program, arguments, timeout_s, error, message):
    with pytest.raises(error, match=message):
        ChildProcess(program, *arguments, start_timeout_s=timeout_s)
    assert children_of(program) == []


def test_it_ends_with_its_owner(program):
    process = started(program)
    assert len(children_of(program)) == 1
    del process
    gc.collect()
    assert children_of(program) == []
