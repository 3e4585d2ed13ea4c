"""What a leader's planning costs: the served scheduler, at full batches, without a model.

All sequences decode; as they end others arrive, some with prompts of several chunks and some that begin
as others did, so steps mix what a loaded server's steps mix. The prefix cache is on. What one step
does on a leader besides the model, the sampler and the mail:

    schedule    which tokens run          encode      the plan, as bytes for the other TP ranks
    batch       its tensors               update      tokens in, blocks named, events out
    decode      (on followers)            pack        the events, as bytes for the gateway
"""

import gc
import random
from time import thread_time
from typing import Any

import msgpack
import numpy as np

from cluster.engine.batch import forward_batch
from cluster.engine.plan import StepPlan
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence

BLOCK_SIZE = 16
PROMPT_TOKENS = (32, 1024)
COMPLETION_TOKENS = (64, 512)
SHARED_TOKENS = 256
"""Beginning of every second prompt."""
CHUNK_TOKENS = 4096
"""Of a step, besides one for each sequence."""
PARTS = ("schedule", "encode", "update")
"""What they take together is the scheduler's cost."""


def run(
    sizes: tuple[int, ...] = (64, 256, 1024), steps: int = 300, seed: int = 0
) -> dict[str, Any]:
    """results.<sequences>.<part>.{p50_ms,p99_ms}; "sum": of the parts named in PARTS, in one step."""
    return {
        "steps": steps,
        "block_size": BLOCK_SIZE,
        "results": {str(size): _measure(size, steps, seed) for size in sizes},
    }


def _measure(size: int, steps: int, seed: int) -> dict[str, Any]:
    load = _Load(size, seed)
    while len(load.scheduler.running) < size:
        load.step()
    gc.collect()
    gc.freeze()  # as a rank does before it serves
    before = load.scheduler.stats()
    rows = [load.step() for _ in range(steps)]
    gc.unfreeze()
    stats = load.scheduler.stats()
    timed = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    timed["sum"] = np.sum([timed[name] for name in PARTS], axis=0)
    tokens = timed.pop("tokens")
    return {
        **{
            name: {"p50_ms": float(np.median(ms)), "p99_ms": float(np.percentile(ms, 99))}
            for name, ms in timed.items()
        },
        "tokens_per_step": float(tokens.mean()),
        "blocks_per_sequence": stats["kv_blocks_used"] / size,
        "prefix_hits": stats["prefix_hits"] - before["prefix_hits"],
        "preemptions": stats["preemptions"] - before["preemptions"],
    }


class _Load:
    """Keeps a scheduler at `size` running sequences."""

    def __init__(self, size: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._size = size
        self._num_added = 0
        self._shared = [self._token() for _ in range(SHARED_TOKENS)]
        longest = PROMPT_TOKENS[1] + COMPLETION_TOKENS[1]
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=size,
                max_num_batched_tokens=size + CHUNK_TOKENS,
                block_size=BLOCK_SIZE,
                num_blocks=size * longest // BLOCK_SIZE,
                max_model_len=longest,
                vocab_size=1 << 16,
                enable_prefix_caching=True,
            )
        )

    def step(self) -> dict[str, float]:
        """Milliseconds of processor time by part, and "tokens" of the step."""
        scheduler = self.scheduler
        while len(scheduler.running) + len(scheduler.waiting) < self._size + 1:
            self._add()
        times = [thread_time()]
        plan = scheduler.schedule()
        times.append(thread_time())
        data = plan.encode()
        times.append(thread_time())
        StepPlan.decode(data)
        times.append(thread_time())
        forward_batch(plan, BLOCK_SIZE)
        times.append(thread_time())
        tokens = {seq_id: self._token() for seq_id in plan.seq_ids}
        times.append(thread_time())
        events = scheduler.update(plan, tokens)
        times.append(thread_time())
        msgpack.packb(events)
        times.append(thread_time())
        ms = 1000 * np.diff(times)
        names = ("schedule", "encode", "decode", "batch", "", "update", "pack")
        parts = {name: float(value) for name, value in zip(names, ms, strict=True) if name}
        return {**parts, "tokens": float(plan.num_tokens)}

    def _token(self) -> int:
        return self._random.randrange(1 << 16)

    def _add(self) -> None:
        number, self._num_added = self._num_added, self._num_added + 1
        prompt = [self._token() for _ in range(self._random.randint(*PROMPT_TOKENS))]
        if number % 2:
            prompt[:SHARED_TOKENS] = self._shared[: len(prompt)]
        params = SamplingParams(max_tokens=self._random.randint(*COMPLETION_TOKENS))
        self.scheduler.add(Sequence(f"request-{number}", prompt, params))
