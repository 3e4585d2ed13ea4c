"""Greedy decoding of a few sequences by any of the models, step by step, as the engine would."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.model.config import ModelConfig
from deploy.settings import BUNDLED_MODELS
from router.placement import Placement
from tests.model.solo import make_batch, solo_groups

BLOCK_SIZE = 16
BLOCKS = 24
"""Of each sequence."""
MOSAIC = BUNDLED_MODELS["mosaic"]
TEXTS = (
    "It is a truth universally acknowledged, that a single man",
    "話說天下大勢，分久必合，合久必分。",
    "def quicksort(items):\n    if len(items) <= 1:\n",
    "37 + 48 = ",
)


@dataclass(kw_only=True)
class Sequence:
    """`first`: of its blocks. `logits` [V] of each token that was chosen, on the host."""

    ids: list[int]
    first: int
    wanted: int
    chunk: int = 1 << 20
    done: int = 0
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def decode(model, kv, sequences: list[Sequence]) -> list[Sequence]:
    """Until all have the tokens they want; each computes a chunk of its prompt, or a token, a step."""
    while live := [s for s in sequences if len(s.tokens) < s.wanted]:
        parts, ends = [], []
        for s in live:
            new = s.ids[s.done : s.done + s.chunk]
            ends.append(s.done + len(new) == len(s.ids))
            table = torch.arange(s.first, s.first + BLOCKS)
            parts.append((new, s.done, table, [len(new) - 1] if ends[-1] else []))
            s.done += len(new)
        logits = model.forward(make_batch(parts, BLOCK_SIZE), kv)
        chosen = iter(zip(logits.argmax(1).tolist(), logits.cpu(), strict=True))
        for s, at_end in zip(live, ends, strict=True):
            if at_end:
                token, row_V = next(chosen)
                s.tokens.append(token)
                s.logits.append(row_V.clone())
                s.ids.append(token)
    return sequences


def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MOSAIC / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def load_on(device: torch.device, directory=MOSAIC, combine: str = "fixed"):
    """The model on a GPU."""
    from cluster.config import CommsConfig
    from cluster.model.cuda.transformer import CudaTransformer

    config = ModelConfig.from_dir(directory)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    return CudaTransformer.load(
        directory, config, solo_groups(), placement, CommsConfig(combine=combine), device=device
    )
