"""`expertmesh serve`: a cluster on the user's Ray, or on a private one on this machine."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.config import ConfigError, ServeConfig
from deploy.job import serve
from deploy.local_ray import local_ray
from deploy.settings import load_config


def serve_command(path: Path | None, overrides: Sequence[str], *, print_only: bool) -> int:
    """Serve until interrupted; returns the exit code (see `deploy.job`)."""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if print_only:
        print(config.to_yaml(), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return serve(config)
    with local_ray(cpus_for(config)):
        return serve(config)


def cpus_for(config: ServeConfig) -> float:
    """Logical CPUs that a private Ray needs: one machine stands for all nodes."""
    return config.parallel.world_size * config.ray.cpus_per_rank
