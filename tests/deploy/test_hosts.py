"""Hosts with networks, files and names of their own: Ray on three, the user on the fourth.

host 0 is the Ray head and has no CPUs for ranks, hosts 1 and 2 have one rank each, and host 3 submits
the job and calls it, over TLS with a token, as from a laptop.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.server.tokenizer import load_tokenizer
from comms.launch import RankPool
from deploy.settings import BUNDLED_MODELS
from simulations.testbed import Testbed
from tests.deploy.hosts import Hosts
from tests.deploy.processes import EXPERTMESH, ROOT

IMPOSSIBLE = Testbed.available()
pytestmark = pytest.mark.skipif(IMPOSSIBLE is not None, reason=IMPOSSIBLE or "")

RAY = str(Path(sys.executable).with_name("ray"))
HEAD, WORKERS, LAPTOP = 0, (1, 2), 3
MODEL = "/tmp/mosaic"  # of each host its own copy
CA = "/tmp/made/ca.pem"
PROMPT = "It is a truth universally acknowledged"
NUM_TOKENS = 24
MANY_TOKENS = 400  # seconds of work
CLIENT = """
import json, sys
from cluster.server.client import Client
address, options, prompt, num_tokens = json.loads(sys.argv[1])
with Client(address, **options) as client:
    answer = client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    print(json.dumps(list(answer.token_ids)))
"""

STREAM = """
import json, sys
from cluster.server.client import Client
address, options, prompt, num_tokens = json.loads(sys.argv[1])
tokens = []
with Client(address, **options) as client:
    answer = client.generate_stream(prompt, max_tokens=num_tokens, ignore_eos=True)
    for chunk in answer:
        if chunk.token_ids and not tokens:
            print("the first is here", flush=True)
        tokens += chunk.token_ids
print(f"all {len(tokens)} are here", flush=True)
"""


@dataclass(frozen=True)
class RayHosts:
    """Ray runs on HEAD and WORKERS; `environment` is what its users need."""

    hosts: Hosts
    testbed: Testbed
    environment: dict[str, str]
    token: str

    @property
    def jobs(self) -> str:
        return f"http://{self.hosts.address(HEAD)}:8265"


@pytest.fixture(scope="module")
def ray_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PYTHONPATH": str(ROOT),
    }
    with Testbed(4, None) as testbed, ExitStack() as stack:
        hosts = Hosts(testbed, tmp_path_factory.mktemp("hosts"))
        for host in (HEAD, *WORKERS):
            shutil.copytree(BUNDLED_MODELS["mosaic"], hosts.tmp(host) / Path(MODEL).name)
        token = write_server_files(hosts)
        head = hosts.address(HEAD)
        start = [RAY, "start", "--block", "--object-store-memory=80000000", "--disable-usage-stats"]
        dashboard = (f"--dashboard-host={head}", "--dashboard-port=8265")
        options = {
            HEAD: ["--head", "--port=6379", "--num-cpus=0", *dashboard],
            **{host: [f"--address={head}:6379", "--num-cpus=1"] for host in WORKERS},
        }
        for host, own in options.items():
            address = f"--node-ip-address={hosts.address(host)}"
            command = stack.enter_context(
                hosts.running(host, [*start, address, *own], **environment)
            )
            # One after the other: they share processors, and Ray gives up on itself after 30 s.
            command.wait_for("Ray runtime started", 120)
        yield RayHosts(hosts, testbed, environment, token)


def write_server_files(hosts: Hosts) -> str:
    """Certificates and tokens: the server's on the head, the client's on the laptop; the token."""
    command = [EXPERTMESH, "credentials", "/tmp/made", "--hosts", hosts.address(HEAD)]
    done = hosts.run(LAPTOP, command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    made = hosts.tmp(LAPTOP) / "made"
    for name in ("server.pem", "server.key", "token", "admin-token"):
        shutil.copy(made / name, hosts.tmp(HEAD) / name)
    return (made / "token").read_text().strip()


@pytest.fixture
def config_file(ray_hosts: RayHosts) -> Iterator[Path]:
    """A configuration in the working directory that is submitted."""
    file = ROOT / f".test_hosts_{os.getpid()}.yaml"
    file.write_text(f"""
model: {MODEL}
parallel: {{num_nodes: 2, ranks_per_node: 1}}
cache: {{num_blocks: 64}}
scheduler: {{max_num_seqs: 8, max_num_batched_tokens: 128}}
server:
  host: 0.0.0.0
  port: 50051
  token_file: /tmp/token
  admin_token_file: /tmp/admin-token
  tls_cert_file: /tmp/server.pem
  tls_key_file: /tmp/server.key
  drain_timeout_s: 50
ray: {{placement_strategy: STRICT_SPREAD, wait_for_hosts_s: 60}}
""")
    yield file
    file.unlink()


def submit(ray_hosts: RayHosts, name: str, *entrypoint: str) -> list[str]:
    return [
        RAY, "job", "submit", "--address", ray_hosts.jobs, "--submission-id", name,
        "--working-dir", ".", "--", *entrypoint,
    ]  # fmt: skip


def test_job_from_another_host_answers_it_with_the_tokens_of_one_host_and_drains(
    ray_hosts: RayHosts, config_file: Path
) -> None:
    hosts, environment = ray_hosts.hosts, ray_hosts.environment
    job = [sys.executable, "-m", "deploy.job", "--config", config_file.name]
    with hosts.running(LAPTOP, submit(ray_hosts, "serve", *job), **environment) as submitted:
        endpoint = submitted.wait_for(r"serving mosaic on (\S+)", 150)[1]
        assert endpoint == f"{hosts.address(HEAD)}:50051"
        with_token = {"ca_file": CA, "token": ray_hosts.token}
        before = ray_hosts.testbed.wire_bytes()
        assert json.loads(call(ray_hosts, endpoint, with_token)) == tokens_of_one_host()
        assert ray_hosts.testbed.wire_bytes() - before > 100_000  # experts are on both hosts
        assert "UNAUTHENTICATED" in call(ray_hosts, endpoint, {"ca_file": CA})
        assert "UNAVAILABLE" in call(ray_hosts, endpoint, {"token": ray_hosts.token})
        arguments = [endpoint, with_token, PROMPT, MANY_TOKENS]
        stream = [sys.executable, "-c", STREAM, json.dumps(arguments)]
        with hosts.running(LAPTOP, stream, **environment) as streamed:
            streamed.wait_for("the first is here", 30)
            stop = [RAY, "job", "stop", "--address", ray_hosts.jobs, "serve"]
            hosts.run(LAPTOP, stop, timeout_s=90, env={**os.environ, **environment})
            submitted.wait_for("stopped; nothing is left running", 60)
            streamed.wait_for(f"all {MANY_TOKENS} are here", 10)


def call(ray_hosts: RayHosts, endpoint: str, options: dict[str, str]) -> str:
    """What a client on the laptop prints: token ids, or how it fails."""
    arguments = json.dumps([endpoint, {**options, "timeout_s": 20}, PROMPT, NUM_TOKENS])
    done = ray_hosts.hosts.run(
        LAPTOP,
        [sys.executable, "-c", CLIENT, arguments],
        env={**os.environ, **ray_hosts.environment},
    )
    return done.stdout or done.stderr


def tokens_of_one_host() -> list[int]:
    model = str(BUNDLED_MODELS["mosaic"])
    config = ServeConfig.from_dict({"model": model})
    prompt = load_tokenizer(model).encode(PROMPT).ids
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    frame = offline.add_frame("alone", prompt, params)
    with RankPool(1) as pool:
        (tokens,) = pool.run(offline.generate, config.parallel.topology, config, [frame])
    return tokens["alone"]


def doctor(ray_hosts: RayHosts, config_file: Path) -> tuple[int, str]:
    """On the head, where the job will run."""
    command = [EXPERTMESH, "doctor", "--config", config_file.name]
    environment = {**os.environ, **ray_hosts.environment, "COLUMNS": "300"}
    done = ray_hosts.hosts.run(HEAD, command, timeout_s=120, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_doctor_finds_all_well_where_the_job_will_run(
    ray_hosts: RayHosts, config_file: Path
) -> None:
    code, output = doctor(ray_hosts, config_file)
    assert "ready to deploy" in output, output
    assert "problem" not in output
    assert "6 of 6 connections between hosts answered" in output
    assert code == 0


def test_doctor_names_the_host_where_something_is_broken(
    ray_hosts: RayHosts, config_file: Path
) -> None:
    """Another model on host 1, none on host 2, and a certificate that is not there."""
    hosts = ray_hosts.hosts
    (hosts.tmp(2) / "mosaic").rename(hosts.tmp(2) / "elsewhere")
    (hosts.tmp(HEAD) / "server.pem").rename(hosts.tmp(HEAD) / "gone.pem")
    try:
        code, output = doctor(ray_hosts, config_file)
    finally:
        (hosts.tmp(2) / "elsewhere").rename(hosts.tmp(2) / "mosaic")
        (hosts.tmp(HEAD) / "gone.pem").rename(hosts.tmp(HEAD) / "server.pem")
    assert f"{MODEL}: {hosts.address(2)}: No such file or directory" in output
    assert "server.tls_cert_file = '/tmp/server.pem': cannot be read" in output
    assert "2 to be fixed first" in output
    assert code == 1
