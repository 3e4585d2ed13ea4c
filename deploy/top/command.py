"""`expertmesh top`: what a running cluster is doing, live.

Exit codes: 0 when the view was left (q, Ctrl-C or SIGTERM: leaving is how a viewer ends) or
printed once; 130 on Ctrl-C before anything could be shown; 2 when no server answers at first, so
that a wrong endpoint is told at once. A server that goes away later is waited for.
"""

import time
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.server.client import Client, ClientError
from deploy.failed_calls import report
from deploy.keys import pressed_keys
from deploy.leaving import Leaving
from deploy.server_options import Server
from deploy.top.frame import Frame, Snapshot

_TIMEOUT_S = 3.0  # of a call; longer than any pause of a server that is well


def top_command(server: Server, interval_s: float, *, once: bool) -> int:
    """Show the cluster until the user leaves; only once where output is no live terminal."""
    console = Console()
    try:
        calls = server.client(_TIMEOUT_S)
    except ClientError as error:
        return report(server.endpoint, error)
    with calls:
        try:
            snapshot = take_snapshot(calls)
        except ClientError as error:
            return report(server.endpoint, error)
        if once or not console.is_terminal or console.is_dumb_terminal:
            console.print(Frame(snapshot, Text(time.strftime("%H:%M:%S"), "dim")))
            return 0
        view = LiveView(calls, snapshot, interval_s)
        leaving = Leaving()
        with suppress(KeyboardInterrupt), leaving.handled():
            view.show(console, leaving)
    # The live view used the alternate screen; its last frame is worth keeping.
    console.print(view.frame)
    return 0


def take_snapshot(calls: Client) -> Snapshot:
    """Raises ClientError where any of the calls fails."""
    return Snapshot(calls.address, calls.server_info(), calls.balance(), calls.loads())


class LiveView:
    """Polls a server and keeps the latest frame; says so while the server is lost."""

    def __init__(self, calls: Client, snapshot: Snapshot, interval_s: float) -> None:
        self._calls = calls
        self._interval_s = interval_s
        self._snapshot = snapshot
        self._taken = time.monotonic()
        self._status = self._well()

    @property
    def frame(self) -> Frame:
        return Frame(self._snapshot, self._status)

    def show(self, console: Console, leaving: Leaving) -> None:
        """Until q or KeyboardInterrupt; follows the size of the terminal, and leaves it as it was."""
        live = Live(self.frame, console=console, screen=True)
        with pressed_keys() as key:
            try:
                with leaving.drawing():
                    live.start(refresh=True)
                while key(self._interval_s) not in ("q", "Q"):
                    self.poll()
                    with leaving.drawing():
                        live.update(self.frame, refresh=True)
            finally:
                with leaving.drawing():
                    live.stop()

    def poll(self) -> None:
        """Ask once; what was seen last stays when there is no answer."""
        try:
            self._snapshot = take_snapshot(self._calls)
        except ClientError as error:
            age_s = time.monotonic() - self._taken
            self._status = Text(f"lost {age_s:.0f} s ago, retrying: {error}", "bold reverse red")
            return
        self._taken = time.monotonic()
        self._status = self._well()

    def _well(self) -> Text:
        now = time.strftime("%H:%M:%S")
        return Text(f"{now}  every {self._interval_s:g} s; q or Ctrl-C leaves", "dim")
