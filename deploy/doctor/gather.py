"""Asks every host of the Ray cluster we are connected to; nobody is waited for without a deadline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ServeConfig
from deploy.doctor import probe
from deploy.doctor.situation import Host, Link, Situation

ANSWER_TIMEOUT_S = 60.0
"""For a host to start a process and look around; importing torch there is most of it."""
_CLOCK_SAMPLES = 5


@dataclass(frozen=True)
class _Asked:
    """A host with the probe on it."""

    address: str
    node: Mapping[str, Any]
    probe: Any


def gather(config: ServeConfig) -> Situation:
    """Look at every host that is alive, and at the connections between them."""
    cloudpickle.register_pickle_by_value(probe)
    here = ray.get_runtime_context().get_node_id()
    asked = [_ask(node) for node in ray.nodes() if node["Alive"]]
    asked.sort(key=lambda host: (not _is_head(host.node), host.address))
    facts, silent = _answers(asked, [host.probe.facts.remote(config.model) for host in asked])
    answering = [host for host in asked if host.address in facts]
    return Situation(
        config=config,
        hosts=[_host(host, facts[host.address], answering) for host in answering],
        silent=silent,
        links=_links(answering),
        port_errors=_port_errors(config, answering),
        driver_is_on_head=any(
            _is_head(host.node) and host.node["NodeID"] == here for host in asked
        ),
    )


def _ask(node: Mapping[str, Any]) -> _Asked:
    placed = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(probe.HostProbe).options(num_cpus=0, scheduling_strategy=placed)
    return _Asked(str(node["NodeManagerAddress"]), node, actor.remote())


def _answers(
    asked: Sequence[_Asked], answers: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What came by address, and why something did not."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    came, missing = {}, {}
    for host, answer in zip(asked, answers, strict=True):
        try:
            came[host.address] = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            missing[host.address] = f"no answer within {ANSWER_TIMEOUT_S:g} s"
        except ray.exceptions.RayError as error:
            missing[host.address] = str(error).strip().splitlines()[-1]
    return came, missing


def _host(asked: _Asked, facts: Mapping[str, Any], all_asked: Sequence[_Asked]) -> Host:
    offset, error = _clock_offset(asked)
    head_offset, head_error = _clock_offset(all_asked[0])
    resources = asked.node["Resources"]
    free = ray._private.state.available_resources_per_node().get(asked.node["NodeID"], {})
    return Host(
        address=asked.address,
        is_head=_is_head(asked.node),
        ray_cpus=resources.get("CPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        ray_gpus=resources.get("GPU", 0.0),
        clock_offset_s=offset - head_offset,
        clock_error_s=error + head_error,
        **facts,
    )


def _clock_offset(asked: _Asked) -> tuple[float, float]:
    """How far a host's clock is ahead of ours, and how wrong that may be (Cristian's method)."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_SAMPLES):
        before = time.time()
        there = ray.get(asked.probe.now.remote(), timeout=ANSWER_TIMEOUT_S)
        after = time.time()
        half = (after - before) / 2
        best = min(best, (there - (before + half), half), key=lambda sample: sample[1])
    return best


def _links(asked: Sequence[_Asked]) -> list[Link]:
    """One connection each way between each two hosts, at the addresses that ranks would use."""
    if len(asked) < 2:
        return []
    ports, _ = _answers(asked, [host.probe.listen.remote(host.address) for host in asked])
    targets = {
        host.address: [(a, port) for a, port in ports.items() if a != host.address]
        for host in asked
    }
    answers, silent = _answers(
        asked, [host.probe.knock.remote(targets[host.address]) for host in asked]
    )
    found = [
        Link(source=source, target=target, seconds=seconds, error=error)
        for source, tried in answers.items()
        for (target, _), (seconds, error) in zip(targets[source], tried, strict=True)
    ]
    unheard = [
        Link(source=source, target=target.address, seconds=0.0, error=why)
        for source, why in silent.items()
        for target in asked
        if target.address != source
    ]
    return found + unheard


def _port_errors(config: ServeConfig, asked: Sequence[_Asked]) -> dict[str, str]:
    if not asked:
        return {}
    server, head = config.server, asked[0].probe
    wanted = {"server.port": server.port, "server.http_port": server.http_port}
    errors = {
        f"{option} = {port} on {server.host}": ray.get(
            head.bind_error.remote(server.host, port), timeout=ANSWER_TIMEOUT_S
        )
        for option, port in wanted.items()
        if port is not None
    }
    return {option: error for option, error in errors.items() if error}


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]
