"""Which tokens run in the next step: continuous batching, first come, first served.

One step mixes single tokens of decoding sequences with chunks of prompts, under one budget of
tokens. Running sequences are always older than waiting ones, and both are in order of arrival:
that is why the oldest is never preempted, and so why every request finishes. When blocks run out,
the youngest running sequence gives all of its own back and is computed again later (prompt and
emitted tokens, nothing emitted twice).

Pure and deterministic: no clock, no torch, no I/O. The loop around it is

    scheduler.add(Sequence(...))                     # ValueError: this request alone is refused
    plan = scheduler.schedule()
    logits = ...                                     # one row for each of plan.logit_items
    events = scheduler.update(plan, {seq_id: token})
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engine.block_manager import BlockManager
from cluster.engine.plan import PlanItem, StepPlan
from cluster.engine.sequence import FinishReason, Sequence, TokenEvent


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one DP replica."""

    max_num_seqs: int
    """Running sequences."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    block_size: int
    num_blocks: int
    max_model_len: int
    """Prompt plus completion, in tokens."""
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None
    """If given, requests with other token ids are refused."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, got {self.max_model_len}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "a step must hold one token of every running sequence: max_num_batched_tokens = "
                f"{self.max_num_batched_tokens} < max_num_seqs = {self.max_num_seqs}"
            )


class Scheduler:
    """Owns the sequences and the KV blocks of one DP replica."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.running: OrderedDict[int, Sequence] = OrderedDict()
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.num_preemptions = 0
        self._by_request: dict[str, Sequence] = {}
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def stats(self) -> dict[str, int | float]:
        """Numbers of sequences, the share of KV blocks in use, and preemptions since the start."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_usage": self.blocks.num_used / self.blocks.num_blocks,
            "preemptions": self.num_preemptions,
        }

    def sequence(self, seq_id: int) -> Sequence:
        """A sequence of the latest plan; KeyError when it is no longer running."""
        return self.running[seq_id]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; ValueError with the reason when it can never run."""
        self._check(sequence)
        sequence.seq_id = self._num_added
        self._num_added += 1
        if not sequence.params.ignore_eos:
            sequence.stop_token_ids |= frozenset(self.config.eos_token_ids)
        sequence.max_num_tokens = min(
            sequence.num_tokens + sequence.params.max_tokens,
            self.config.max_model_len,
            self.blocks.capacity + 1,  # the last token's keys and values are never needed
        )
        self.waiting[sequence.seq_id] = sequence
        self._by_request[sequence.request_id] = sequence

    def abort(self, request_id: str) -> bool:
        """Forget a request at once, also between a plan and its update; no event follows.

        False when it is not here: it finished, or never came.
        """
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, "abort")
        return True

    def schedule(self) -> StepPlan:
        """Plan one step: all decoding sequences, then chunks of prompts in order of arrival."""
        num_preemptions = self.num_preemptions
        items = self._plan_decodes()
        budget = self.config.max_num_batched_tokens - len(items)
        for sequence in self.running.values():
            if budget and sequence.num_tokens - sequence.num_computed > 1:
                items.append(_next_chunk(sequence, budget, self.config.block_size))
                budget -= len(items[-1].token_ids)
        if num_preemptions == self.num_preemptions:  # else the freed blocks have a purpose
            items += self._plan_admissions(budget)
        return StepPlan(tuple(items))

    def update(self, plan: StepPlan, tokens: Mapping[int, int]) -> list[TokenEvent]:
        """Take in what the forward pass of `plan` gave; the plan must be the latest one.

        `tokens` maps the `seq_id` of each of `plan.logit_items` to its next token; a negative token
        says that it could not be sampled, and ends that request with an error. Requests aborted
        since `schedule` are passed over. One event for each token, in the order of the plan.
        """
        events = []
        for item in plan.items:
            sequence = self.running.get(item.seq_id)
            if sequence is None:
                continue
            if item.start != sequence.num_computed:
                raise RuntimeError(
                    f"plan starts at {item.start}, but {sequence}: not the latest plan"
                )
            sequence.num_computed += len(item.token_ids)
            if item.wants_logits:
                events.append(self._take_token(sequence, tokens[item.seq_id]))
        return events

    def _check(self, sequence: Sequence) -> None:
        """Refuse what can never run, so that the head of the queue always can, once it is alone."""
        config, needed = self.config, sequence.num_tokens + 1
        if sequence.request_id in self._by_request:
            raise ValueError(
                f"request id {sequence.request_id!r} is in use by an unfinished request"
            )
        if needed > config.max_model_len:
            raise ValueError(
                f"the prompt has {sequence.num_tokens} tokens; with one token to generate it exceeds "
                f"max_model_len = {config.max_model_len}"
            )
        if needed > self.blocks.capacity:
            raise ValueError(
                f"the prompt has {sequence.num_tokens} tokens; with one token to generate it exceeds "
                f"{self._describe_cache()}"
            )
        if config.vocab_size is not None:
            sequence.params.check_vocabulary(config.vocab_size)
            if (highest := max(sequence.token_ids)) >= config.vocab_size:
                raise ValueError(
                    f"prompt token ids must be from 0 to {config.vocab_size - 1}, got {highest}"
                )

    def _plan_decodes(self) -> list[PlanItem]:
        items = []
        for sequence in list(self.running.values()):
            if sequence.seq_id not in self.running:
                break  # preempted for an older one, as are all younger ones
            start = sequence.num_computed
            if sequence.num_tokens - start == 1 and self._grow(sequence):
                last = (sequence.token_ids[-1],)
                items.append(PlanItem(sequence.seq_id, last, start, sequence.block_table, True))
        return items

    def _plan_admissions(self, budget: int) -> list[PlanItem]:
        """Admit from the head of the queue, and nobody past a head that does not fit yet."""
        items: list[PlanItem] = []
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            sequence = next(iter(self.waiting.values()))
            # One token of headroom, or an admission could be preempted in its very next step.
            wanted = self.blocks.blocks_for(sequence.num_tokens + 1)
            if min(wanted, self.blocks.num_blocks) > self.blocks.num_free:
                break
            self.running[sequence.seq_id] = self.waiting.popitem(last=False)[1]
            sequence.block_table = self.blocks.allocate(self.blocks.blocks_for(sequence.num_tokens))
            items.append(_next_chunk(sequence, budget, self.config.block_size))
            budget -= len(items[-1].token_ids)
        return items

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the KV of the sequence's last token; False if that preempts itself."""
        if len(sequence.block_table) * self.config.block_size >= sequence.num_tokens:
            return True
        while not self.blocks.num_free:
            youngest = next(reversed(self.running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.block_table = sequence.block_table + self.blocks.allocate(1)  # plans share the old
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """To the front of the queue: it is older than all that wait there."""
        del self.running[sequence.seq_id]
        self._release(sequence)
        self.waiting[sequence.seq_id] = sequence
        self.waiting.move_to_end(sequence.seq_id, last=False)
        self.num_preemptions += 1

    def _take_token(self, sequence: Sequence, token_id: int) -> TokenEvent:
        if token_id < 0:
            self._finish(sequence, "error")
            error = "the model gave no finite logits for this request: its next token is undefined"
            return TokenEvent(sequence.request_id, finish_reason="error", error=error)
        sequence.token_ids.append(token_id)
        if token_id in sequence.stop_token_ids:
            self._finish(sequence, "stop")
            return TokenEvent(sequence.request_id, token_id, "stop", stop_token_id=token_id)
        if sequence.num_tokens < sequence.max_num_tokens:
            return TokenEvent(sequence.request_id, token_id)
        if sequence.num_tokens <= self.blocks.capacity or self._is_at_its_length(sequence):
            self._finish(sequence, "length")
            return TokenEvent(sequence.request_id, token_id, "length")
        self._finish(sequence, "error")
        error = (
            f"prompt and completion have {sequence.num_tokens} tokens; one more exceeds "
            f"{self._describe_cache()}"
        )
        return TokenEvent(sequence.request_id, token_id, "error", error=error)

    def _is_at_its_length(self, sequence: Sequence) -> bool:
        """Whether the request or the model asks for no more, rather than the cache."""
        return (
            sequence.num_emitted >= sequence.params.max_tokens
            or sequence.num_tokens >= self.config.max_model_len
        )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        del self._by_request[sequence.request_id]
        self.running.pop(sequence.seq_id, None)
        self.waiting.pop(sequence.seq_id, None)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = sequence.block_table[:0]
        sequence.num_computed = 0

    def _describe_cache(self) -> str:
        return (
            f"the KV cache: {self.blocks.num_blocks} blocks of {self.blocks.block_size} = "
            f"{self.blocks.capacity} tokens"
        )


def _next_chunk(sequence: Sequence, budget: int, block_size: int) -> PlanItem:
    """As many of the sequence's uncomputed tokens as the budget allows."""
    start = sequence.num_computed
    end = min(sequence.num_tokens, start + budget)
    return PlanItem(
        sequence.seq_id,
        tuple(sequence.token_ids[start:end]),
        start,
        sequence.block_table[: -(-end // block_size)],
        end == sequence.num_tokens,
    )
