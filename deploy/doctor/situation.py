"""What is known of a Ray cluster before anything is deployed on it, and what a check says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import ServeConfig

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host of the Ray cluster: what Ray says, then what `probe.HostProbe.facts` found there."""

    address: str
    is_head: bool
    ray_cpus: float
    """Logical CPUs that Ray may give away there."""
    free_cpus: float
    """Of them, those that no job holds."""
    ray_gpus: float
    versions: Mapping[str, str]
    sources: str
    """Hash of our modules as a rank there would import them; "" when it could not."""
    cpu: str
    num_cpus: int
    """That a process there may run on."""
    memory_free: int
    """Bytes."""
    memfd_error: str
    open_files: int
    """How many files and sockets a process there may open."""
    model: Mapping[str, str]
    gpu_devices: int
    gpus_visible: int
    ray_auth: bool
    stop_wait_s: str
    """RAY_JOB_STOP_WAIT_TIME_S there, "" when unset."""
    clock_offset_s: float
    """How far its clock is ahead of the head's, and ..."""
    clock_error_s: float
    """... how far off that may be: half of the time that asking took."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One connection that was tried; error: "" when it was answered."""

    source: str
    target: str
    seconds: float
    error: str


@dataclass(frozen=True, kw_only=True)
class Situation:
    """hosts: those that answered. silent: address to reason, of those that did not. port_errors: of
    the head, by option."""

    config: ServeConfig
    hosts: Sequence[Host]
    silent: Mapping[str, str]
    links: Sequence[Link]
    port_errors: Mapping[str, str]
    driver_is_on_head: bool

    @property
    def head(self) -> Host | None:
        return next((host for host in self.hosts if host.is_head), None)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found; fix: what to do about it, "" when all is well."""

    check: str
    status: Status
    message: str
    fix: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, status="ok", message=message)


def warning(check: str, message: str, fix: str) -> Finding:
    return Finding(check=check, status="warning", message=message, fix=fix)


def problem(check: str, message: str, fix: str) -> Finding:
    return Finding(check=check, status="problem", message=message, fix=fix)
