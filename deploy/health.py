"""`expertmesh health`: whether a server is ready for requests, for probes and scripts.

Exit codes: 0 ready; 1 not within the time given; 2 options that cannot be.
"""

import sys

from cluster.server.client import ClientError
from deploy.server_options import Server


def health_command(server: Server, timeout_s: float) -> int:
    """Health checks need no token, so that probes need none."""
    try:
        with server.client() as client:
            client.wait_ready(timeout_s)
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 1
    except ClientError as error:
        print(f"{server.endpoint}: {error}", file=sys.stderr)
        return 2
    print(f"{server.endpoint} is ready")
    return 0
