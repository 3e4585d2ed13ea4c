"""How every way a cluster can end becomes one message and one exit code.

0 done or stopped; 1 a running cluster failed; 2 a configuration or checkpoint that cannot be
served; 3 there is no Ray, or its cluster is too small.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

import ray

from cluster.config import ConfigError
from cluster.controller import NotEnoughResourcesError
from cluster.model.errors import CheckpointError, UnsupportedModelError
from cluster.server.client import ClientError
from cluster.server.tokenizer import TokenizerError
from deploy.ray_connection import NoRayError

UNUSABLE = (ConfigError, CheckpointError, UnsupportedModelError, TokenizerError)


def exit_code_of(action: Callable[[], None], *, interrupted: int) -> int:
    """Run `action` and return the exit code; `interrupted` is that of Ctrl-C and SIGTERM."""
    previous = signal.getsignal(signal.SIGTERM)
    interrupt_on_sigterm()
    try:
        action()
    except KeyboardInterrupt:
        print("stopped; nothing is left running", flush=True)
        return interrupted
    except UNUSABLE as error:
        print(error, file=sys.stderr)
        return 2
    except (NoRayError, NotEnoughResourcesError) as error:
        print(error, file=sys.stderr)
        return 3
    except (RuntimeError, ClientError, ray.exceptions.RayError) as error:
        print(f"the cluster failed: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def interrupt_on_sigterm() -> None:
    """From now on SIGTERM ends the program as Ctrl-C does, so that clean-up runs."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
