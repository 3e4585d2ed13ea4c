"""Which tokens run in the next step: continuous batching by priority, then first come, first served.

One step mixes single tokens of decoding sequences with chunks of prompts, under one budget of
tokens. When blocks run out, the least urgent running sequence gives all of its own back and is
computed again later (prompt and emitted tokens, nothing emitted twice), from those of its blocks
that the cache still has by then.

Why every request finishes: of all unfinished ones, take the most urgent. It is never preempted, for
the least urgent one that runs is. If it waits, then every running one is of a lower priority (of equal
priority the older ones were admitted first), and so many of them are preempted that it is admitted:
at the latest alone it fits. So it advances in each step, and it ends; and as long as no more than
finitely many more urgent ones arrive, each request is at some time the most urgent.

Pure and deterministic: no clock, no torch, no I/O. The loop around it is

    scheduler.add(Sequence(...))                     # ValueError: this request alone is refused
    plan = scheduler.schedule()
    logits = ...                                     # rows for each of plan.logit_items
    events = scheduler.update(plan, {seq_id: token})

To plan while a step is computed, `schedule` may be called once more before `update`. The plan then takes
for granted that each sequence goes on, and holds PENDING for tokens that are still to come;
`complete`, after `update`, puts these in and leaves out those that ended instead.
"""

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engine.block_hash import extend
from cluster.engine.block_manager import BlockManager
from cluster.engine.plan import StepPlan, block_table
from cluster.engine.plan_draft import PlanDraft, Planned
from cluster.engine.sequence import FinishReason, Sequence, TokenEvent
from cluster.engine.sequence_queue import SequenceQueue


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
    enable_prefix_caching: bool = False

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
        self.running = SequenceQueue()
        self.waiting = SequenceQueue()
        self.finds_blocks = True
        """Whether requests that begin to run may use cached blocks; changed at will."""
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        """Prompt tokens of requests that were looked up in the cache."""
        self.num_prefix_hits = 0
        """How many of them were found."""
        self._by_request: dict[str, Sequence] = {}
        self._num_added = 0
        self._in_flight: deque[Planned] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def stats(self) -> dict[str, int | float]:
        """Numbers of sequences and of KV blocks (used: held by sequences; cached: kept for later), and
        since the start: preemptions, prompt tokens looked up in the cache, and found."""
        blocks = self.blocks
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "kv_usage": blocks.num_used / blocks.num_blocks,
            "kv_blocks_used": blocks.num_used,
            "kv_blocks_cached": blocks.num_cached,
            "kv_blocks_total": blocks.num_blocks,
            "preemptions": self.num_preemptions,
            "prefix_queries": self.num_prefix_queries,
            "prefix_hits": self.num_prefix_hits,
        }

    def sequence(self, seq_id: int) -> Sequence:
        """A running sequence; KeyError when it does not run."""
        return self.running[seq_id]

    def find(self, request_id: str) -> Sequence | None:
        """The unfinished request of this id, if it is here."""
        return self._by_request.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; ValueError with the reason when it can never run."""
        self._check(sequence)
        sequence.seq_id = self._num_added
        sequence.urgency = (sequence.priority, sequence.seq_id)
        self._num_added += 1
        if not sequence.params.ignore_eos:
            sequence.stop_token_ids |= frozenset(self.config.eos_token_ids)
        sequence.max_num_tokens = min(
            sequence.num_tokens + sequence.params.max_tokens,
            self.config.max_model_len,
            self.blocks.capacity + 1,  # the last token's keys and values are never needed
        )
        self.waiting.push(sequence)
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

    def forget_cache(self) -> int:
        """Nothing computed so far is found by requests that begin to run from now on.

        Returns how many blocks were kept for that alone, and are free now.
        """
        return self.blocks.forget()

    def schedule(self) -> StepPlan:
        """Plan one step: all decoding sequences, then chunks of prompts by urgency."""
        draft = PlanDraft(self.config)
        preempted_before = self.num_preemptions
        decodes, prompts = self._pick_running()
        was_short = self.num_preemptions > preempted_before
        draft.add_decodes(decodes)
        for sequence in prompts:
            self._admit(draft, before=sequence)
            if sequence in self.running:
                draft.add_chunk(sequence)
        # Blocks freed for a decoding sequence are not given to the next that waits, unless it may
        # preempt anyway.
        self._admit(draft, before=self.running.last if was_short else None)
        planned = draft.finish()
        if planned.sequences:
            self._in_flight.append(planned)
        return planned.plan

    def complete(self, plan: StepPlan) -> StepPlan:
        """The latest plan with the tokens that have come since, without the sequences that ended."""
        if not len(plan):
            return plan
        planned = self._in_flight.pop().completed()
        if planned.sequences:
            self._in_flight.append(planned)
        return planned.plan

    def take_back(self, plan: StepPlan) -> None:
        """The latest plan was lost before it was computed: what it would have computed is to be planned
        again. Preemptions and admissions made for it stand."""
        if len(plan):
            planned = self._in_flight.pop()
            for sequence, count in zip(planned.sequences, planned.plan.counts, strict=True):
                if sequence in self.running:
                    sequence.num_computed -= count

    def planned(self, plan: StepPlan) -> Planned:
        """The sequences of the oldest plan without an update; RuntimeError when `plan` is another."""
        if not self._in_flight or not self._in_flight[0].is_of(plan):
            raise RuntimeError(f"a plan of {len(plan)} rows is not the one to be updated next")
        return self._in_flight[0]

    def update(self, plan: StepPlan, tokens: Mapping[int, int]) -> list[TokenEvent]:
        """Take in what the forward pass of `plan` gave; it must be the oldest without an update.

        `tokens` maps the `seq_id` of each sequence whose last token was computed to its next token; a
        negative token says that it could not be sampled, and ends that request with an error.
        Requests aborted since `schedule` are passed over. One event for each token, in the order of the
        plan.
        """
        if not len(plan):
            return []
        planned = self.planned(plan)
        self._in_flight.popleft()
        events = []
        caches = self.config.enable_prefix_caching
        for sequence, end in zip(planned.sequences, planned.ends, strict=True):
            if sequence.finish_reason is not None:
                continue
            if caches and end >= sequence.next_full:
                self._name_blocks(sequence, end // self.config.block_size)
            if end == len(sequence.token_ids):
                events.append(self._take_token(sequence, tokens[sequence.seq_id]))
                if end == sequence.num_prompt_tokens:
                    events[-1] = events[-1]._replace(
                        cached_tokens=sequence.num_cached_tokens, queue_ms=sequence.queue_ms
                    )
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

    def _pick_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences with one token to compute, for which there is room, and those with more."""
        decodes, prompts = [], []
        preempted_before = self.num_preemptions
        for sequence in self.running:
            start = sequence.num_computed
            missing = len(sequence.token_ids) - start
            if missing > 1:
                prompts.append(sequence)
            elif not missing and start + 1 >= sequence.max_num_tokens:
                pass  # it ends with the token that is coming
            elif start < sequence.num_slots or self._grow(sequence):
                decodes.append(sequence)
        if self.num_preemptions > preempted_before:
            decodes = [s for s in decodes if s in self.running]
            prompts = [s for s in prompts if s in self.running]
        return decodes, prompts

    def _admit(self, draft: PlanDraft, before: Sequence | None) -> None:
        """Admit from the head of the queue those more urgent than `before`; nobody passes a head that
        does not fit yet."""
        while self.waiting:
            head = self.waiting.first
            if before is not None and head.urgency > before.urgency:
                return
            if draft.chunks and not draft.budget:
                return
            while not self._start(head):
                if not self.running or self.running.last.priority <= head.priority:
                    return
                draft.drop(self._preempt_last())
            draft.add_chunk(head)

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a place and its blocks; False when either is short."""
        if len(self.running) >= self.config.max_num_seqs:
            return False
        blocks = self.blocks
        found = self._find_computed(sequence)
        # One token of headroom, or an admission could be preempted in its very next step.
        wanted = min(blocks.blocks_for(sequence.num_tokens + 1), blocks.num_blocks)
        if wanted - len(found) > blocks.num_available - blocks.num_cached_of(found):
            return False
        blocks.hold(found)
        new = blocks.allocate(blocks.blocks_for(sequence.num_tokens) - len(found))
        self.waiting.remove(sequence)
        self.running.push(sequence)
        sequence.block_table = found + new
        sequence.num_slots = len(sequence.block_table) * self.config.block_size
        sequence.num_computed = len(found) * self.config.block_size
        sequence.next_full = sequence.num_computed + self.config.block_size
        sequence.cache_generation = blocks.generation
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += sequence.num_computed
        return True

    def _find_computed(self, sequence: Sequence) -> "array[int]":
        """Blocks with its first tokens; not the last token, for whose logits it is to be computed."""
        caches = self.config.enable_prefix_caching and self.finds_blocks
        if not (caches and sequence.reads_cache):
            return block_table()
        num_blocks = (sequence.num_tokens - 1) // self.config.block_size
        return self.blocks.find(self._names(sequence, num_blocks)[:num_blocks])

    def _names(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        names = sequence.block_names
        size, salt = self.config.block_size, sequence.cache_salt
        extend(names, sequence.token_ids, size, salt, num_blocks)
        return names

    def _name_blocks(self, sequence: Sequence, num_full: int) -> None:
        """The first `num_full` blocks of its table are computed: others may find them."""
        size = self.config.block_size
        first, sequence.next_full = sequence.next_full // size - 1, (num_full + 1) * size
        if not sequence.block_table or sequence.cache_generation != self.blocks.generation:
            return  # preempted meanwhile, or begun before all was forgotten
        names = self._names(sequence, num_full)
        table = sequence.block_table
        for idx in range(first, num_full):
            block = self.blocks.name(table[idx], names[idx])
            if block != table[idx]:  # the same was computed by another sequence meanwhile
                table = table[:idx] + block_table([block]) + table[idx + 1 :]
        sequence.block_table = table

    def _grow(self, sequence: Sequence) -> bool:
        """One more block; False if for want of blocks the sequence itself was or is preempted."""
        if sequence not in self.running:
            return False
        while not self.blocks.num_available:
            if self._preempt_last() is sequence:
                return False
        sequence.block_table = sequence.block_table + self.blocks.allocate(1)
        sequence.num_slots += self.config.block_size
        return True

    def _preempt_last(self) -> Sequence:
        """The least urgent goes back to the queue, where only more urgent ones can be before it.

        It is not admitted again in the step that it made room for: what it gave was too little for
        another sequence besides. So a sequence whose tokens are being computed never begins anew.
        """
        sequence = self.running.last
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.push(sequence)
        self.num_preemptions += 1
        return sequence

    def _take_token(self, sequence: Sequence, token_id: int) -> TokenEvent:
        if token_id < 0:
            self._finish(sequence, "error")
            error = "the model gave no finite logits for this request: its next token is undefined"
            return TokenEvent(sequence.request_id, finish_reason="error", error=error)
        token_ids = sequence.token_ids
        token_ids.append(token_id)
        if token_id in sequence.stop_token_ids:
            self._finish(sequence, "stop")
            return TokenEvent(sequence.request_id, token_id, "stop", stop_token_id=token_id)
        if len(token_ids) < sequence.max_num_tokens:
            return TokenEvent(sequence.request_id, token_id)
        if len(token_ids) <= self.blocks.capacity or self._is_at_its_length(sequence):
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
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = block_table()
        sequence.num_slots = sequence.num_computed = 0

    def _describe_cache(self) -> str:
        return (
            f"the KV cache: {self.blocks.num_blocks} blocks of {self.blocks.block_size} = "
            f"{self.blocks.capacity} tokens"
        )
