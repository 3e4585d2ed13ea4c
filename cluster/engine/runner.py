"""One rank's share of the model and its KV cache, executing step plans.

Experts move into and out of the share while it serves: `prepare` and `abandon` are called from other
threads than the one that executes, `flip` by that one, between two steps.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cluster.config import ConfigError, ServeConfig
from cluster.engine.batch import forward_batch
from cluster.engine.migration import start_migrator
from cluster.engine.plan import StepPlan
from cluster.engine.step_timer import StepTimer
from cluster.model.config import ModelConfig
from cluster.model.kv_cache import KVCache
from cluster.model.routing import gather, recorded
from cluster.model.transformer import Transformer
from comms.groups import ParallelGroups
from comms.transfer_server import TransferServer
from experts.migrate import Migrator
from router.placement import Placement

GIB = 1 << 30
ROWS_SAMPLED = 32
STEPS_REMEMBERED = 4096
RECENT_STEPS = 64


class Step(NamedTuple):
    """number: how many steps had been executed with this one. seconds: from one execute's end to the
    next one's. preparing: whether experts were on their way to this rank at its end."""

    number: int
    seconds: float
    preparing: bool


class Runner:
    """Turns plans into logits. All TP ranks of a replica execute the same plans in the same order."""

    def __init__(
        self,
        config: ServeConfig,
        model: Transformer,
        cache: KVCache,
        timer: StepTimer,
        migrator: Migrator,
        server: TransferServer,
    ) -> None:
        self.config = config
        self.model = model
        self.cache = cache
        self.timer = timer
        self.migrator = migrator
        self.num_steps = 0
        self.routed_TLK: Tensor | None = None
        """On TP rank 0: experts of the latest plan's tokens in all expert layers, if it wants them."""
        self._server = server
        self._steps: deque[Step] = deque(maxlen=STEPS_REMEMBERED)
        self._last_end: float | None = None

    @staticmethod
    def load(config: ServeConfig, groups: ParallelGroups) -> Runner:
        """Read this rank's share of the checkpoint and allocate its KV blocks. Collective.

        Raises UnsupportedModelError or CheckpointError, naming what is wrong with the checkpoint.
        """
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        model_config = ModelConfig.from_dir(config.model)
        dtype = getattr(torch, config.dtype)
        placement = Placement.contiguous(
            model_config.num_moe_layers,
            model_config.num_experts,
            groups.topology.world_size,
            config.experts.num_redundant_experts,
            ranks_per_node=groups.topology.ranks_per_node,
        )
        timer = StepTimer()
        num_blocks = num_cache_blocks(config, model_config, groups)
        block_size = config.cache.block_size
        if config.device == "cuda":
            model, cache = _load_cuda(config, model_config, groups, placement, num_blocks)
        else:
            model = Transformer.load(
                config.model,
                model_config,
                groups,
                placement,
                dtype,
                config.comms,
                timer.phase,
                config.experts.split,
            )
            cache = KVCache(model_config, groups.topology, num_blocks, block_size, dtype)
        migrator, server = start_migrator(config, groups, model, placement)
        return Runner(config, model, cache, timer, migrator, server)

    def close(self) -> None:
        """Stop sending experts to other ranks, and computing."""
        self._server.close()
        self.model.close()

    def execute(
        self, plan: StepPlan, max_tokens: int | None = None, max_blocks: int = 0
    ) -> Tensor | None:
        """fp32 logits [plan.num_logit_rows, V] on TP rank 0, None elsewhere.

        max_tokens, max_blocks: the most that any replica and any of its sequences has in this step, the
        same on all ranks; by them they agree on what to overlap (None: nothing), on GPUs on the graph.
        """
        with self.timer.phase("batch"):
            width = max_blocks if self.config.device == "cuda" else 0
            batch = forward_batch(plan, self.cache.block_size, width)
        self.model.where.step = self.num_steps
        try:
            if not plan.wants_routed_experts:
                return self.model.forward(batch, self.cache, max_tokens)
            with recorded(self.model.moe_layers) as choices:
                logits = self.model.forward(batch, self.cache, max_tokens)
            self.routed_TLK = gather(choices, self.model.tp)
            return logits
        finally:
            self.model.where.step = -1
            self.num_steps += 1
            now = perf_counter()
            if self._last_end is not None:
                self._steps.append(
                    Step(self.num_steps, now - self._last_end, self.migrator.preparing)
                )
            self._last_end = now

    def forget_counters(self) -> None:
        """As if nothing had been executed yet."""
        self.num_steps = 0
        self._steps.clear()
        self._last_end = None
        self.timer.reset()
        self.model.forget_bytes()
        for moe in self.model.moe_layers:
            moe.forget_counters()

    def rest(self) -> None:
        """This step has nothing to execute: the time until the next one is no step's."""
        self._last_end = None

    @property
    def epoch(self) -> int:
        """Of the placement in force."""
        return self.migrator.epoch

    def prepare(self, epoch: int, layer: int, row: ArrayLike) -> None:
        """Fetch what this rank needs for `row` in one expert layer: see `Migrator.prepare`."""
        self.migrator.prepare(epoch, layer, row, self.config.eplb_config.prepare_timeout_s)

    def abandon(self, epoch: int) -> bool:
        return self.migrator.abandon(epoch)

    def commit(self, epoch: int) -> bool:
        """All ranks have prepared `epoch`. False if this one has not."""
        return self.migrator.commit(epoch)

    def flip(self, epoch: int) -> None:
        """Put a prepared placement in force; nothing to do if it is already."""
        if epoch != self.epoch:
            self.migrator.flip(epoch)

    def memory(self) -> dict[str, int]:
        """Bytes held by this rank, by kind."""
        return {**self.model.memory(), "kv_cache": self.cache.num_bytes}

    def stats(self) -> dict[str, Any]:
        """Since the start: tokens through this rank's experts by MoE layer, bytes sent, seconds by
        phase, and what migrations did (see `Migrator.metrics`); the latest steps (see `Step`); and the
        memory held."""
        return {
            "expert_load": self.model.expert_load(),
            "bytes": self.model.bytes_sent(),
            "step_seconds": dict(self.timer.seconds),
            "memory": self.memory(),
            "migration": self.migrator.metrics(),
            "steps": list(self._steps),
        }

    def expert_stats(self) -> dict[str, Any]:
        """What decides on placements, by expert layer. From any thread, maybe amid a step.

        Since the start: "routed" [L, E], the choices of each expert for this rank's own tokens,
        "served", (token, expert) pairs computed here, the bytes sent, and "migration", see
        `Migrator.metrics`.
        "rows": experts of a few tokens of the latest batch. "step_seconds": of the last steps, from
        one execute's end to the next one's.
        """
        moes = self.model.moe_layers
        return {
            "epoch": self.epoch,
            "step": self.num_steps,
            "routed": torch.stack([moe.routed_E for moe in moes]).numpy(),
            "served": self.model.expert_load(),
            "bytes": self.model.bytes_sent(),
            "rows": [moe.recent_TK[:ROWS_SAMPLED].numpy() for moe in moes],
            "step_seconds": [step.seconds for step in list(self._steps)[-RECENT_STEPS:]],
            "migration": self.migrator.metrics(),
        }


def _load_cuda(
    config: ServeConfig,
    model_config: ModelConfig,
    groups: ParallelGroups,
    placement: Placement,
    num_blocks: int,
) -> tuple[Transformer, KVCache]:
    """The model and its cache on this rank's GPU. Imported here: the CPU's ranks need no Triton."""
    from cluster.model.cuda.transformer import CudaTransformer

    model = CudaTransformer.load(
        config.model,
        model_config,
        groups,
        placement,
        config.comms,
        quantization=config.quantization,
        max_tokens=config.scheduler.max_num_batched_tokens,
    )
    cache = model.new_cache(num_blocks, config.cache.block_size)
    model.capture(cache, config.scheduler.max_num_batched_tokens)
    return cast(Transformer, model), cache  # the parts of it that are used here are the same


def num_cache_blocks(config: ServeConfig, model_config: ModelConfig, groups: ParallelGroups) -> int:
    """Blocks per rank: as configured, or as many as fit into `cache.memory_gib`."""
    if config.cache.num_blocks is not None:
        return config.cache.num_blocks
    per_block = KVCache.bytes_per_block(
        model_config, groups.topology, getattr(torch, config.dtype), config.cache.block_size
    )
    return max(1, int(config.cache.memory_gib * GIB) // per_block)


def max_model_len(config: ServeConfig, model_config: ModelConfig) -> int:
    """Longest prompt plus completion, in tokens; ConfigError when set beyond the model's own."""
    limit = model_config.max_position_embeddings
    if (config.max_model_len or 0) > limit:
        raise ConfigError(
            f"max_model_len = {config.max_model_len} exceeds the model's max_position_embeddings "
            f"= {limit}"
        )
    return config.max_model_len or limit
