"""The main training run: next-token loss on all domains, light balance, a loss against loops."""

import json
import math
import platform
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import DeepseekV3ForCausalLM

from deploy.models.architecture import (
    add_dropout,
    build_model,
    gates,
    mosaic_config,
    save_checkpoint,
)
from deploy.models.balance import LoadBalancer
from deploy.models.evaluate import evaluate_split
from deploy.models.optimizer import MasterAdamW
from deploy.models.repetition import fading_loss, looped_rows
from deploy.models.sampler import LENGTHS, TrainConfig, WindowSampler

LOOP_LENGTH = 512


def train(directory: Path, out: Path, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Trains on the prepared `directory`, writes the checkpoint to `out`, returns the facts."""
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    vocab_size = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    shape = mosaic_config(vocab_size, tokenizer_config["model_max_length"])
    model = build_model(shape, device, config.seed)
    add_dropout(model, config.dropout)
    balancer = LoadBalancer(gates(model), config.balance_step, config.balance_band)
    optimizer = MasterAdamW(model, config.weight_decay)
    sampler = WindowSampler(directory, config, device)
    print(f"{sum(p.numel() for p in optimizer.params):,} parameters on {device}", flush=True)
    started, step, tokens, history = time.monotonic(), 0, 0, []
    progress = 0.0
    model.train()
    while progress < 1.0:
        length = LENGTHS[step % len(LENGTHS)]
        loss = next_token_loss(model, sampler.batch(config.batch_tokens // length, length))
        loss.backward()
        if progress < config.balance_until:
            balancer.update()
        if config.loop_rows and progress >= config.loop_from:
            (config.loop_weight * _loop_loss(model, sampler, config)).backward()
        optimizer.step(learning_rate_at(step, progress, config))
        step += 1
        tokens += config.batch_tokens
        seconds = time.monotonic() - started
        progress = max(step / config.steps, seconds / (60 * config.minutes))
        if step % 100 == 0:
            print(
                f"step {step:5} {progress:4.0%} loss {loss.item():.3f} "
                f"{tokens / seconds / 1e3:.0f}k tokens/s",
                flush=True,
            )
        if step % max(config.steps // 8, 1) == 0:
            bits = validate(model, directory, device)
            history.append({"step": step, **bits})
            print(f"step {step:5} valid {bits}", flush=True)
    balancer.round_biases()
    save_checkpoint(model, shape, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, out / name)
    facts = {
        **_run_facts(config, device),
        "steps": step,
        "tokens": tokens,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "valid_final": validate(model, directory, device),
        "valid_history": history,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _run_facts(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "settings": asdict(config),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def next_token_loss(model: DeepseekV3ForCausalLM, ids_NT: torch.Tensor) -> torch.Tensor:
    hidden_NTH = model.model(input_ids=ids_NT[:, :-1], use_cache=False).last_hidden_state
    logits_PV = model.lm_head(hidden_NTH.flatten(0, 1)).float()
    return nn.functional.cross_entropy(logits_PV, ids_NT[:, 1:].flatten())


def _loop_loss(
    model: DeepseekV3ForCausalLM, sampler: WindowSampler, config: TrainConfig
) -> torch.Tensor:
    real_NT = sampler.batch(config.loop_rows, LOOP_LENGTH)
    ids_NT, period_N, first_N = looped_rows(real_NT, sampler.generator)
    logits_NTV = model(input_ids=ids_NT[:, :-1], use_cache=False).logits.float()
    return fading_loss(logits_NTV, ids_NT, period_N, first_N)


def learning_rate_at(step: int, progress: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero over the whole run."""
    warm = min((step + 1) / config.warmup_steps, 1.0)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def validate(
    model: DeepseekV3ForCausalLM, directory: Path, device: torch.device
) -> dict[str, float]:
    """Bits per byte of the valid split by domain."""
    model.eval()
    result = evaluate_split(model, directory, "valid", device)
    model.train()
    return {domain: round(facts["bits_per_byte"], 4) for domain, facts in result.items()}
