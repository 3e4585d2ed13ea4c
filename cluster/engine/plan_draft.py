"""A plan while it is made, and what the scheduler remembers of it until its tokens are there."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from operator import add
from typing import Protocol

from cluster.engine.plan import Logits, StepPlan, joined
from cluster.engine.sequence import Sequence

PENDING = -1
"""Instead of a token that the step before is still computing."""
MAX_LOGITS = 1 << 26
"""Logits of one sequence's chunk when it asks for all of them: 256 MiB in fp32."""


class Limits(Protocol):
    """The part of the scheduler's configuration that shapes a plan."""

    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, its sequences in the order of its rows, and where in each its tokens end.

    The first `num_decodes` rows are single tokens, maybe PENDING ones.
    """

    plan: StepPlan
    sequences: list[Sequence]
    ends: list[int]
    num_decodes: int

    def is_of(self, plan: StepPlan) -> bool:
        """Whether `plan`, maybe after a way over the wire, is this one."""
        mine = self.plan
        return plan is mine or (plan.seq_ids == mine.seq_ids and plan.starts == mine.starts)

    def completed(self) -> Planned:
        """With tokens in place of PENDING, and without the rows of sequences that have ended."""
        kept = [row for row, s in enumerate(self.sequences) if s.finish_reason is None]
        planned = self if len(kept) == len(self.sequences) else self._rows(kept)
        num_decodes = planned.num_decodes
        decoding = zip(planned.sequences[:num_decodes], planned.plan.starts, strict=False)
        tokens = array("i", [sequence.token_ids[start] for sequence, start in decoding])
        tokens += planned.plan.token_ids[num_decodes:]
        return replace(planned, plan=replace(planned.plan, token_ids=tokens))

    def _rows(self, rows: list[int]) -> Planned:
        return replace(
            self,
            plan=self.plan.rows(rows),
            sequences=[self.sequences[row] for row in rows],
            ends=[self.ends[row] for row in rows],
            num_decodes=sum(row < self.num_decodes for row in rows),
        )


class PlanDraft:
    """Rows of a plan in the making; `budget` is how many more tokens it may have."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self._max_chunk = max(1, MAX_LOGITS // (limits.vocab_size or 1))
        self.budget = limits.max_num_batched_tokens
        self.decodes: list[Sequence] = []
        self.chunks: list[tuple[Sequence, int]] = []

    def add_decodes(self, sequences: list[Sequence]) -> None:
        """One token of each, the last or the one that is to come; their tables have its block."""
        self.decodes += sequences
        self.budget -= len(sequences)

    def add_chunk(self, sequence: Sequence) -> None:
        """As many of the sequence's uncomputed tokens as the budget allows; maybe none."""
        count = min(sequence.num_tokens - sequence.num_computed, self.budget)
        if sequence.lacks_prompt_logprobs:
            count = min(count, self._max_chunk)
        if count:
            self.chunks.append((sequence, count))
            self.budget -= count

    def drop(self, sequence: Sequence) -> None:
        """Leave out a sequence, if it is in."""
        if sequence in self.decodes:
            self.decodes.remove(sequence)
            self.budget += 1
        for entry in self.chunks:
            if entry[0] is sequence:
                self.chunks.remove(entry)
                self.budget += entry[1]
                return

    def finish(self) -> Planned:
        """The plan. Its tokens count as computed from now on.

        Comprehensions, for with 1,024 sequences a step every other way to go over them shows.
        """
        sequences = self.decodes + [sequence for sequence, _ in self.chunks]
        starts = [sequence.num_computed for sequence in sequences]
        counts = [1] * len(self.decodes) + [count for _, count in self.chunks]
        ends = list(map(add, starts, counts))
        tables = [s.block_table for s in self.decodes]
        tables += [s.block_table[: -(-end // self._block_size)] for s, end in self._chunk_ends()]
        plan = StepPlan(
            seq_ids=array("q", [sequence.seq_id for sequence in sequences]),
            starts=array("i", starts),
            counts=array("i", counts),
            num_blocks=array("i", list(map(len, tables))),
            logits=self._logits(),
            token_ids=self._token_ids(),
            blocks=joined(tables),
            wants_routed_experts=True in [s.wants_routed_experts for s in sequences],
        )
        for sequence, end in zip(sequences, ends, strict=True):
            sequence.num_computed = end
        return Planned(plan=plan, sequences=sequences, ends=ends, num_decodes=len(self.decodes))

    def _chunk_ends(self) -> list[tuple[Sequence, int]]:
        return [(sequence, sequence.num_computed + count) for sequence, count in self.chunks]

    def _token_ids(self) -> array[int]:
        tokens = [
            PENDING if s.num_computed == len(s.token_ids) else s.token_ids[-1] for s in self.decodes
        ]
        for sequence, end in self._chunk_ends():
            tokens += sequence.token_ids[sequence.num_computed : end]
        return array("i", tokens)

    def _logits(self) -> array[int]:
        logits = [Logits.LAST] * len(self.decodes)
        for sequence, end in self._chunk_ends():
            if sequence.lacks_prompt_logprobs:
                logits.append(Logits.ALL)
            else:
                logits.append(Logits.LAST if end == sequence.num_tokens else Logits.NONE)
        return array("B", logits)
