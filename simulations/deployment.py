"""What is simulated: a model on ranks, and the formats of its weights, cache and messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cluster.model.config import ModelConfig
from cluster.model.kv_cache import KVCache
from comms.codecs import CODECS
from comms.dispatcher import WireDtype
from comms.topology import Topology

ComputeDtype = Literal["float8", "bfloat16"]
Dispatcher = Literal["hierarchical", "flat", "low_latency"]
Overlap = Literal["none", "two_batch"]

BYTES = {"float8": 1, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model laid out on a cluster. Raises ValueError for a layout that cannot be.

    weights: of routed and shared experts, dense MLPs and attention. float8 is one byte a weight;
        the scales of 128 x 128 blocks, 0.02 % more, are left out. Embedding, output head and norms
        are bfloat16, gates fp32.
    dispatcher: what crosses between ranks. "hierarchical": one row per (token, node), forwarded
        inside the node once per (token, rank), sums inside the node before they return. "flat": one
        row per (token, rank). "low_latency": one row per (token, expert), as DeepEP's low-latency
        kernels.
    overlap: "two_batch": two micro-batches, one's messages under the other's computation.
    """

    model: ModelConfig
    topology: Topology
    num_redundant_experts: int = 0
    weights: ComputeDtype = "float8"
    kv_dtype: Literal["bfloat16", "float8"] = "bfloat16"
    dispatch_dtype: WireDtype = "float8"
    combine_dtype: WireDtype = "bfloat16"
    dispatcher: Dispatcher = "hierarchical"
    overlap: Overlap = "none"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.num_redundant_experts < 0:
            raise ValueError(
                f"num_redundant_experts must be >= 0, got {self.num_redundant_experts}"
            )
        if left := self.num_slots % self.num_ranks:
            raise ValueError(
                "every rank needs the same number of slots: (num_experts + num_redundant_experts) "
                f"% ranks = ({self.model.num_experts} + {self.num_redundant_experts}) % "
                f"{self.num_ranks} = {left}; add {self.num_ranks - left} redundant experts"
            )
        heads, size = self.model.attention.num_heads, self.topology.tensor_parallel_size
        if heads % size:
            raise ValueError(
                "tensor_parallel_size must divide num_attention_heads, got "
                f"{heads} % {size} = {heads % size}"
            )
        _ = self.kv_bytes_per_token  # refuses KV heads that do not divide

    @property
    def num_ranks(self) -> int:
        return self.topology.world_size

    @property
    def num_slots(self) -> int:
        """Physical experts of one layer, on all ranks."""
        return self.model.num_experts + self.num_redundant_experts

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def expert_bytes(self) -> int:
        """Of one expert in one layer: what migrating it moves."""
        elements = 3 * self.model.hidden_size * self.model.expert_intermediate_size
        return elements * BYTES[self.weights]

    @property
    def kv_bytes_per_token(self) -> int:
        """On one rank, all layers together."""
        per_token = KVCache.bytes_per_block(self.model, self.topology, torch.uint8, 1)
        return per_token * BYTES[self.kv_dtype]

    @property
    def dispatch_row_bytes(self) -> int:
        """Payload of a token on its way to experts; headers are not counted."""
        return _row_bytes(self.dispatch_dtype, self.model.hidden_size)

    @property
    def combine_row_bytes(self) -> int:
        """Payload of a sum on its way back."""
        return _row_bytes(self.combine_dtype, self.model.hidden_size)


_CHOICES: dict[str, tuple[str, ...]] = {
    "weights": get_args(ComputeDtype),
    "kv_dtype": ("bfloat16", "float8"),
    "dispatch_dtype": get_args(WireDtype),
    "combine_dtype": get_args(WireDtype),
    "dispatcher": get_args(Dispatcher),
    "overlap": get_args(Overlap),
}


def _row_bytes(dtype: WireDtype, hidden: int) -> int:
    return CODECS[dtype].row_bytes(hidden, torch.bfloat16)
