"""Evaluates a checkpoint and writes evaluation.json and the model card from it."""

import json
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM

from deploy.models.card_text import CARD
from deploy.models.corpus import DOMAINS
from deploy.models.evaluate import complete, evaluate_split, load_model
from deploy.models.greedy import continue_greedily, repeats
from deploy.models.prepare import baselines
from deploy.models.prompts import DEMO_PROMPTS

SAMPLE_TOKENS = 96
LOOP_PROMPTS, LOOP_PROMPT_TOKENS, LOOP_TOKENS = 32, 24, 96
LOOP_SHARE = 0.5  # a continuation loops when over half of its tokens repeat an n-gram of the row

Report = dict[str, Any]


def write_evaluation(directory: Path, checkpoint: Path, device: torch.device) -> Report:
    """Held-out bits per byte, load and greedy samples; needs the prepared `directory`."""
    model = load_model(checkpoint, device)
    report: Report = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, fp32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": json.loads((checkpoint / "training.json").read_text()),
        "baseline": baselines(directory),
        "test": evaluate_split(model, directory, "test", device),
        "greedy": greedy_loops(model, directory, device),
    }
    report["load"] = load_summary(report["test"])
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    report["samples"] = [
        {
            "domain": p.domain,
            "prompt": p.text,
            "text": complete(model, tokenizer, p.text, SAMPLE_TOKENS),
        }
        for p in DEMO_PROMPTS
    ]
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    (checkpoint / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (checkpoint / "README.md").write_text(render(report), encoding="utf-8")
    for domain in DOMAINS:
        print(_score_row(report, domain), flush=True)
    return report


def load_summary(test: Report) -> Report:
    """Per layer: imbalance (max/mean) and smallest share by domain, distances between domains."""
    summary: Report = {}
    for layer in test[DOMAINS[0]]["expert_load"]:
        share = {}
        for domain in DOMAINS:
            count_E = np.array(test[domain]["expert_load"][layer], dtype=np.float64)
            share[domain] = count_E / count_E.sum()
        mean_E = np.mean(list(share.values()), axis=0)
        size = len(mean_E)
        summary[layer] = {
            "imbalance": {d: float(share[d].max() * size) for d in DOMAINS},
            "imbalance_all": float(mean_E.max() * size),
            "smallest_all": float(mean_E.min() * size),
            "distance": {
                f"{a}-{b}": float(np.abs(share[a] - share[b]).sum() / 2)
                for a, b in combinations(DOMAINS, 2)
            },
        }
    return summary


def greedy_loops(model: DeepseekV3ForCausalLM, directory: Path, device: torch.device) -> Report:
    """Share of held-out prompts, cut anywhere, whose greedy continuation falls into a loop."""
    streams = np.load(directory / "tokens.npz")
    result: Report = {}
    for idx, domain in enumerate(DOMAINS):
        stream = streams[f"test_{domain}"]
        starts = np.linspace(0, len(stream) - LOOP_PROMPT_TOKENS, LOOP_PROMPTS).astype(np.int64)
        rows = np.stack([stream[s : s + LOOP_PROMPT_TOKENS] for s in starts]).astype(np.int64)
        ids_NL = continue_greedily(model, torch.from_numpy(rows).to(device), LOOP_TOKENS)
        domain_N = torch.full((len(rows),), idx, device=device)
        repeated_NL = repeats(ids_NL, domain_N, LOOP_PROMPT_TOKENS)[:, LOOP_PROMPT_TOKENS:]
        share_N = repeated_NL.float().mean(dim=1)
        result[domain] = {
            "repeated_share": float(share_N.mean()),
            "looping": float((share_N > LOOP_SHARE).float().mean()),
        }
    return result


def render(report: Report) -> str:
    """The model card as Markdown."""
    training = report["training"]
    settings = training["settings"]
    flags = " ".join(
        f"--{name.replace('_', '-')} {settings[name]}" for name in ("minutes", "dropout", "seed")
    )
    return CARD.format(
        date=training["date"],
        parameters=f"{report['parameters'] / 1e6:.1f}",
        scores="\n".join(_score_row(report, domain) for domain in DOMAINS),
        loads="\n".join(_load_row(layer, facts) for layer, facts in report["load"].items()),
        distances="\n".join(_distance_row(layer, facts) for layer, facts in report["load"].items()),
        loops="\n".join(
            f"| {d} | {v['looping']:.0%} | {v['repeated_share']:.0%} |"
            for d, v in report["greedy"].items()
        ),
        samples="\n\n".join(_sample(sample) for sample in report["samples"]),
        flags=flags,
        steps=training["steps"],
        tokens=f"{training['tokens'] / 1e6:.0f}",
        minutes=training["minutes"],
        hardware=training["hardware"],
        versions=", ".join(f"{k} {v}" for k, v in training["versions"].items()),
        evaluated_on=report["device"],
    )


def _score_row(report: Report, domain: str) -> str:
    facts, base = report["test"][domain], report["baseline"][domain]
    return (
        f"| {domain} | {facts['bytes']:,} | {facts['bits_per_byte']:.3f} | {base['bytes']:.3f} "
        f"| {base['tokens']:.3f} |"
    )


def _load_row(layer: str, facts: Report) -> str:
    cells = " | ".join(f"{facts['imbalance'][domain]:.2f}" for domain in DOMAINS)
    return f"| {layer} | {cells} | {facts['imbalance_all']:.2f} | {facts['smallest_all']:.2f} |"


def _distance_row(layer: str, facts: Report) -> str:
    return f"| {layer} | " + " | ".join(f"{v:.2f}" for v in facts["distance"].values()) + " |"


def _sample(sample: Report) -> str:
    return (
        f"**{sample['domain']}**, prompt `{sample['prompt']!r}`:\n\n"
        f"````text\n{sample['prompt']}{sample['text']}\n````"
    )
