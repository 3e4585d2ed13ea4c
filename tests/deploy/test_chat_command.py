"""`expertmesh chat` and `generate --chat` against a front end with a stub engine, as a user would type."""

import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from cluster.server.chat.presets import BUILT_IN
from deploy.chat import chat_command
from deploy.generate import generate_command
from deploy.server_options import Server
from tests.deploy.processes import EXPERTMESH
from tests.server.serving import serve

PATIENCE_S = 30


@pytest.fixture(scope="module")
def serving():
    with serve("chat.template=plain") as running:
        yield running


def prompts(serving):
    """What the template has made of the chats that reached the engine since the last call."""
    added = serving.leaders[0].of_type("add")
    serving.leaders[0].received.clear()
    return [serving.tokenizer.decode(message["token_ids"]) for message in added]


def chat(serving, monkeypatch, capsys, *lines, preset=None, system=None):
    prompts(serving)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = chat_command(
        server=Server(endpoint=serving.address),
        preset=preset,
        system=system,
        max_tokens=4,
        temperature=0.0,
        seed=1,
    )
    shown = capsys.readouterr()
    return code, shown.out, shown.err, prompts(serving)


def answer(serving, prompt):
    """What the stub engine says to it, as the chat keeps it."""
    found = serving.client.generate(
        prompt, max_tokens=4, temperature=0.0, seed=1, stop=["\nUser:"]
    ).text.strip()
    prompts(serving)
    return found


class TestChat:
    def test_answers_become_part_of_the_conversation(self, serving, monkeypatch, capsys):
        code, out, err, sent = chat(serving, monkeypatch, capsys, "Hi", "", "Why?", system="Be")
        first = "Be\n\nUser: Hi\n\nAssistant:"
        said = answer(serving, first)
        assert sent == [first, f"{first} {said}\n\nUser: Why?\n\nAssistant:"]
        assert out.startswith(said)
        assert (code, err) == (0, "")

    def test_commands(self, serving, monkeypatch, capsys):
        lines = ("Hi", "/reset", "/system Be kind.", "/help", "/preset", "/nonsense", "Yo")
        code, out, _, sent = chat(serving, monkeypatch, capsys, *lines, "/system", "/reset", "No")
        assert sent[1:] == [
            "Be kind.\n\nUser: Yo\n\nAssistant:",
            "User: No\n\nAssistant:",
        ]
        assert out.count("Ctrl-D the chat.") == 2
        assert ", ".join(sorted(BUILT_IN)) in out
        assert code == 0

    def test_a_refusal_ends_one_answer_alone(self, serving, monkeypatch, capsys):
        """Presets are longer than the stub model; what failed leaves nothing behind."""
        lines = ("/preset translator", "Hi", "/system Be.", "Hi")
        code, _, err, sent = chat(serving, monkeypatch, capsys, *lines)
        assert "the prompt has" in err
        assert "/reset begins anew" in err
        assert sent == ["Be.\n\nUser: Hi\n\nAssistant:"]
        assert code == 0

    def test_no_template_ends_it(self, monkeypatch, capsys):
        with serve() as bare:
            code, _, err, _ = chat(bare, monkeypatch, capsys, "Hi", "Hi")
        assert code == 1
        assert err.count("no chat template: set chat.template") == 1

    def test_in_a_terminal(self):
        """Ctrl-C ends the answer and not the chat; what had come of it is kept. Ctrl-D leaves."""
        with serve("chat.template=plain", step_s=0.05) as slow:
            leader, follower = pty.openpty()
            command = [EXPERTMESH, "chat", "--endpoint", slow.address]
            process = subprocess.Popen(
                command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )  # fmt: skip
            os.close(follower)
            try:
                shown = read_until(leader, b"\n> ")
                assert f"tiny on {slow.address}. /help" in shown.decode()
                os.write(leader, b"Hi\n")
                slow.leaders[0].wait_for("add")
                time.sleep(0.3)  # some tokens of it
                os.write(leader, b"\x03")
                slow.leaders[0].wait_for("abort")
                read_until(leader, b"...\r\n\r\n> ")
                os.write(leader, b"Go on\n")
                slow.leaders[0].wait_for("add", 2)
                os.write(leader, b"\x03")
                read_until(leader, b"> ")
                os.write(leader, b"\x04")
                assert process.wait(PATIENCE_S) == 0
            finally:
                process.kill()
                process.wait()
                os.close(leader)
            second = slow.tokenizer.decode(slow.leaders[0].of_type("add")[1]["token_ids"])
        assert second.startswith("User: Hi\n\nAssistant: ")
        assert second.endswith("\n\nUser: Go on\n\nAssistant:")


def read_until(descriptor, end):
    shown = b""
    while not shown.endswith(end):
        shown += os.read(descriptor, 1024)
    return shown


class TestGenerate:
    @pytest.mark.parametrize(
        ("options", "sent"),
        [
            ({}, "Hi"),
            ({"chat": True}, "User: Hi\n\nAssistant:"),
            ({"system": "Be."}, "Be.\n\nUser: Hi\n\nAssistant:"),
            ({"system": "Be.", "preset": "math-tutor"}, "Be.\n\nUser: Hi\n\nAssistant:"),
        ],
    )
    def test_what_makes_a_chat_of_it(self, serving, options, sent):
        prompts(serving)
        server = Server(endpoint=serving.address)
        assert generate_command("Hi", server=server, max_tokens=2, **options) == 0
        assert prompts(serving) == [sent]
