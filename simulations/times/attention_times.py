"""Seconds of attention's core on one rank: scores, softmax, weighted sum over keys.

A decoding sequence's keys are read from the cache once for all its queries; a prompt's are computed
with in the plain form. Both happen in one step when prompts come in chunks beside decoding
sequences, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.model.config import MlaConfig, ModelConfig
from cluster.model.kv_cache import local_kv_heads
from simulations import arithmetic
from simulations.deployment import BYTES, Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.step_work import StepWork

Array = NDArray[Any]
Warn = Callable[[str], None]


class AttentionTimes:
    def __init__(self, deployment: Deployment, calibration: Calibration, warn: Warn) -> None:
        model, size = deployment.model, deployment.topology.tensor_parallel_size
        self._calibration, self._warn = calibration, warn
        self._work = arithmetic.attention(model, size)
        self._kv_bytes = self._work.values_per_key * BYTES[deployment.kv_dtype]
        self._decode_table, self._prefill_table = core_tables(model, size, deployment.kv_dtype)

    def core(self, work: StepWork) -> Array:
        """Of one layer, in the shape of the work."""
        if not work.has_prompts:
            sequences = work.tokens_BD * _ratio(work.kv_tokens_BD, work.pairs_BD)
            return self._decode(sequences, work.kv_tokens_BD, work.pairs_BD)
        # Rows of logits are the decoding sequences', and few others: of prompts that end here.
        decode_pairs = np.minimum(work.kv_tokens_BD, work.pairs_BD)
        sequences = np.minimum(work.logits_BD, decode_pairs)
        prompt_tokens = np.maximum(work.tokens_BD - sequences * (decode_pairs > 0), 0)
        decode = self._decode(sequences, decode_pairs, decode_pairs)
        return decode + self._prefill(prompt_tokens, work.pairs_BD - decode_pairs)

    def _decode(self, sequences: Array, kv_tokens: Array, pairs: Array) -> Array:
        calibration, some = self._calibration, pairs > 0
        queries = float(_ratio(pairs, kv_tokens).max(initial=0))
        suffix = "" if queries <= 1 else f"/{queries:g}_queries"
        if table := calibration.tables.get(self._decode_table + suffix):
            sizes = {
                "sequences": np.maximum(sequences, 1),
                "context": np.maximum(_ratio(kv_tokens, sequences), 1),
            }
            if some.any() and not table.covers(**{k: v[some] for k, v in _same(sizes).items()}):
                self._warn(f"extrapolated: sizes beyond table {self._decode_table}{suffix}")
            return np.asarray(table.at(**sizes) * some)
        seconds = np.maximum(
            pairs * (self._work.flop_per_pair_decode / calibration.decode_flops),
            kv_tokens * (self._kv_bytes / calibration.memory_bandwidth),
        )
        return np.asarray(seconds + calibration.attention_overhead_s * some)

    def _prefill(self, tokens: Array, pairs: Array) -> Array:
        """A table's time per pair is that of a whole prompt whose tokens have as many keys each."""
        calibration, some = self._calibration, pairs > 0
        if table := calibration.tables.get(self._prefill_table):
            length = np.maximum(2 * _ratio(pairs, tokens) - 1, 1)
            if some.any() and not table.covers(tokens=length[some]):
                self._warn(f"extrapolated: prompts beyond table {self._prefill_table}")
            return np.asarray(table.at(tokens=length) * pairs / (length * (length + 1) / 2))
        flop = pairs * self._work.flop_per_pair_prefill
        return np.asarray(
            flop / calibration.prefill_flops + calibration.attention_overhead_s * some
        )


def core_tables(
    model: ModelConfig, tensor_parallel_size: int = 1, kv_dtype: str = "bfloat16"
) -> tuple[str, str]:
    """Names of the tables of attention's core on one rank, in decode and for prompts."""
    attention, size = model.attention, tensor_parallel_size
    heads = attention.num_heads // size
    if isinstance(attention, MlaConfig):
        rotary = attention.qk_rope_head_dim
        plain = attention.qk_nope_head_dim + rotary + attention.v_head_dim
        latent = attention.kv_lora_rank + rotary
        return f"mla_decode/{kv_dtype}/{heads}x{latent}", f"attention_prefill/{heads}x{plain}"
    kv_heads, dim = local_kv_heads(attention.num_kv_heads, size), attention.head_dim
    shape = f"{heads}/{kv_heads}x{dim}"
    return f"gqa_decode/{kv_dtype}/{shape}", f"attention_prefill/{shape}"


def _ratio(above: Array, below: Array) -> Array:
    """0 where there is nothing below."""
    return np.asarray(above / np.maximum(below, 1e-30) * (below > 0))


def _same(sizes: dict[str, Array]) -> dict[str, Array]:
    return dict(zip(sizes, np.broadcast_arrays(*sizes.values()), strict=True))
