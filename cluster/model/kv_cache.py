"""The paged KV cache of one rank: per layer, the keys and values of its local heads.

Grouped-query attention (GQA) shards KV heads over the tensor-parallel group; with fewer KV heads
than ranks each rank keeps one, so a head is then replicated. Multi-head latent attention (MLA)
stores one latent per token instead, which every rank of the group keeps whole: it serves all heads.

Legend: G KV heads here, D channels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model.config import GqaConfig, ModelConfig
from comms.topology import Topology


def local_kv_heads(num_kv_heads: int, tensor_parallel_size: int) -> int:
    """KV heads a rank keeps. Raises ValueError unless one count divides the other."""
    if num_kv_heads % tensor_parallel_size and tensor_parallel_size % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads={num_kv_heads} and tensor_parallel_size={tensor_parallel_size}: "
            "one must divide the other"
        )
    return max(1, num_kv_heads // tensor_parallel_size)


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's keys and values, [G, num_blocks, block_size, D]; for MLA they are one tensor."""

    keys: Tensor
    values: Tensor

    def write(self, kv_slots_T: Tensor, k_TGD: Tensor, v_TGD: Tensor | None = None) -> None:
        """Store each token's key and value at its slot (block * block_size + offset).

        NaN and infinity are stored as finite numbers: attention multiplies hidden keys' values by
        0, and a broken sequence must not reach the next owner of its blocks. Its own logits stay
        NaN through its residual stream.
        """
        _store(self.keys, kv_slots_T, k_TGD)
        if v_TGD is not None:
            _store(self.values, kv_slots_T, v_TGD)


def _store(cache: Tensor, kv_slots_T: Tensor, rows_TGD: Tensor) -> None:
    finite_GTD = torch.nan_to_num(rows_TGD).transpose(0, 1)
    cache.flatten(1, 2).index_copy_(1, kv_slots_T, finite_GTD)


class KVCache:
    """All layers' caches of this rank, `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV cache needs blocks: num_blocks={num_blocks}, block_size={block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        heads, channels, is_latent = _shape(config, topology)
        shape = (heads, num_blocks, block_size, channels)

        def layer() -> LayerCache:
            keys = _claimed(shape, dtype)
            return LayerCache(keys=keys, values=keys if is_latent else _claimed(shape, dtype))

        self.layers = tuple(layer() for _ in range(config.num_layers))

    @staticmethod
    def bytes_per_block(
        config: ModelConfig, topology: Topology, dtype: torch.dtype, block_size: int
    ) -> int:
        """Bytes one rank spends per block, all layers together."""
        heads, channels, is_latent = _shape(config, topology)
        per_token = heads * channels * (1 if is_latent else 2) * config.num_layers
        return per_token * block_size * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return sum(
            layer.keys.nbytes + (0 if layer.values is layer.keys else layer.values.nbytes)
            for layer in self.layers
        )


def _claimed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that are written: `torch.zeros` gets its pages only when a block is first used, and a host
    with too little memory would end the process in the middle of serving instead of at its start."""
    return torch.empty(shape, dtype=dtype).zero_()


def _shape(config: ModelConfig, topology: Topology) -> tuple[int, int, bool]:
    """KV heads here, channels of each, and whether one latent stands for key and value."""
    attention = config.attention
    if isinstance(attention, GqaConfig):
        heads = local_kv_heads(attention.num_kv_heads, topology.tensor_parallel_size)
        return heads, attention.head_dim, False
    return 1, attention.kv_lora_rank + attention.qk_rope_head_dim, True
