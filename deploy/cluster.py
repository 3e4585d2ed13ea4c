"""Start a cluster on the Ray we are connected to, use it, and always take it down again."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ServeConfig
from cluster.controller import Controller, check_resources
from cluster.front_end import Endpoints
from cluster.server.security import Credentials
from cluster.startup import Progress
from deploy.exit_code import interrupt_on_sigterm

STOP_MARGIN_S = 15.0
PROGRESS_S = 0.5
DETAIL_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that answers at `endpoint` ("host:port", gRPC) and, if configured, `http_url`."""

    endpoint: str
    http_url: str | None
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

    Raises NotEnoughResourcesError when the layout does not fit, and ConfigError when the files that the
    server needs cannot be used, before anything is started.
    """
    interrupt_on_sigterm()  # again: ray.init has put its own handler in place of ours
    Credentials.load(config.server)
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
        endpoints = _start(controller)
        yield RunningCluster(endpoints.grpc, endpoints.http, controller)
    finally:
        _stop(controller, config)


def _start(controller: Any) -> Endpoints:
    """Where the cluster answers; logs what the controller is at while we wait."""
    started = controller.start.remote()
    stage, told_at = "", 0.0
    while not ray.wait([started], timeout=PROGRESS_S)[0]:
        progress: Progress = _get(controller.progress.remote())
        if progress.stage != stage:
            logger.info("%s ...", progress.stage)
        elif time.monotonic() - told_at > DETAIL_S:
            logger.info("%s: %s", *progress)
        else:
            continue
        stage, told_at = progress.stage, time.monotonic()
    endpoints: Endpoints = _get(started)
    return endpoints


def _get(reference: Any, timeout_s: float | None = None) -> Any:
    """The result, or the remote exception itself instead of Ray's report of it."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _stop(controller: Any, config: ServeConfig) -> None:
    """Requests in flight may finish, until `drain_timeout_s` or a second Ctrl-C or SIGTERM."""
    timeout_s = config.server.drain_timeout_s + STOP_MARGIN_S
    stopped = controller.stop.remote()
    try:
        try:
            ray.get(stopped, timeout=timeout_s)
        except KeyboardInterrupt:
            logger.info("ending the requests that are left")
            controller.hurry.remote()
            ray.get(stopped, timeout=STOP_MARGIN_S)
    except ray.exceptions.GetTimeoutError:
        logger.warning("the cluster did not stop in time; killing it")
    except ray.exceptions.RayError as error:
        logger.warning("stopping the cluster: %s", error)
    finally:
        ray.kill(controller)
