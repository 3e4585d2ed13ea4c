"""What a rank's model holds and has computed, for reports and for the promise that no rank holds too much.

The same for both backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor

from cluster.model.config import ModelConfig


class Model(Protocol):
    """The modules of a transformer, layers of either backend. `mlp` of an expert layer counts without the
    experts in slots."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def embedding(self) -> Tensor: ...
    @property
    def head(self) -> object: ...
    @property
    def norm(self) -> object: ...
    @property
    def rotary(self) -> object: ...
    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def moe_layers(self) -> Sequence[Any]: ...


class Reports:
    """What both backends' transformers tell of themselves."""

    def memory(self: Model) -> dict[str, int]:
        """Bytes of weights here: experts (routed), attention, and other."""
        other = tensor_bytes((self.embedding, self.norm, self.rotary))
        other += 0 if self.config.tie_word_embeddings else tensor_bytes(self.head)
        for layer in self.layers:
            other += tensor_bytes((layer.attention_norm, layer.mlp_norm, layer.mlp))
        return {
            "experts": sum(moe.slots.num_bytes for moe in self.moe_layers),
            "attention": sum(tensor_bytes(layer.attention) for layer in self.layers),
            "other": other,
        }

    def expert_load(self: Model) -> list[int]:
        """(token, expert) pairs computed so far on this rank, by expert layer."""
        return [int(moe.tokens_per_slot_S.sum()) for moe in self.moe_layers]


def tensor_bytes(module: object) -> int:
    """Bytes of all tensors in a dataclass, in the dataclasses and tuples inside it, and in what says
    itself how many it has."""
    if isinstance(module, Tensor):
        return module.nbytes
    if isinstance(module, tuple):
        return sum(tensor_bytes(item) for item in module)
    if hasattr(module, "num_bytes"):
        return int(module.num_bytes)
    if is_dataclass(module):
        return sum(tensor_bytes(getattr(module, field.name)) for field in fields(module))
    return 0
