"""`expertmesh serve`: a cluster on the user's Ray, or on a private one on this machine."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster import logs
from cluster.config import ServeConfig
from deploy.exit_code import exit_code_of
from deploy.job import serve
from deploy.local_ray import local_ray
from deploy.settings import load_config, read_config


def serve_command(path: Path | None, overrides: Sequence[str], *, print_only: bool) -> int:
    """Serve until interrupted, or only print the configuration; returns the exit code."""

    def run() -> None:
        if print_only:
            print(read_config(path, overrides).to_yaml(), end="")
            return
        config = load_config(path, overrides)
        logs.configure(config.observability, "serve")
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING)
            serve(config)
            return
        with local_ray(cpus_for(config), show_logs=True):
            serve(config)

    return exit_code_of(run, interrupted=0)


def cpus_for(config: ServeConfig) -> float:
    """Logical CPUs that a private Ray needs: one machine stands for all nodes."""
    return config.parallel.world_size * config.ray.cpus_per_rank
