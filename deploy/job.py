"""The deploy job: `ray job submit --working-dir . -- python -m deploy.job --config FILE`.

Runs on the Ray cluster it is submitted to, prints the gRPC endpoint, and serves until the job is
stopped. Exit codes are those of `deploy.exit_code`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.config import ServeConfig
from deploy.cluster import running_cluster
from deploy.exit_code import exit_code_of
from deploy.settings import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.job", description="Serve a model on the Ray cluster we run on."
    )
    parser.add_argument("--config", required=True, metavar="FILE", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    def run() -> None:
        config = load_config(options.config, options.overrides)
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
        serve(config)

    return exit_code_of(run, interrupted=0)


def serve(config: ServeConfig) -> None:
    """Serve on the connected Ray until interrupted; raises what ends the cluster before that."""
    with running_cluster(config) as cluster:
        print(f"serving {config.model_name} on {cluster.endpoint}", flush=True)
        cluster.wait()


if __name__ == "__main__":
    sys.exit(main())
