"""What the replicas compute in a step, and how far its tokens travel.

B steps, D replicas of the attention (DP), L expert layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.model.config import ModelConfig
from comms.topology import Topology

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepWork:
    """Of B steps, each field [B, D] or broadcastable to it ([B, 1], [1, D], [1, 1]).

    tokens_BD: rows through the linear layers, decoding sequences' and prompts'.
    kv_tokens_BD: keys that decoding sequences read from the cache, the sum of their contexts.
    pairs_BD: (query, key) pairs of all queries.
    logits_BD: rows through the output head.
    has_prompts: whether there are prompts among it. Pairs beyond kv_tokens are then prompts' pairs;
        otherwise they are those of further tokens of the same sequences (speculative decoding).
    """

    tokens_BD: Array
    kv_tokens_BD: Array
    pairs_BD: Array
    logits_BD: Array
    has_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_BD", "kv_tokens_BD", "pairs_BD", "logits_BD"):
            values = np.atleast_2d(np.asarray(getattr(self, name), dtype=np.float64))
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name} must be finite and >= 0")
            object.__setattr__(self, name, values)

    @staticmethod
    def decode(
        sequences: ArrayLike, context: ArrayLike, *, tokens_per_sequence: float = 1.0
    ) -> StepWork:
        """`sequences` per replica, each attending to `context` keys with every one of its tokens.

        tokens_per_sequence: 2 for one speculated token besides the sampled one, say.
        """
        sequences, context = np.asarray(sequences, float), np.asarray(context, float)
        tokens = sequences * tokens_per_sequence
        return StepWork(
            tokens_BD=tokens,
            kv_tokens_BD=sequences * context,
            pairs_BD=tokens * context,
            logits_BD=tokens,
        )

    @staticmethod
    def prefill(tokens: ArrayLike, prompt: ArrayLike) -> StepWork:
        """`tokens` per replica of whole prompts, each `prompt` tokens long."""
        tokens, prompt = np.asarray(tokens, float), np.asarray(prompt, float)
        return StepWork(
            tokens_BD=tokens,
            kv_tokens_BD=np.zeros_like(tokens),
            pairs_BD=tokens * (prompt + 1) / 2,
            logits_BD=tokens / prompt,
            has_prompts=True,
        )

    @property
    def context_BD(self) -> Array:
        """Keys of a query, on average; 0 where there is none."""
        return np.asarray(self.pairs_BD / np.maximum(self.tokens_BD, 1e-30) * (self.tokens_BD > 0))

    def half(self) -> StepWork:
        """One of two equal micro-batches."""
        return StepWork(
            tokens_BD=self.tokens_BD / 2,
            kv_tokens_BD=self.kv_tokens_BD / 2,
            pairs_BD=self.pairs_BD / 2,
            logits_BD=self.logits_BD / 2,
            has_prompts=self.has_prompts,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sends:
    """Mean number of places that a token's experts are at, by expert layer ([L], or one for all).

    nodes_per_token_L: distinct nodes other than its own. ranks_per_token_L: distinct ranks, its own
    included.
    """

    nodes_per_token_L: Array
    ranks_per_token_L: Array

    def __post_init__(self) -> None:
        for name in ("nodes_per_token_L", "ranks_per_token_L"):
            object.__setattr__(self, name, np.atleast_1d(np.asarray(getattr(self, name), float)))

    @staticmethod
    def uniform(model: ModelConfig, topology: Topology) -> Sends:
        """The expectation when every choice is as likely as any other.

        Of E experts, K are chosen, E/n of them in each of n places: a place is missed with
        probability C(E - E/n, K) / C(E, K). With a gate that chooses g of G groups first, and groups
        that lie whole on nodes, it is the g groups that are spread over nodes instead; a token uses
        every group it chose but seldom (scored by its best two experts, the group has some of the
        best K).
        """
        gate = model.gate
        experts, chosen = gate.num_experts, gate.num_experts_per_token
        nodes, ranks = topology.num_nodes, topology.world_size
        met = nodes * (1 - _missed(experts, chosen, nodes))
        if gate.num_groups_per_token < gate.num_groups and gate.num_groups % nodes == 0:
            met = nodes * (1 - _missed(gate.num_groups, gate.num_groups_per_token, nodes))
        return Sends(
            nodes_per_token_L=np.array(met * (nodes - 1) / nodes),
            ranks_per_token_L=np.array(ranks * (1 - _missed(experts, chosen, ranks))),
        )


def _missed(total: int, chosen: int, places: int) -> float:
    """Chance that none of `chosen` out of `total` is in one of equal places; they may be fractions."""
    here = total / places
    taken = np.arange(chosen)
    return float(np.prod(np.clip((total - here - taken) / (total - taken), 0, 1)))
