"""`expertmesh trace`: what every rank of a running cluster does in its next steps, as a file.

Exit codes: 0 written, 1 refused or too few steps in time, 2 options, a path that cannot be written or
a server that does not answer, 130 on Ctrl-C.
"""

import sys
from pathlib import Path

from rich.console import Console

from cluster.server.client import ClientError
from comms.trace_file import check_path
from deploy.failed_calls import report
from deploy.server_options import Server
from simulations.whole_file import write_whole

_MARGIN_S = 120.0
"""Beyond the wait for steps: to collect what was recorded and to send it."""


def trace_command(server: Server, steps: int, timeout_s: float, out: Path) -> int:
    """Record, write the file whole or not at all, and say where to look at it."""
    console = Console()
    try:
        check_path(out)  # rather now than after the wait
        waiting = console.status(f"waiting for {steps} steps ...")
        with server.client(timeout_s + _MARGIN_S) as calls, waiting:
            data = calls.trace_steps(steps, timeout_s)
        write_whole(out, data)
    except OSError as error:  # TraceError is one of them
        print(error, file=sys.stderr)
        return 2
    except ClientError as error:
        return report(server.endpoint, error)
    except KeyboardInterrupt:
        return 130
    print(f"{steps} steps of all ranks in {out}: open it at https://ui.perfetto.dev")
    return 0
