"""Counts of tokens by slot that a published run must have had: skew, prompts, placement, chance.

Nothing here is a factor. A layer's experts have unequal loads (`skew.py`); a batch of prompts moves them a
little, because each prompt has favourites of its own; EPLB (`simulations/eplb.py`) places the mean;
copies of an expert share its tokens evenly; the counts are then drawn.

B batches, L layers, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulations.eplb import eplb
from simulations.scoreboard.skew import RECORDED, Skew

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Balance = Literal["none", "eplb", "random", "exact"]

PROMPT_JITTER = 0.35
"""Log-sd of an expert's load in one prompt against its mean, beyond chance: tasks "summary" of the
routing of DeepSeek-V2-Lite that deepseek-ai/ESFT publishes, windows of 128 to 161 tokens."""
SHAREGPT_PROMPT = 161
"""Mean tokens of a ShareGPT prompt (Kwon et al., SOSP 2023, figure 11). SGLang's benchmark repeats
one until the length asked for is reached, so that a prompt of 4096 tokens has few distinct ones."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer stack's experts on slots, and how its tokens come.

    tokens: of a micro-batch, of all ranks. distinct_prompts: None where every token is of a sequence
    of its own (decode); else the prompts that the tokens are copies of pieces of.
    num_nodes, num_groups: as EPLB asks for them: where groups divide over nodes it keeps them whole.
    balance: "none": experts in order, slots beyond them filled from the first again, as SGLang's
    trivial placement; "eplb": planned on the true mean; "random": every slot as likely as any
    other; "exact": every slot the same number.
    """

    num_experts: int
    num_slots: int
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    top_k: int
    num_layers: int
    tokens: int
    balance: Balance
    skew: Skew = RECORDED
    distinct_prompts: int | None = None
    prompt_tokens: int = SHAREGPT_PROMPT

    def draw(self, rng: np.random.Generator, num_batches: int) -> IntArray:
        """[B, L, S] tokens of each slot."""
        pairs = self.tokens * self.top_k
        if self.balance == "exact":
            shape = (num_batches, self.num_layers, self.num_slots)
            return np.full(shape, -(-pairs // self.num_slots))
        if self.balance == "random":
            share_S = np.full(self.num_slots, 1 / self.num_slots)
            return rng.multinomial(pairs, share_S, size=(num_batches, self.num_layers))
        load_LE = self.skew.loads(rng, self.num_layers, self.num_experts)
        slots_LS = self._placement(load_LE)
        load_BLE = load_LE * self._favourites(rng, num_batches, load_LE)
        share_BLS = _share_of_slots(load_BLE, slots_LS)
        return rng.multinomial(pairs, share_BLS)

    def _placement(self, load_LE: FloatArray) -> IntArray:
        if self.balance == "eplb":
            return eplb(load_LE, self.num_slots, self.num_groups, self.num_nodes, self.num_ranks)
        return np.tile(np.arange(self.num_slots) % self.num_experts, (len(load_LE), 1))

    def _favourites(
        self, rng: np.random.Generator, num_batches: int, load_LE: FloatArray
    ) -> FloatArray:
        """[B, L, E] factors of mean 1: what so many prompts leave of their favourites and chance."""
        if self.distinct_prompts is None:
            return np.ones((num_batches, *load_LE.shape))
        chosen_LE = np.minimum(self.top_k * load_LE / load_LE.sum(1, keepdims=True), 0.9)
        chance_LE = (1 - chosen_LE) / (chosen_LE * self.prompt_tokens)
        variance_LE = (np.expm1(PROMPT_JITTER**2) + chance_LE) / self.distinct_prompts
        # Gamma: of mean 1 and this variance, never negative, where an expert is rare too.
        shape_LE = 1 / variance_LE
        return rng.gamma(shape_LE, 1 / shape_LE, size=(num_batches, *load_LE.shape))


def imbalance(slot_tokens_BLS: IntArray, num_ranks: int) -> float:
    """max / mean over ranks, averaged over batches and layers."""
    rank_BLR = slot_tokens_BLS.reshape(*slot_tokens_BLS.shape[:2], num_ranks, -1).sum(axis=3)
    return float((rank_BLR.max(axis=2) / rank_BLR.mean(axis=2)).mean())


def _share_of_slots(load_BLE: FloatArray, slots_LS: IntArray) -> FloatArray:
    """[B, L, S], of sum 1: every expert's load divided evenly over its copies."""
    copies_LE = np.zeros(load_BLE.shape[1:])
    np.add.at(copies_LE, (np.arange(len(slots_LS))[:, None], slots_LS), 1)
    index_BLS = np.broadcast_to(slots_LS, (len(load_BLE), *slots_LS.shape))
    share_BLS = np.take_along_axis(load_BLE / copies_LE, index_BLS, axis=2)
    total_BL1: FloatArray = share_BLS.sum(axis=2, keepdims=True)
    return share_BLS / total_BL1
