"""A trace of steps, and metrics, of a real cluster that serves requests meanwhile."""

import json
import subprocess
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.server.client import Client
from cluster.server.errors import Code, RequestError
from tests.deploy.processes import EXPERTMESH, Command

PATIENCE_S = 120
NUM_RANKS = 4


@pytest.fixture
def traffic(endpoint: str):
    """Requests one after the other for as long as the test runs."""
    over = Event()

    def generate() -> None:
        with Client(endpoint, timeout_s=PATIENCE_S) as client:
            while not over.is_set():
                stream = client.generate_stream("Once upon a time", max_tokens=200, ignore_eos=True)
                for _ in stream:
                    if over.is_set():
                        break
                stream.close()

    with ThreadPoolExecutor() as threads:
        running = threads.submit(generate)
        yield
        over.set()
        running.result(PATIENCE_S)


def trace(endpoint: str, *options: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [EXPERTMESH, "trace", "--endpoint", endpoint, "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def wait_until_idle(client: Client) -> None:
    """Requests that other tests have left behind are over."""
    deadline = time.monotonic() + PATIENCE_S
    while any(load.in_flight or load.running for load in client.loads().replicas):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("traffic")
def test_a_trace_has_all_ranks_and_the_same_steps_of_each(endpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    done = trace(endpoint, "--steps", "7", "--timeout", "60", out=out)
    assert done.returncode == 0, done.stderr
    events = json.loads(out.read_text())["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"
    }
    assert sorted(names.values()) == [
        f"rank {rank} (node {rank // 2})" for rank in range(NUM_RANKS)
    ]
    spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            spans[names[event["pid"]]].append(event)
    steps = [[e for e in spans[name] if e["cat"] == "step"] for name in sorted(spans)]
    numbers = [[event["args"]["step"] for event in of_rank] for of_rank in steps]
    first = numbers[0][0]
    assert numbers == [list(range(first, first + 7))] * NUM_RANKS
    for name, of_rank in zip(sorted(spans), steps, strict=True):
        for step in of_rank:
            inside = {
                event["name"]
                for event in spans[name]
                if step["ts"] <= event["ts"] < step["ts"] + step["dur"] and event is not step
            }
            assert {"gate", "dispatch", "experts", "combine"} <= inside, name


def test_an_idle_cluster_says_that_it_makes_no_steps(endpoint: str, tmp_path: Path) -> None:
    with Client(endpoint, timeout_s=PATIENCE_S) as client:
        wait_until_idle(client)
        with pytest.raises(RequestError, match="a cluster without requests makes none") as error:
            client.trace_steps(5, 0.5)
        assert error.value.code == Code.FAILED_PRECONDITION
        out = tmp_path / "trace.json"
        assert trace(endpoint, "--timeout", "0.5", out=out).returncode == 1
        assert not out.exists()
        # And records for nobody: the next trace is that of its own steps only.
        with suppress(RequestError):
            client.generate("still here", max_tokens=2)


def test_a_file_that_cannot_be_written_is_known_before_the_wait(
    endpoint: str, tmp_path: Path
) -> None:
    done = trace(endpoint, "--timeout", "600", out=tmp_path / "nowhere" / "trace.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere/trace.json" in done.stderr


def scrape(served: Command) -> dict[str, float]:
    """Sums over labels."""
    url = served.wait_for(r"over HTTP on (\S+)", 1)[1]
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(answer.read().decode())
        totals: dict[str, float] = defaultdict(float)
        for family in families:
            for sample in family.samples:
                totals[sample.name.removeprefix("expertmesh:")] += sample.value
    return totals


def test_metrics_of_a_real_cluster_grow_by_what_clients_got(served: Command, endpoint: str) -> None:
    with Client(endpoint, timeout_s=PATIENCE_S) as client:
        wait_until_idle(client)
        before = scrape(served)
        usages = [
            client.generate("To be or not to be", max_tokens=9, ignore_eos=True).usage
            for _ in range(3)
        ]
        deadline = time.monotonic() + PATIENCE_S
        while (after := scrape(served))["eplb_rank_load_total"] == before["eplb_rank_load_total"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["request_success_total"] == 3
    assert grown["prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
    assert grown["generation_tokens_total"] == 27
    assert grown["time_to_first_token_seconds_sum"] == pytest.approx(
        sum(usage.ttft_ms for usage in usages) / 1e3
    )
    assert grown["prompt_tokens_cached_total"] == sum(usage.cached_tokens for usage in usages)
    assert grown["prefix_cache_hits_total"] == grown["prompt_tokens_cached_total"]
    assert grown["steps_total"] >= 27 - 3
    assert grown["sent_bytes_total"] > 0
    assert grown["step_seconds_total"] > 0
    assert after["kv_cache_blocks"] > 0
    assert after["ready"] == 1
