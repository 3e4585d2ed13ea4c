"""`expertmesh rebalance`: what a better placement would bring, and moving the experts there.

The server moves experts by itself; this command asks for it and watches. Exit codes: 0 done or
nothing to do, 1 refused or abandoned, 2 options or a server that does not answer, 130 on Ctrl-C,
which ends the watching and not the moving.
"""

import math
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.server.client import Client, ClientError
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.failed_calls import TIMEOUT_S, report
from deploy.json_file import write_json
from deploy.rebalance_effect import Outcome, as_json, effect_table, totals
from deploy.server_options import Server

_PLAN_TIMEOUT_S = 120.0
_POLL_S = 0.25
_PATIENCE_S = 5.0
# How long a server may not answer, or answer that nothing is running and nothing has ended.
_LOST_S = 30.0


class WatchError(Exception):
    """The end of a rebalance could not be seen."""


def rebalance_command(
    server: Server,
    *,
    dry_run: bool,
    target: float | None,
    from_scratch: bool,
    json_file: Path | None,
) -> int:
    """Plan, show the effect, and unless `dry_run` follow the moving to its end."""
    try:
        if target is not None and not (math.isfinite(target) and target >= 1):
            raise ValueError(f"--target {target:g}: must be a number of at least 1, e.g. 1.02")
        with server.client(TIMEOUT_S) as calls:
            before = _idle(calls)
            answer = calls.rebalance(
                dry_run=dry_run,
                target=target,
                from_scratch=from_scratch,
                timeout_s=_PLAN_TIMEOUT_S,
            )
            return _follow(Console(), calls, before, answer, json_file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except ClientError as error:
        return report(server.endpoint, error)
    except WatchError as error:
        print(f"{server.endpoint}: {error}", file=sys.stderr)
        return 1


def _follow(
    console: Console,
    calls: Client,
    before: pb.RebalanceStats,
    answer: pb.RebalanceResponse,
    json_file: Path | None,
) -> int:
    if answer.layers:
        console.print(effect_table(answer))
    console.print(totals(answer), highlight=False, markup=False, soft_wrap=True)
    outcome = None
    if answer.started:
        try:
            outcome = Outcome.between(before, watch(console, calls, before), answer)
        except KeyboardInterrupt:
            print("stopped watching; the rebalance goes on, see `expertmesh top`", file=sys.stderr)
            return 130
        console.print(str(outcome), highlight=False, markup=False, soft_wrap=True)
    write_json(json_file, as_json(answer, outcome))
    return 0 if outcome is None or outcome.finished else 1


def _idle(calls: Client, patience_s: float = _PATIENCE_S) -> pb.RebalanceStats:
    """The counters while nothing is running, so that the next end to come is ours.

    A server that rebalances by itself plans for a moment now and then; what is still running after
    `patience_s` is left to the server to refuse.
    """
    deadline = time.monotonic() + patience_s
    while (stats := calls.balance().rebalances).running and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return stats


def watch(
    console: Console, calls: Client, before: pb.RebalanceStats, lost_s: float = _LOST_S
) -> pb.RebalanceStats:
    """Show what the server does until it has finished or abandoned one more than `before`.

    Returns the counters then. Raises WatchError if for `lost_s` the server does not answer, or is
    idle with nothing finished or abandoned.
    """
    told = ""
    deadline = time.monotonic() + lost_s
    with console.status("rebalancing ...") as status:
        while True:
            try:
                now = calls.balance().rebalances
            except ClientError as error:
                why = f"the server does not answer ({error})"
                doing = f"no answer, trying again: {error.code}"
            else:
                if now.finished + now.abandoned > before.finished + before.abandoned:
                    return now
                if now.running:
                    deadline = time.monotonic() + lost_s
                why = "the server says that no rebalance is running and that none has ended"
                doing = now.doing
            if time.monotonic() > deadline:
                raise WatchError(f"gave up watching after {lost_s:g} s: {why}")
            if doing and doing != told:
                told = doing
                status.update(Text(told))
                if not console.is_terminal:
                    console.print(told, highlight=False, markup=False, soft_wrap=True)
            time.sleep(_POLL_S)
