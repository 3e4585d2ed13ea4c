"""`expertmesh bench overload`: what its report calls correct, and how it is shown."""

import io
import json
from array import array

from rich.console import Console

from deploy.bench.overload import OverloadBench, overload_config, report_of, show
from simulations.bench.load_process import Sent
from simulations.bench.serving_outcomes import Outcome, Slo, summary

BENCH = OverloadBench(minutes=0.1, users=8)
SLO = Slo(ttft_ms=1000, tpot_ms=100)
IDLE = {"in_flight": 0, "running": 0, "waiting": 0, "kv_blocks_used": 0}
USE = {
    "memory": {
        "controller": {
            "first_mib": 300.0, "last_mib": 1301.0, "max_mib": 1301.0, "slope_mib_per_minute": 0.2
        }
    },
    "cpu_share": {"controller": 0.3, "ranks": 1.5, "generator": 0.1},
}  # fmt: skip


def answer(idx: int, sent_s: float) -> Outcome:
    chunks = array("d", [0.5 + 0.05 * token for token in range(10)])
    return Outcome(
        idx, sent_s, planned_tokens=10, num_tokens=10, chunk_s=chunks, end_s=chunks[-1], num_ends=1,
        token_ids=[idx, *range(9)],
    )  # fmt: skip


def refusal(idx: int, sent_s: float) -> Outcome:
    return Outcome(idx, sent_s, code="RESOURCE_EXHAUSTED", end_s=0.004, num_ends=1)


def report(outcomes: list[Outcome], quiet: list[Outcome], held: dict[str, int] = IDLE) -> dict:
    peak = summary([answer(idx, 0.0) for idx in range(20)], 10.0, SLO)
    return report_of(
        BENCH, SLO, peak, 20.0, Sent(outcomes, 10.0, 1.0), Sent(quiet, 5.0, 0.1), USE, [IDLE, held]
    )


def flood() -> list[Outcome]:
    """20 answers in ten seconds, as many as at the peak, and ten times as many refusals."""
    served = [answer(idx, 0.05 * idx) for idx in range(20)]
    return [*served, *(refusal(20 + idx, 0.05 * idx) for idx in range(201))]


def test_a_cluster_that_keeps_up() -> None:
    found = report(flood(), [answer(idx, 0.0) for idx in range(5)])
    assert all(found["correct"].values())
    assert abs(found["goodput_of_peak"] - 1) < 1e-9
    assert found["compared_with_quiet"] == 5
    assert abs(found["rejection_ms"]["p99"] - 4) < 1e-9
    json.dumps(found)
    console = Console(width=80, file=io.StringIO())
    show(console, found)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


def test_whatever_goes_wrong_is_seen() -> None:
    quiet = [answer(idx, 0.0) for idx in range(5)]
    broken = {}
    for name in ("lost", "twice", "short", "failed", "other tokens"):
        outcomes = flood()
        match name:
            case "lost":
                outcomes[3].num_ends = 0
            case "twice":
                outcomes[30].num_ends = 2
            case "short":
                outcomes[3].num_tokens = 9
            case "failed":
                outcomes[3].code = "UNAVAILABLE"
            case "other tokens":
                outcomes[3].token_ids = [3, *range(1, 10)]
        correct = report(outcomes, quiet)["correct"]
        broken[name] = [what for what, holds in correct.items() if not holds]
    assert broken == {
        "lost": ["every request has one end"],
        "twice": ["every request has one end"],
        "short": ["every answer is complete"],
        "failed": ["none failed"],
        "other tokens": ["same tokens as when quiet"],
    }
    left = report(flood(), quiet, {**IDLE, "kv_blocks_used": 1})["correct"]
    assert not left["idle afterwards"]
    assert not report(flood(), [])["correct"]["same tokens as when quiet"]


def test_the_queue_is_short_and_the_cache_holds_all_that_run() -> None:
    config = overload_config(OverloadBench(users=64))
    assert config.scheduler.max_num_seqs == 32
    assert config.scheduler.max_num_queued_reqs == 80
    assert config.cache.num_blocks * config.cache.block_size >= 32 * (32 + 128)
    mine = overload_config(OverloadBench(users=64, overrides=["scheduler.max_num_seqs=5"]))
    assert mine.scheduler.max_num_seqs == 5
