"""`expertmesh serve`: a cluster on the user's Ray, or on a private one on this machine."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cluster import logs
from cluster.config import ServeConfig
from deploy.exit_code import exit_code_of
from deploy.job import serve
from deploy.local_ray import local_ray
from deploy.ray_connection import connect_to_ray
from deploy.settings import load_config, read_config

_FIX = "set RAY_ADDRESS to HOST:PORT of a Ray that runs (`ray start --head`), or unset it for a private one"


def serve_command(path: Path | None, overrides: Sequence[str], *, print_only: bool) -> int:
    """Serve until interrupted, or only print the configuration; returns the exit code."""

    def run() -> None:
        if print_only:
            print(read_config(path, overrides).to_yaml(), end="")
            return
        config = load_config(path, overrides)
        logs.configure(config.observability, "serve")
        if address := os.environ.get("RAY_ADDRESS"):
            connect_to_ray(address, _FIX, logging_level=logging.WARNING)
            serve(config)
            return
        with local_ray(cpus_for(config), show_logs=True):
            serve(config)

    return exit_code_of(run, interrupted=0)


def cpus_for(config: ServeConfig) -> float:
    """Logical CPUs that a private Ray needs: one machine stands for all nodes."""
    return config.parallel.world_size * config.ray.cpus_per_rank
