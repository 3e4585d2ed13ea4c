"""Runs of `mosaic` to record: requests of one subject after the other, and small clusters."""

from typing import Any

from tokenizers import Tokenizer

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.mailbox import Frame
from cluster.engine.sampling_params import SamplingParams
from deploy.models.domain_prompts import DOMAIN_PROMPTS
from deploy.settings import BUNDLED_MODELS
from simulations.twin.noted import Arrival

MOSAIC = BUNDLED_MODELS["mosaic"]
REQUESTS, NUM_TOKENS = 20, 20
"""Of the run that most tests look at."""


def frames(count: int, max_tokens: int) -> list[Frame]:
    tokenizer = Tokenizer.from_file(str(MOSAIC / "tokenizer.json"))
    texts = [text for of_domain in DOMAIN_PROMPTS.values() for text in of_domain]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [
        offline.add_frame(f"r{i}", tokenizer.encode(texts[i % len(texts)]).ids, params)
        for i in range(count)
    ]


def arrivals(count: int, max_tokens: int) -> list[Arrival]:
    """One every three iterations, so that steps differ in what they mix."""
    return [Arrival(3 * i, frame) for i, frame in enumerate(frames(count, max_tokens))]


def config_of(**sections: Any) -> ServeConfig:
    """2 nodes x 2 ranks with four redundant experts, unless a section says otherwise."""
    defaults: dict[str, Any] = {
        "parallel": {"num_nodes": 2, "ranks_per_node": 2},
        "experts": {"num_redundant_experts": 4, "split": "balanced"},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 16},
        "cache": {"block_size": 16, "num_blocks": 64},
    }
    return ServeConfig.from_dict({"model": str(MOSAIC), **defaults, **sections})
