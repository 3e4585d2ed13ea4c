"""`expertmesh top` over real sockets: once, live in a terminal, and through the server's death."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

import numpy as np
import pytest

from deploy.server_options import Server
from deploy.top.command import top_command
from tests.deploy.fake_control import FakeControl, balance, serving
from tests.deploy.processes import EXPERTMESH, MARK, ROOT

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ALTERNATE_SCREEN_OFF = "\x1b[?1049l"


def test_once_prints_one_frame(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with serving(FakeControl()) as endpoint:
        assert top_command(Server(endpoint), 1.0, once=True) == 0
    output = capsys.readouterr().out
    assert f"mosaic on {endpoint}  ready  2 x 2 ranks, TP 2  epoch 7" in output
    assert "r3     1.00 1.00 1.00 1.00 1.00  3.00 0.50 8.25" in output
    assert all(len(line) <= 80 for line in output.splitlines())
    assert "\x1b" not in output


def test_without_a_terminal_it_does_as_once(capsys):
    with serving(FakeControl()) as endpoint:
        assert top_command(Server(endpoint), 1.0, once=False) == 0
    assert capsys.readouterr().out.count("mosaic on") == 1


def test_a_server_that_does_not_answer_is_told_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"
    assert top_command(Server(endpoint), 1.0, once=True) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{endpoint}: UNAVAILABLE")
    assert "--endpoint" in error


class Terminal:
    """`expertmesh top` in a pseudo-terminal of 80 x 24."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        self.resize(80, 24)
        self.process = subprocess.Popen(
            [EXPERTMESH, "top", *arguments],
            cwd=ROOT,
            env={**os.environ, **MARK, "TERM": "xterm-256color"} | {"COLUMNS": "", "LINES": ""},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_be_in_the_foreground,
        )
        self.slave = slave
        self.raw = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 65536):
                self.raw += data.decode(errors="replace")

    def resize(self, columns, lines):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys):
        os.write(self.master, keys)

    def wait_for(self, text, since=0, timeout_s=20):
        """Where the output goes on after `text`, which came after position `since`."""
        deadline = time.monotonic() + timeout_s
        while text not in (shown := ESCAPES.sub("", self.raw[since:])):
            assert time.monotonic() < deadline, f"no {text!r} in {shown[-4000:]}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {shown}"
            time.sleep(0.02)
        return len(self.raw)

    def wait(self):
        return self.process.wait(20)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(5)
        os.close(self.slave)
        self._reader.join(5)
        os.close(self.master)


def _be_in_the_foreground():
    """Of the terminal at stdin; Ctrl-C works even where the tests themselves ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal():
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            made = Terminal(*arguments)
            stack.callback(made.close)
            return made

        yield start


def test_live_view_follows_the_server_through_its_death_and_the_terminal_through_its_size(terminal):
    control = FakeControl()
    with serving(control) as endpoint:
        top = terminal("--endpoint", endpoint, "--interval", "0.1")
        seen = top.wait_for("epoch 7")
        control.balance = balance(np.ones((4, 5)), epoch=8)
        seen = top.wait_for("epoch 8", seen)
        top.resize(40, 24)
        seen = top.wait_for("q or Ctrl-C leav…", seen)
        top.resize(80, 24)
    seen = top.wait_for("lost ", seen)
    assert "retrying: UNAVAILABLE" in ESCAPES.sub("", top.raw)
    control.balance = balance(np.ones((4, 5)), epoch=9)
    with serving(control, int(endpoint.rpartition(":")[2])):
        top.wait_for("epoch 9", seen)
        before = termios.tcgetattr(top.slave)[3] & termios.ECHO
        top.press(b"q")
        assert top.wait() == 0
    after = termios.tcgetattr(top.slave)[3] & termios.ECHO
    assert (before, bool(after)) == (0, True)
    kept = top.raw.rpartition(ALTERNATE_SCREEN_OFF)[2]
    assert "epoch 9" in ESCAPES.sub("", kept)
    assert "lost" not in kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaving_by_signal_restores_the_terminal(terminal, number):
    with serving(FakeControl()) as endpoint:
        top = terminal("--endpoint", endpoint)
        top.wait_for("leaves")
        if number == signal.SIGINT:
            top.press(b"\x03")
        else:
            top.process.send_signal(number)
        assert top.wait() == 0
    assert ALTERNATE_SCREEN_OFF in top.raw
    assert termios.tcgetattr(top.slave)[3] & termios.ECHO
    assert "Traceback" not in top.raw


def test_ctrl_c_before_anything_was_shown(terminal):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and says nothing
        top = terminal("--endpoint", f"127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(20)
        connection, _ = silent.accept()
        top.press(b"\x03")
        assert top.wait() == 130
        connection.close()
    assert "Traceback" not in top.raw
