"""What runs on every host that is looked at. It travels there by value, so that a host where
expertmesh is missing or old can be looked at too: nothing here imports anything of ours.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONNECT_TIMEOUT_S = 3.0
PACKAGES = ("torch", "numpy", "ray", "expertmesh")
SOURCES = ("cluster", "comms", "experts", "router")
GREETING = b"expertmesh"


class HostProbe:
    """Looks at the host it runs on; listens for the others and connects to them."""

    def facts(self, model: str) -> dict[str, Any]:
        """The fields of `deploy.doctor.situation.Host` that only the host itself knows."""
        soft_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {
            "versions": {"Python": platform.python_version(), **_installed()},
            "sources": _sources(),
            "cpu": _cpu(),
            "num_cpus": len(os.sched_getaffinity(0)),
            "memory_free": _memory_free(),
            "memfd_error": _memfd_error(),
            "open_files": soft_files,
            "model": _model(Path(model)),
            "gpu_devices": len(list(Path("/dev").glob("nvidia[0-9]*"))),
            "gpus_visible": _gpus_visible(),
            "ray_auth": _ray_auth(),
            "stop_wait_s": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", ""),
        }

    def now(self) -> float:
        """Seconds since 1970 by this host's clock."""
        return time.time()

    def listen(self, address: str) -> int:
        """Greet whoever connects to `address` at the port returned, until this process ends."""
        listener = socket.create_server((address, 0))

        def greet() -> None:
            while True:
                peer, _ = listener.accept()
                with peer, contextlib.suppress(OSError):
                    peer.sendall(GREETING)

        threading.Thread(target=greet, daemon=True).start()
        return int(listener.getsockname()[1])

    def knock(self, addresses: Sequence[tuple[str, int]]) -> list[tuple[float, str]]:
        """(seconds, error or "") for each; an answer counts only when it came through."""
        return [_knock(address) for address in addresses]

    def bind_error(self, address: str, port: int) -> str:
        """Why a server could not listen there; "" if it could."""
        try:
            socket.create_server((address, port)).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""


def _knock(address: tuple[str, int]) -> tuple[float, str]:
    start = time.perf_counter()
    try:
        with socket.create_connection(address, CONNECT_TIMEOUT_S) as peer:
            answer = peer.recv(len(GREETING), socket.MSG_WAITALL)
    except TimeoutError:
        return CONNECT_TIMEOUT_S, f"no answer within {CONNECT_TIMEOUT_S:g} s"
    except OSError as error:
        return time.perf_counter() - start, error.strerror or str(error)
    seconds = time.perf_counter() - start
    return seconds, "" if answer == GREETING else f"something else answered: {answer!r}"


def _installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _sources() -> str:
    """A hash of the modules that ranks run, as they would be imported here; "" when they cannot be."""
    digest = hashlib.sha256()
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return ""
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _cpu() -> str:
    """Its model, with a hash of what it can do: sums may depend on both."""
    name, flags = platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = " ".join(sorted(value.split()))
                break
    return f"{name} ({hashlib.sha256(flags.encode()).hexdigest()[:6]})"


def _memory_free() -> int:
    """Bytes: what the kernel could give, or what is left of the container's limit."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # without a limit the file says "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _memfd_error() -> str:
    """Ranks of a node share anonymous memory, which the others open through /proc."""
    try:
        fd = os.memfd_create("expertmesh-doctor")
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            other = os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDWR)
            mmap.mmap(other, mmap.PAGESIZE).close()
            os.close(other)
        finally:
            os.close(fd)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _model(directory: Path) -> dict[str, str]:
    """What identifies each file of a checkpoint; {"error": why} when it cannot be read."""
    try:
        files = sorted(f for f in directory.iterdir() if f.suffix in (".json", ".safetensors"))
        if not any(file.name == "config.json" for file in files):
            return {"error": "there is no config.json"}
        return {file.name: _identity(file) for file in files}
    except OSError as error:
        return {"error": f"{error.strerror}: {error.filename}"}


def _identity(file: Path) -> str:
    """Weights by size: reading them all would take as long as loading them."""
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            return f"{os.fstat(stream.fileno()).st_size} bytes"
        return hashlib.sha256(stream.read()).hexdigest()[:12]


def _gpus_visible() -> int:
    if not Path("/dev/nvidiactl").exists() or importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return int(torch.cuda.device_count())


def _ray_auth() -> bool:
    """Whether this Ray lets in only those with its token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())
