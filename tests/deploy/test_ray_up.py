"""`ray up`, `ray submit` and `ray down` with our launcher file, over SSH to hosts of a testbed.

The file is the one in deploy/cluster_launcher with this testbed's addresses and key, and without the
installation: what is installed here is installed on all hosts. `.ci/ray-up` runs it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.settings import DEPLOY
from simulations import netns
from simulations.testbed import Testbed
from tests.deploy.hosts import Hosts
from tests.deploy.processes import EXPERTMESH, ROOT

MISSING = [tool for tool in ("/usr/sbin/sshd", "ssh", "rsync") if shutil.which(tool) is None]
IMPOSSIBLE = (
    "takes minutes: .ci/ray-up runs it"
    if "EXPERTMESH_TEST_RAY_UP" not in os.environ
    else f"needs {', '.join(MISSING)}"
    if MISSING
    else Testbed.available()
)
pytestmark = [
    pytest.mark.skipif(IMPOSSIBLE is not None, reason=IMPOSSIBLE or ""),
    pytest.mark.timeout(600),
]

BIN = Path(sys.executable).parent
HEAD, WORKERS, LAPTOP = 0, (1, 2), 3
BOOTED = {"unshare", "sh", "sshd"}
SSHD = """
Port 22
ListenAddress {address}
HostKey {home}/ssh_host_key
AuthorizedKeysFile {home}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
CONFIG = """
model: mosaic
parallel: {num_nodes: 2, ranks_per_node: 1}
cache: {num_blocks: 64}
scheduler: {max_num_seqs: 8, max_num_batched_tokens: 128}
ray: {placement_strategy: STRICT_SPREAD, wait_for_hosts_s: 180}
"""


@dataclass(frozen=True)
class Site:
    """Hosts 0 to 2 with an SSH server each, and a user's machine that may enter them."""

    hosts: Hosts
    testbed: Testbed

    def launch(self, *arguments: str, timeout_s: float = 180) -> str:
        """What a `ray` command on the user's machine prints."""
        command = [str(BIN / "ray"), *arguments]
        done = self.hosts.run(LAPTOP, command, timeout_s, env=self.environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and Debian makes it at boot
    with Testbed(4, None) as testbed:
        hosts = Hosts(testbed, tmp_path)
        make_key(hosts.home(LAPTOP) / "key")
        for host in (HEAD, *WORKERS):
            home = hosts.home(host)
            make_key(home / "ssh_host_key")
            shutil.copy(hosts.home(LAPTOP) / "key.pub", home / "authorized_keys")
            seen = Path.home()  # as the host sees it
            (home / "sshd_config").write_text(SSHD.format(address=hosts.address(host), home=seen))
            (home / ".bashrc").write_text(f"export PATH={BIN}:$PATH PYTHONPATH={ROOT}\n")
            server = ["/usr/sbin/sshd", "-D", "-e", "-f", str(seen / "sshd_config")]
            hosts.boot(host, server, tmp_path / f"sshd{host}.log")
        (hosts.home(LAPTOP) / ".ray").mkdir()
        (hosts.home(LAPTOP) / ".ray" / "auth_token").write_text(os.urandom(32).hex())
        (hosts.tmp(LAPTOP) / "serve.yaml").write_text(CONFIG)
        (hosts.tmp(LAPTOP) / "launch.yaml").write_text(yaml.safe_dump(launcher_file(hosts)))
        yield Site(hosts, testbed)


def make_key(file: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)]
    subprocess.run(command, check=True, capture_output=True)


def launcher_file(hosts: Hosts) -> dict[str, Any]:
    """Ours, for these hosts."""
    text = (DEPLOY / "cluster_launcher" / "on_premises.yaml").read_text()
    launcher: dict[str, Any] = yaml.safe_load(text)
    launcher["provider"]["head_ip"] = hosts.address(HEAD)
    launcher["provider"]["worker_ips"] = [hosts.address(host) for host in WORKERS]
    launcher["auth"] = {"ssh_user": "root", "ssh_private_key": "~/key"}
    launcher["setup_commands"] = []
    del launcher["file_mounts"]["~/expertmesh"]
    launcher["file_mounts"]["~/cluster.yaml"] = "/tmp/serve.yaml"
    return launcher


def test_up_submit_down(site: Site) -> None:
    hosts = site.hosts
    site.launch("up", "-y", "--no-config-cache", "/tmp/launch.yaml")
    try:
        submit = [
            str(BIN / "ray"), "submit", "--no-config-cache", "/tmp/launch.yaml",
            "deploy/job.py", "--", "--config", "cluster.yaml",
        ]  # fmt: skip
        with hosts.running(LAPTOP, submit, **site.environment) as submitted:
            endpoint = submitted.wait_for(r"serving mosaic on (\S+)", 240)[1]
            ask = [EXPERTMESH, "generate", "The whale", "--max-tokens", "8", "--endpoint", endpoint]
            answer = hosts.run(HEAD, ask, env=site.environment)
            assert answer.returncode == 0, answer.stderr
            assert len(answer.stdout.strip()) > 0
    finally:
        down = site.launch("down", "-y", "/tmp/launch.yaml")
    assert "No nodes remaining" in down, down
    assert left_on(site, HEAD) == set()
    assert not {name for name in left_on(site, *WORKERS) if "Worker" in name}  # ranks


def left_on(site: Site, *hosts: int) -> set[str]:
    """Names of processes there that were not there after boot."""
    names = set()
    for pid in netns.pids([site.testbed.namespace(host) for host in hosts]):
        with contextlib.suppress(OSError):  # ended meanwhile
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names - BOOTED
