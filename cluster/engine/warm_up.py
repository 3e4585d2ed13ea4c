"""The first steps of a rank, before anybody waits for them.

What is made at first use (kernels' choices of tiles, threads, connections, memory) is made here: the
first step of a process takes several times what the next one does.
"""

from collections.abc import Iterator

from cluster.engine.plan import Logits, PlanItem, StepPlan, block_table
from cluster.engine.runner import Runner, max_model_len


def warm_up(runner: Runner) -> None:
    """Compute one step of each shape, on all ranks together, and forget that it was done.

    The longest chunk of a prompt, as many decoding sequences as there may be, and one alone. KV blocks are
    written that nobody has allocated yet.
    """
    for plan in _plans(runner):
        runner.execute(plan, plan.num_tokens)
    runner.forget_counters()


def _plans(runner: Runner) -> Iterator[StepPlan]:
    limits, cache = runner.config.scheduler, runner.cache
    longest = min(
        limits.max_num_batched_tokens,
        cache.num_blocks * cache.block_size,
        max_model_len(runner.config, runner.model.config),
    )
    yield _plan(runner, num_sequences=1, num_tokens=longest)
    yield _plan(runner, num_sequences=min(limits.max_num_seqs, cache.num_blocks), num_tokens=1)
    yield _plan(runner, num_sequences=1, num_tokens=1)


def _plan(runner: Runner, *, num_sequences: int, num_tokens: int) -> StepPlan:
    """Tokens all over the vocabulary, so that they go to all experts."""
    num_blocks = -(-num_tokens // runner.cache.block_size)
    vocab_size = runner.model.config.vocab_size
    return StepPlan.of(
        PlanItem(
            seq_id=seq_id,
            token_ids=tuple((31 * i + 17 * seq_id) % vocab_size for i in range(num_tokens)),
            start=0,
            block_table=block_table(range(seq_id * num_blocks, (seq_id + 1) * num_blocks)),
            logits=Logits.LAST,
        )
        for seq_id in range(num_sequences)
    )
