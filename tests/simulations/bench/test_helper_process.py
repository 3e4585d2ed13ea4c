"""A helper answers, says why it cannot, and is gone when its context ends."""

import os
import signal
import time

import psutil
import pytest

from simulations.bench.helper_process import HelperError, HelperProcess


def work(pipe, step):
    """Adds `step` to numbers."""
    while True:
        match pipe.recv():
            case int(number):
                pipe.send(number + step)
            case "pid":
                pipe.send(os.getpid())
            case "fail":
                pipe.send(HelperError("cannot add"))
            case "sleep":
                time.sleep(60)


def test_answers_failures_and_its_end():
    with HelperProcess("adder", work, 2) as helper:
        helper.send(1)
        assert helper.receive() == 3
        helper.send("fail")
        with pytest.raises(HelperError, match=r"^cannot add$"):
            helper.receive()
        helper.send("pid")
        pid = helper.receive(60)
        os.kill(pid, signal.SIGINT)  # as Ctrl-C in the terminal does: the parent decides
        helper.send(5)
        assert helper.receive(60) == 7
        helper.send("sleep")
        with pytest.raises(HelperError, match=r"^adder did not answer within 0.1 s$"):
            helper.receive(0.1)
    assert not psutil.pid_exists(pid)


def test_one_that_dies_is_told_from_one_that_is_slow():
    with HelperProcess("adder", work, 2) as helper:
        helper.send("pid")
        os.kill(helper.receive(60), signal.SIGKILL)
        for _ in range(2):
            helper.send(1)
            with pytest.raises(HelperError, match=r"^adder died$"):
                helper.receive(60)
