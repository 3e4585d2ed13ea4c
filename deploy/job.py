"""The deploy job: `ray job submit --working-dir . -- python -m deploy.job --config FILE`.

Runs on the Ray cluster it is submitted to, prints the gRPC endpoint, and serves until the job is
stopped. The exit code is 0 after a stop, 2 for a configuration or checkpoint that cannot be
served, 3 when the Ray cluster is too small, and 1 when a running cluster fails.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import ray

from cluster.config import ConfigError, ServeConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from cluster.server.tokenizer import TokenizerError
from deploy.cluster import NotEnoughResourcesError, running_cluster, sigterm_as_interrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.job", description="Serve a model on the Ray cluster we run on."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = ServeConfig.from_yaml(options.config, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    return serve(config)


def serve(config: ServeConfig) -> int:
    """Serve on the connected Ray until interrupted; returns the process's exit code."""
    try:
        with sigterm_as_interrupt(), running_cluster(config) as cluster:
            print(f"serving {config.model_name} on {cluster.endpoint}", flush=True)
            cluster.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 0
    except (ConfigError, UnsupportedModelError, CheckpointError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    except NotEnoughResourcesError as error:
        print(error, file=sys.stderr)
        return 3
    except (RuntimeError, ray.exceptions.RayError) as error:
        print(f"the cluster failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
