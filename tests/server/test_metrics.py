"""What /metrics says against what clients saw, read by Prometheus' own parser."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ServeConfig
from cluster.server.errors import RequestError
from cluster.server.observe.metrics import Metrics
from cluster.server.request import ModelInfo, PromptInfo
from tests.server.serving import PATIENCE_S, serve
from tests.server.test_control_balance import LAYERS, QUICK, Ranks, more_traffic


def read(serving):
    """Each sample's value by (name, labels without the model's)."""
    families = text_string_to_metric_families(serving.do(serving.metrics.exposition).decode())
    samples = {}
    for family in families:
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("expertmesh:"):
                assert labels.pop("model_name") == "tiny"
            key = (sample.name.removeprefix("expertmesh:"), *sorted(labels.items()))
            assert key not in samples, "a time series twice"
            samples[key] = sample.value
    return samples


def value(samples, name, **labels):
    return samples[(name, *sorted(labels.items()))]


def total(samples, name):
    return sum(value for key, value in samples.items() if key[0] == name)


def test_counts_are_those_that_clients_saw():
    lengths = [1, 2, 7, 20, 33]
    with serve(num_replicas=2) as serving, ThreadPoolExecutor() as threads:

        def ask(max_tokens):
            prompt = list(range(4, 4 + max_tokens % 5 + 1))
            return serving.client.generate(prompt, max_tokens=max_tokens, ignore_eos=True)

        answers = list(threads.map(ask, lengths))
        samples = read(serving)
        prompts = [answer.prompt.num_tokens for answer in answers]
        assert total(samples, "prompt_tokens_total") == sum(prompts)
        assert total(samples, "generation_tokens_total") == sum(lengths)
        assert total(samples, "request_success_total") == len(lengths)
        by_replica = [answer.prompt.data_parallel_rank for answer in answers]
        for engine in (0, 1):
            finished = value(
                samples, "request_success_total", engine=str(engine), finished_reason="length"
            )
            assert finished == by_replica.count(engine)
        # One observation of each first token, and one between every two tokens of a request.
        assert total(samples, "time_to_first_token_seconds_count") == len(lengths)
        assert total(samples, "inter_token_latency_seconds_count") == sum(lengths) - len(lengths)
        assert total(samples, "request_time_per_output_token_seconds_count") == 4, "1 has no gaps"
        assert total(samples, "request_generation_tokens_sum") == sum(lengths)
        assert total(samples, "request_params_max_tokens_sum") == sum(lengths)
        for name in ("e2e_request_latency", "request_queue_time", "request_inference_time"):
            assert total(samples, f"{name}_seconds_count") == len(lengths)
        in_buckets = sum(
            value
            for key, value in samples.items()
            if key[0] == "request_generation_tokens_bucket" and ("le", "20.0") in key
        )
        assert in_buckets == 4, "1, 2, 7 and 20 of the lengths"


def test_times_add_up_to_what_the_client_was_told():
    with serve(step_s=0.01) as serving:
        usage = serving.client.generate([5, 6], max_tokens=8, ignore_eos=True).usage
        samples = read(serving)
    assert total(samples, "time_to_first_token_seconds_sum") == pytest.approx(usage.ttft_ms / 1e3)
    # The client's total ends when the answer is made, a moment after the last token.
    whole = total(samples, "e2e_request_latency_seconds_sum")
    assert 0 < whole <= usage.total_ms / 1e3
    parts = (
        total(samples, f"request_{part}_time_seconds_sum")
        for part in ("queue", "prefill", "decode")
    )
    assert sum(parts) == pytest.approx(whole)
    gaps = total(samples, "inter_token_latency_seconds_sum")
    assert gaps == pytest.approx(total(samples, "request_decode_time_seconds_sum"))
    mean = total(samples, "request_time_per_output_token_seconds_sum")
    assert mean == pytest.approx(gaps / 7)


def test_each_choice_has_a_first_token():
    with serve() as serving:
        answer = serving.client.generate([5, 6], max_tokens=6, ignore_eos=True, n=3)
        samples = read(serving)
    assert len(answer.more_choices) == 2
    assert total(samples, "request_success_total") == 1
    assert total(samples, "request_params_n_sum") == 3
    assert total(samples, "prompt_tokens_total") == 2
    assert total(samples, "generation_tokens_total") == 18
    assert total(samples, "time_to_first_token_seconds_count") == 3
    assert total(samples, "inter_token_latency_seconds_count") == 15


def test_tokens_that_come_together_have_no_time_between_them_but_are_not_first():
    config = ServeConfig.from_dict({"model": "/models/tiny"})
    metrics = Metrics(config, ModelInfo(name="tiny", vocab_size=10, max_model_len=10))
    info = PromptInfo(request_id="r", num_tokens=1, seed=0, replica=0, max_tokens=5)
    request = SimpleNamespace(info=info, arrived=1.0, last_token_at=3.0)
    for since_last_s in (None, 0.0, 0.5):
        metrics.progressed(request, 2, since_last_s)
    text = metrics.exposition().decode()
    sample = '{}{{engine="0",model_name="tiny"}} {}\n'.format
    assert sample("expertmesh:generation_tokens_total", 6.0) in text
    assert sample("expertmesh:time_to_first_token_seconds_sum", 2.0) in text
    assert sample("expertmesh:time_to_first_token_seconds_count", 1.0) in text
    assert sample("expertmesh:inter_token_latency_seconds_count", 2.0) in text


def test_errors_are_counted_by_code_before_and_after_admission():
    with serve() as serving:
        for _ in range(2):
            with pytest.raises(RequestError):
                serving.client.generate([5], temperature=-1.0)
        with pytest.raises(RequestError):
            serving.client.generate([5], model="another")
        serving.leaders[0].fail_prompts_with = 7
        with pytest.raises(RequestError):
            serving.client.generate([7, 8])
        samples = read(serving)
    assert value(samples, "request_refused_total", code="INVALID_ARGUMENT") == 2
    assert value(samples, "request_refused_total", code="NOT_FOUND") == 1
    assert value(samples, "request_failed_total", code="INTERNAL") == 1
    assert total(samples, "request_refused_total") == 3
    assert total(samples, "request_failed_total") == 1
    assert total(samples, "request_success_total") == 0
    assert total(samples, "e2e_request_latency_seconds_count") == 0, "errors have no latency"


def test_a_client_that_leaves_is_an_abort():
    with serve(step_s=0.01) as serving:
        stream = serving.client.generate_stream([5], max_tokens=100, ignore_eos=True)
        next(stream), next(stream)
        samples = read(serving)
        assert value(samples, "num_requests_in_flight", engine="0") == 1
        stream.close()
        deadline = time.monotonic() + PATIENCE_S
        while serving.num_in_flight():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        samples = read(serving)
    assert value(samples, "num_requests_in_flight", engine="0") == 0
    assert value(samples, "request_success_total", engine="0", finished_reason="abort") == 1
    assert total(samples, "e2e_request_latency_seconds_count") == 0


REPORT = {
    "running": 3,
    "waiting": 4,
    "kv_usage": 0.5,
    "epoch": 9,
    "preemptions": 5,
    "kv_blocks_used": 6,
    "kv_blocks_cached": 7,
    "kv_blocks_total": 20,
    "prefix_queries": 100,
    "prefix_hits": 60,
    "step": 11,
    "step_tokens": 48,
    "phases": {"experts": 1.5},
}


def test_replicas_stand_as_they_last_reported(monkeypatch):
    with serve(num_replicas=2) as serving:
        leader = serving.leaders[1]
        frame = leader._frame
        monkeypatch.setattr(leader, "_frame", lambda events: frame(events) | {"stats": REPORT})
        deadline = time.monotonic() + PATIENCE_S
        while (samples := read(serving))[("placement_epoch", ("engine", "1"))] != 9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "kv_cache_usage_perc": 0.5,
        "num_preemptions_total": 5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
        "steps_total": 11,
    }
    assert {name: value(samples, name, engine="1") for name in expected} == expected
    blocks = {
        state: value(samples, "kv_cache_blocks", engine="1", state=state)
        for state in ("used", "cached", "free")
    }
    assert blocks == {"used": 6, "cached": 7, "free": 7}
    assert value(samples, "step_seconds_total", engine="1", phase="experts") == 1.5
    assert value(samples, "iteration_tokens_total_count", engine="1") == 1, "one step, told often"
    assert value(samples, "iteration_tokens_total_sum", engine="1") == 48
    assert value(samples, "kv_cache_usage_perc", engine="0") == 0.25
    assert value(samples, "ready") == 1
    assert value(samples, "draining") == 0
    assert samples[("process_resident_memory_bytes",)] > 1 << 20


def test_a_server_that_drains_says_so():
    with serve() as serving:
        serving.call(serving.gateway.drain(0.0))
        samples = read(serving)
    assert value(samples, "ready") == 0
    assert value(samples, "draining") == 1


def stalled(stats, seconds):
    """A rank's `expert_stats` that tells of steps that waited so long for experts."""

    async def expert_stats():
        report = await stats()
        return report | {"migration": report["migration"] | {"flip_s": seconds}}

    return expert_stats


def test_experts_and_ranks_stand_as_the_rebalancer_last_saw_them():
    ranks = Ranks()
    ranks.fakes[1].expert_stats = stalled(ranks.fakes[1].expert_stats, 0.25)
    with serve(*QUICK, num_replicas=2, make_rebalancer=ranks.rebalancer) as serving:
        deadline = time.monotonic() + PATIENCE_S
        while serving.client.balance().window_s == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        serving.do(more_traffic, ranks)
        while serving.client.balance().ranks[3].served_total != 40:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        samples = read(serving)
        serving.do(ranks.flipping.cancel)
    for rank in range(4):
        assert value(samples, "eplb_rank_load_total", rank=str(rank)) == 110 * (rank + 1) + 100
        sent = 1000 * rank + 500
        assert value(samples, "sent_bytes_total", rank=str(rank), link="intra_node") == sent
        assert value(samples, "sent_bytes_total", rank=str(rank), link="inter_node") == 2 * sent
        assert value(samples, "rank_step_seconds", rank=str(rank)) == pytest.approx(0.003)
    # Ranks computed 10, 20, 30, 40 pairs in the first layer and none in the second.
    assert value(samples, "eplb_layer_balancedness", layer=str(LAYERS[0])) == 25 / 40
    assert value(samples, "eplb_layer_balancedness", layer=str(LAYERS[1])) == 0
    for name in ("eplb_balancedness", "eplb_balancedness_min", "eplb_balancedness_p50"):
        assert value(samples, name) == 25 / 40, "of the layers that served anything"
    assert value(samples, "eplb_migrated_bytes_total") == 4 * (3 + 4 + 5)
    assert value(samples, "eplb_stall_seconds_total") == 0.25, "of the slowest rank"
    for outcome in ("finished", "abandoned"):
        assert value(samples, "eplb_rebalances_total", outcome=outcome) == 0
