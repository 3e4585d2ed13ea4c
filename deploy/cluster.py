"""Start a cluster on the Ray we are connected to, use it, and always take it down again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ServeConfig
from cluster.controller import Controller, check_resources
from deploy.exit_code import interrupt_on_sigterm

STOP_MARGIN_S = 15.0
PROGRESS_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that answers at `endpoint` ("host:port")."""

    endpoint: str
    controller: Any

    def wait(self) -> None:
        """Block until the cluster ends; raises what ended it."""
        _get(self.controller.wait.remote())

    def stats(self) -> list[dict[str, Any]]:
        """One map per rank, see `cluster.worker.Worker.stats`."""
        stats: list[dict[str, Any]] = _get(self.controller.stats.remote(), timeout_s=30)
        return stats


@contextmanager
def running_cluster(config: ServeConfig) -> Iterator[RunningCluster]:
    """Start the cluster beside this process's Ray node; stop it on the way out, however we leave.

    Raises NotEnoughResourcesError when the layout does not fit, before anything is started.
    """
    interrupt_on_sigterm()  # again: ray.init has put its own handler in place of ours
    check_resources(config)
    controller: Any = (
        ray.remote(Controller)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
        )
        .remote(config)
    )
    try:
        yield RunningCluster(_start(controller), controller)
    finally:
        _stop(controller, config)


def _start(controller: Any) -> str:
    """The endpoint; logs what the controller is at while we wait."""
    endpoint = controller.start.remote()
    told = ""
    while not ray.wait([endpoint], timeout=PROGRESS_S)[0]:
        doing = _get(controller.doing.remote())
        if doing != told:
            logger.info("%s ...", doing)
            told = doing
    return str(_get(endpoint))


def _get(reference: Any, timeout_s: float | None = None) -> Any:
    """The result, or the remote exception itself instead of Ray's report of it."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _stop(controller: Any, config: ServeConfig) -> None:
    timeout_s = config.server.drain_timeout_s + STOP_MARGIN_S
    try:
        ray.get(controller.stop.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        logger.warning("the cluster did not stop within %g s; killing it", timeout_s)
    except ray.exceptions.RayError as error:
        logger.warning("stopping the cluster: %s", error)
    ray.kill(controller)
