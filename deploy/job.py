"""The deploy job, as a module of a checkout or as a script of its own:

    ray job submit --working-dir . -- python -m deploy.job --config FILE
    ray submit CLUSTER.yaml deploy/job.py -- --config FILE

Runs on the Ray cluster it is submitted to, prints where it answers, and serves until the job is
stopped. The second way copies this file alone to the head, where expertmesh must be installed. Exit
codes are those of `deploy.exit_code`, and 2 where expertmesh is missing.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config import ServeConfig

_HOSTS_POLL_S = 1.0
_FIX = (
    "submit the job to a Ray cluster (`ray job submit`), or start one here with `ray start --head`"
)

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.job", description="Serve a model on the Ray cluster we run on."
    )
    parser.add_argument("--config", required=True, metavar="FILE", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    options = parser.parse_args(arguments)

    from cluster import logs
    from deploy.exit_code import exit_code_of
    from deploy.ray_connection import connect_to_ray
    from deploy.settings import load_config

    def run() -> None:
        config = load_config(options.config, options.overrides)
        logs.configure(config.observability, "job")
        connect_to_ray("auto", _FIX, log_to_driver=True, logging_level=logging.WARNING)
        serve(config)

    return exit_code_of(run, interrupted=0)


def serve(config: ServeConfig) -> None:
    """Serve on the connected Ray until interrupted; raises what ends the cluster before that."""
    from deploy.cluster import running_cluster

    wait_for_hosts(config)
    with running_cluster(config) as cluster:
        print(f"serving {config.model_name} on {cluster.endpoint}", flush=True)
        if cluster.http_url:
            print(f"over HTTP on {cluster.http_url}", flush=True)
        cluster.wait()


def wait_for_hosts(config: ServeConfig) -> None:
    """Until Ray has room for the layout, as after `ray up`, whose workers join after the head.

    Raises NotEnoughResourcesError when `ray.wait_for_hosts_s` is over.
    """
    from cluster.controller import NotEnoughResourcesError, check_resources

    deadline = time.monotonic() + config.ray.wait_for_hosts_s
    told = ""
    while True:
        try:
            return check_resources(config)
        except NotEnoughResourcesError as error:
            if time.monotonic() >= deadline:
                raise
            if str(error) != told:
                told = str(error)
                logger.info("waiting for hosts: %s", told)
        time.sleep(_HOSTS_POLL_S)


def _main_of_script() -> int:
    """Python puts a script's own folder first in its path, where deploy/cluster.py would be found as
    the package `cluster`; what we need is the folder above it, or what is installed."""
    here = Path(__file__).resolve().parent
    if (here / "cluster.py").is_file():
        sys.path[0] = str(here.parent)
    try:
        return main()
    except ModuleNotFoundError as error:
        if error.name not in ("cluster", "deploy", "ray"):
            raise
        print(
            f"{sys.executable} has no expertmesh ({error}): install it on every host, with the "
            "versions of constraints.txt",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main() if __package__ else _main_of_script())
