"""Figures of a load, on outcomes whose figures are known."""

from array import array

import pytest

from simulations.bench.serving_outcomes import Outcome, Slo, summary


def answer(ttft_s: float, gap_s: float, num_tokens: int) -> Outcome:
    chunks = array("d", [ttft_s + gap_s * idx for idx in range(num_tokens)])
    return Outcome(0, 0.0, chunk_s=chunks, num_tokens=num_tokens, end_s=chunks[-1], num_ends=1)


def ended(code: str, end_s: float) -> Outcome:
    return Outcome(0, 0.0, code=code, end_s=end_s, num_ends=1)


def test_times_and_rates() -> None:
    figures = summary([answer(0.1, 0.02, 11) for _ in range(3)], 2.0, Slo())
    for key, milliseconds in {"ttft_ms": 100, "tpot_ms": 20, "itl_ms": 20, "e2e_ms": 300}.items():
        for percentile in ("mean", "p50", "p95", "p99", "max"):
            assert figures[key][percentile] == pytest.approx(milliseconds)
    assert figures["throughput_tokens_per_s"] == pytest.approx(33 / 2)
    assert figures["goodput"]["share"] == 1


def test_chunks_of_several_tokens_count_all_of_them() -> None:
    outcome = Outcome(0, 0.0, chunk_s=array("d", [0.5, 1.5]), num_tokens=11, end_s=1.5)
    assert outcome.tpot_s == pytest.approx(0.1)


def test_goodput_is_what_met_both_limits() -> None:
    outcomes = [answer(0.1, 0.02, 5), answer(0.3, 0.02, 5), answer(0.1, 0.2, 5)]
    outcomes += [ended("RESOURCE_EXHAUSTED", 0.004), ended("UNAVAILABLE", 1.0)]
    figures = summary(outcomes, 1.0, Slo(ttft_ms=200, tpot_ms=50))
    assert figures["requests"] == {"ok": 3, "rejected": 1, "failed": 1}
    assert figures["goodput"] == {"requests_per_s": 1, "tokens_per_s": 5, "share": 1 / 5}
    assert figures["rejection_ms"]["p99"] == pytest.approx(4)
    assert figures["errors"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}


def test_a_request_that_is_refused_after_its_first_tokens_has_failed() -> None:
    outcome = ended("RESOURCE_EXHAUSTED", 1.0)
    outcome.num_tokens = 3
    assert not outcome.rejected


def test_nothing_at_all() -> None:
    assert summary([], 0.0, Slo())["ttft_ms"]["p50"] is None
