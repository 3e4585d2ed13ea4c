"""`expertmesh verify`: is this checkpoint, on this engine, what transformers says it is?

transformers computes the reference in one process, in fp32 with eager attention; then each layout
runs as real ranks on this machine. Compared are the logits after every position of the prompts and
greedy tokens.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster import offline
from cluster.config import ConfigError, ServeConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.model.config import ModelConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from comms.launch import RankPool
from deploy.json_file import write_json

MAX_LOGIT_DIFF = 1e-4
PROMPT_LENGTHS = (5, 17, 48)
PROMPT_SEED = 20_240
TIMEOUT_S = 1800.0


def verify_command(directory: Path, layouts: str, num_tokens: int, json_file: Path | None) -> int:
    """Print and write the comparison; 0 when all layouts agree, 1 when not, 2 for bad input."""
    try:
        report = verify(directory, _parse_layouts(layouts), num_tokens)
    except (ConfigError, UnsupportedModelError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError:
        print("verify needs transformers: pip install 'expertmesh[verify]'", file=sys.stderr)
        return 2
    table = Table("layout", "max |logit diff|", f"{num_tokens} greedy tokens")
    for layout, row in report["results"].items():
        equal = "equal" if row["tokens_equal"] else "DIFFERENT"
        table.add_row(layout, f"{row['max_abs_logit_diff']:.1e}", equal)
    Console().print(table)
    write_json(json_file, report)
    agree = all(
        row["tokens_equal"] and row["max_abs_logit_diff"] <= MAX_LOGIT_DIFF
        for row in report["results"].values()
    )
    return 0 if agree else 1


def verify(directory: Path, layouts: Sequence[tuple[int, int]], num_tokens: int) -> dict[str, Any]:
    """Compare a checkpoint directory with transformers on each (nodes, ranks per node).

    Returns {"model", "results": {"NxR": {"max_abs_logit_diff", "tokens_equal"}}}. Prompts are
    random token ids, so a directory without a tokenizer is fine.
    """
    model_config = ModelConfig.from_dir(directory)
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    prompts = [
        torch.randint(model_config.vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    console = Console(stderr=True)
    with console.status("transformers computes the reference ..."):
        reference = reference_outputs(directory, prompts, num_tokens)
    results: dict[str, Any] = {}
    with RankPool(max(nodes * ranks for nodes, ranks in layouts)) as pool:
        for nodes, ranks in layouts:
            with console.status(f"{nodes}x{ranks} ..."):
                results[f"{nodes}x{ranks}"] = _compare(
                    pool, directory, (nodes, ranks), prompts, num_tokens, reference
                )
    return {"model": str(directory), "tokens": num_tokens, "results": results}


def reference_outputs(
    directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[tuple[Tensor, list[int]]]:
    """transformers' logits [len(prompt), V] in fp32 and greedy continuation of each prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None  # we compare `num_tokens` tokens, whatever they are
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            logits = model(tokens).logits[0]
            generated = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        outputs.append((logits, generated[0, len(prompt) :].tolist()))
    return outputs


def _compare(
    pool: RankPool,
    directory: Path,
    layout: tuple[int, int],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    reference: Sequence[tuple[Tensor, list[int]]],
) -> dict[str, Any]:
    nodes, ranks = layout
    config = ServeConfig.from_dict(
        {
            "model": str(directory),
            "dtype": "float32",
            "parallel": {"num_nodes": nodes, "ranks_per_node": ranks},
        }
    )
    topology = config.parallel.topology
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    requests = [offline.add_frame(str(idx), p, params) for idx, p in enumerate(prompts)]
    logits = pool.run(offline.prefill_logits, topology, config, prompts, timeout_s=TIMEOUT_S)[0]
    parts = pool.run(offline.generate, topology, config, requests, timeout_s=TIMEOUT_S)
    tokens = {request_id: ids for part in parts for request_id, ids in part.items()}
    return {
        "max_abs_logit_diff": max(
            float((ours - expected).abs().max())
            for ours, (expected, _) in zip(logits, reference, strict=True)
        ),
        "tokens_equal": all(
            tokens[str(idx)] == expected for idx, (_, expected) in enumerate(reference)
        ),
    }


def _parse_layouts(text: str) -> list[tuple[int, int]]:
    layouts = []
    for part in text.split(","):
        nodes, cross, ranks = part.strip().partition("x")
        if not (cross and nodes.isdigit() and ranks.isdigit() and int(nodes) and int(ranks)):
            raise ValueError(f"--layouts {text!r}: expected nodes x ranks such as 1x1,2x2")
        layouts.append((int(nodes), int(ranks)))
    return layouts
