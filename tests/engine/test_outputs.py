"""What is told of a step besides tokens: once, in order, and of the right rows of logits.

The logits after a token are a function of the token and its position, so what a request must be told
follows from its own tokens, by torch.log_softmax.
"""

import numpy as np
import pytest
import torch

from cluster.engine.outputs import take_outputs
from cluster.engine.sampler import Sampler
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import RoutedExperts, SamplingParams, Sequence, TokenEvent

VOCAB = 40
LAYERS, TOP_K = 2, 3


def logits_after(token: int, position: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(1000 * position + token)
    return torch.randn(VOCAB, generator=seed)


def experts_of(token: int, position: int) -> np.ndarray:
    return np.arange(LAYERS * TOP_K).reshape(LAYERS, TOP_K) + 100 * position + token


def step(scheduler: Scheduler, sampler: Sampler) -> list[TokenEvent]:
    plan = scheduler.schedule()
    logits, routed = [], []
    for item in plan.items:
        places = list(enumerate(item.token_ids, item.start))
        routed += [experts_of(token, position) for position, token in places]
        rows = [logits_after(token, position) for position, token in places]
        logits += rows[len(rows) - 1 if item.logits == 1 else 0 :] if item.logits else []
    assert len(logits) == plan.num_logit_rows
    logits_NV = torch.stack(logits) if logits else torch.zeros(0, VOCAB)
    routed_TLK = torch.from_numpy(np.stack(routed).astype(np.int16))
    return take_outputs(plan, scheduler, sampler, logits_NV, routed_TLK)


@pytest.mark.parametrize("budget", [4, 7, 64])
@pytest.mark.parametrize("num_blocks", [8, 64])
def test_each_token_is_told_of_once_whatever_the_chunks_and_preemptions(budget, num_blocks):
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        block_size=4,
        num_blocks=num_blocks,
        max_model_len=60,
        vocab_size=VOCAB,
        enable_prefix_caching=True,
    )
    scheduler, sampler = Scheduler(config), Sampler(VOCAB, ())
    sequences = {}
    for idx in range(6):
        asks = idx % 3
        params = SamplingParams(
            temperature=0.0,
            max_tokens=16,
            prompt_logprobs=2 if asks == 1 else None,
            logprobs=1 if asks else None,
        )
        prompt = [(7 * n + idx // 2) % VOCAB for n in range(11)]
        sequences[str(idx)] = Sequence(str(idx), prompt, params, wants_routed_experts=asks == 2)
        scheduler.add(sequences[str(idx)])
    events = []
    while scheduler.has_work:
        events += step(scheduler, sampler)
    assert (scheduler.num_preemptions > 0) == (num_blocks == 8)
    for name, sequence in sequences.items():
        check(sequence, [event for event in events if event.request_id == name])


def check(sequence: Sequence, events: list[TokenEvent]) -> None:
    tokens, num_prompt = sequence.token_ids, sequence.num_prompt_tokens
    chosen = [event for event in events if event.token_id is not None]
    assert [event.token_id for event in chosen] == tokens[num_prompt:]
    assert (chosen[0].cached_tokens is None, chosen[1].cached_tokens) == (False, None)
    after = torch.stack([logits_after(token, place) for place, token in enumerate(tokens)])
    logprobs = torch.log_softmax(after.double(), dim=1)
    told = [(place, event.logprob) for place, event in enumerate(chosen, num_prompt)]
    of_prompt = [found for event in events for found in event.prompt_logprobs]
    if sequence.params.prompt_logprobs is not None:
        assert len(of_prompt) == num_prompt - 1
        before = [event for event in events if event.token_id is None]
        assert events[: len(before)] == before  # all with the first token at the latest
        assert not any(event.prompt_logprobs for event in chosen[1:])
    told += enumerate(of_prompt, 1)
    for place, found in told:
        if sequence.params.logprobs is None:
            assert found is None
            continue
        assert found.token_id == tokens[place]
        expected = logprobs[place - 1]
        assert found.logprob == pytest.approx(float(expected[tokens[place]]), abs=1e-5)
        best = expected.topk(len(found.top_ids))
        assert list(found.top_ids) == best.indices.tolist()
    experts = [part for event in events for part in event.routed_experts]
    if sequence.wants_routed_experts:
        check_experts(tokens, experts)
    else:
        assert not experts


def check_experts(tokens: list[int], parts: list[RoutedExperts]) -> None:
    """Of all tokens but the last, which was never computed."""
    place = 0
    for start, num_layers, top_k, ids in parts:
        assert (start, num_layers, top_k) == (place, LAYERS, TOP_K)
        rows = np.frombuffer(ids, "<u2").reshape(-1, LAYERS, TOP_K)
        for row in rows:
            assert (row == experts_of(tokens[place], place)).all()
            place += 1
    assert place == len(tokens) - 1


def test_a_request_that_fails_says_why_and_others_go_on():
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=9, block_size=4, num_blocks=9, max_model_len=30
    )
    scheduler, sampler = Scheduler(config), Sampler(VOCAB, ())
    for name in ("bad", "good"):
        params = SamplingParams(temperature=0.0)
        scheduler.add(Sequence(name, [1, 2], params))
    plan = scheduler.schedule()
    logits = torch.stack([torch.full((VOCAB,), torch.nan), torch.arange(VOCAB).float()])
    bad, good = take_outputs(plan, scheduler, sampler, logits)
    assert (bad.token_id, bad.finish_reason) == (None, "error")
    assert "no finite logits" in bad.error
    assert (good.token_id, good.finish_reason) == (VOCAB - 1, None)
