"""From what a step computed to what is told of it: tokens, log-probabilities, experts.

Shapes: T tokens of the step, N rows of logits, V vocabulary, L expert layers, K experts per token.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from torch import Tensor

from cluster.engine.plan import Logits, StepPlan
from cluster.engine.plan_draft import Planned
from cluster.engine.sampler import Sampler, prompt_logprobs
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import RoutedExperts, Sequence, TokenEvent

_Extras = dict[str, dict[str, Any]]
"""By request: fields of its event besides the token."""


def take_outputs(
    plan: StepPlan,
    scheduler: Scheduler,
    sampler: Sampler,
    logits_NV: Tensor,
    routed_TLK: Tensor | None = None,
) -> list[TokenEvent]:
    """Sample, and let the scheduler take in the tokens. The plan is the oldest without an update.

    routed_TLK: logical experts of the step's tokens; needed when the plan wants them.
    """
    if not len(plan):
        return []
    planned = scheduler.planned(plan)
    extras: _Extras = defaultdict(dict)
    if Logits.ALL in plan.logits:
        _take_prompt_logprobs(planned, logits_NV, extras)
    if plan.wants_routed_experts:
        assert routed_TLK is not None, "asked for in the plan"
        _take_routed_experts(planned, routed_TLK, extras)
    rows, sequences = _sampled_rows(planned)
    sampled = sampler.sample(
        logits_NV if len(rows) == len(logits_NV) else logits_NV[rows], sequences
    )
    tokens = {}
    for sequence, (token_id, logprob, error) in zip(sequences, sampled, strict=True):
        tokens[sequence.seq_id] = token_id
        if logprob is not None:
            extras[sequence.request_id]["logprob"] = logprob
        if error is not None:
            extras[sequence.request_id].update(error=error, finish_reason="refused")
    events = scheduler.update(plan, tokens)
    return _with_extras(events, extras) if extras else events


def _sampled_rows(planned: Planned) -> tuple[list[int], list[Sequence]]:
    """The rows of logits that give a token, and whose: all after the last token of a sequence."""
    rows, sequences = [], []
    row = -1
    columns = (planned.sequences, planned.ends, planned.plan.logits, planned.plan.counts)
    for sequence, end, logits, count in zip(*columns, strict=True):
        row += count if logits == Logits.ALL else logits
        if logits and end == len(sequence.token_ids) and sequence.finish_reason is None:
            rows.append(row)
            sequences.append(sequence)
    return rows, sequences


def _take_prompt_logprobs(planned: Planned, logits_NV: Tensor, extras: _Extras) -> None:
    """The logits after a token are those of the next one. What was told before is not told again."""
    row = 0
    columns = (planned.sequences, planned.ends, planned.plan.logits, planned.plan.counts)
    for sequence, end, logits, count in zip(*columns, strict=True):
        if logits == Logits.ALL and sequence.finish_reason is None:
            start = end - count
            first = max(start, sequence.num_prompt_logprobs)
            last = min(end, sequence.num_prompt_tokens - 1)
            k = sequence.params.prompt_logprobs
            if first < last and k is not None:
                rows_LV = logits_NV[row + first - start : row + last - start]
                next_ids = sequence.token_ids[first + 1 : last + 1]
                found = prompt_logprobs(rows_LV, next_ids, k)
                extras[sequence.request_id]["prompt_logprobs"] = found
                sequence.num_prompt_logprobs = last
        row += count if logits == Logits.ALL else logits


def _take_routed_experts(planned: Planned, routed_TLK: Tensor, extras: _Extras) -> None:
    ids_TLK = routed_TLK.numpy().astype("<u2", copy=False)
    row = 0
    for sequence, end, count in zip(
        planned.sequences, planned.ends, planned.plan.counts, strict=True
    ):
        told = sequence.num_routed
        if sequence.wants_routed_experts and sequence.finish_reason is None and told < end:
            first = max(told, end - count)
            ids = np.ascontiguousarray(ids_TLK[row + first - (end - count) : row + count])
            experts = RoutedExperts(first, ids.shape[1], ids.shape[2], ids.tobytes())
            extras[sequence.request_id]["routed_experts"] = (experts,)
            sequence.num_routed = end
        row += count


def _with_extras(events: list[TokenEvent], extras: _Extras) -> list[TokenEvent]:
    """Also of requests without a token in this step."""
    found = [event._replace(**extras.pop(event.request_id, {})) for event in events]
    return found + [TokenEvent(request_id, **fields) for request_id, fields in extras.items()]
