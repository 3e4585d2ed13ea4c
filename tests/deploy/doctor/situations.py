"""A cluster of three hosts on which all is well, to be broken in one place."""

from dataclasses import replace
from typing import Any

from cluster.config import ServeConfig
from deploy.doctor.situation import Host, Link, Situation
from deploy.settings import BUNDLED_MODELS

GIB = 1 << 30
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
HEALTHY_HOST = Host(
    address="10.0.0.1",
    is_head=False,
    ray_cpus=4,
    free_cpus=4,
    ray_gpus=0,
    versions={"Python": "3.11.7", "torch": "2.11.0", "ray": "2.60.0", "expertmesh": "0.1.0"},
    sources="0123456789ab",
    cpu="Some CPU (abcdef)",
    num_cpus=4,
    memory_free=64 * GIB,
    memfd_error="",
    open_files=65_536,
    model={"config.json": "0123456789ab", "model.safetensors": "123 bytes"},
    gpu_devices=0,
    gpus_visible=0,
    ray_auth=True,
    stop_wait_s="60",
    clock_offset_s=0.001,
    clock_error_s=0.001,
)


def healthy(*overrides: str) -> Situation:
    values = {
        "model": str(BUNDLED_MODELS["mosaic"]),
        "parallel": {"num_nodes": 2, "ranks_per_node": 2},
        "ray": {"placement_strategy": "STRICT_SPREAD"},
    }
    return Situation(
        config=ServeConfig.from_dict(values, overrides),
        hosts=[
            replace(HEALTHY_HOST, address=address, is_head=idx == 0)
            for idx, address in enumerate(ADDRESSES)
        ],
        silent={},
        links=[
            Link(source=source, target=target, seconds=0.0005, error="")
            for source in ADDRESSES
            for target in ADDRESSES
            if source != target
        ],
        port_errors={},
        driver_is_on_head=True,
    )


def with_host(situation: Situation, idx: int, **changes: Any) -> Situation:
    """The same, with facts of one host changed."""
    hosts = list(situation.hosts)
    hosts[idx] = replace(hosts[idx], **changes)
    return replace(situation, hosts=hosts)
