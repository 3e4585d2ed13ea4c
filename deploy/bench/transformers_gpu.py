"""How fast `transformers` runs the same shapes on the same GPU: decode steps and prefill."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from simulations import presets

STEPS = 8


def stock_speed(
    preset: str,
    batches: Sequence[int],
    context: int = 128,
    prefill: tuple[int, int] = (4, 2048),
    budget_s: float = 120.0,
) -> dict[str, Any]:
    """The same figures of transformers on this GPU: random weights in bfloat16, grouped products for the
    experts. Batches that would begin after `budget_s` are left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    began = perf_counter()
    file = Path(presets.__file__).parent / "presets" / f"{preset}.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        ).eval()
    decode: dict[str, Any] = {}
    results: dict[str, Any] = {"decode": decode, "load_s": perf_counter() - began}

    def ids(number: int, length: int) -> Any:
        return torch.randint(0, config.vocab_size, (number, length), device="cuda")

    with torch.inference_mode():
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = perf_counter()
            model(ids(*prefill), use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            times.append(perf_counter() - start)
        tokens, seconds = prefill[0] * prefill[1], min(times)
        results["prefill"] = {
            "tokens": tokens,
            "ms": 1000 * seconds,
            "tokens_per_s": tokens / seconds,
        }
        for batch in batches:
            if perf_counter() - began > budget_s:
                break
            out = model(ids(batch, context), use_cache=True, logits_to_keep=1)
            times = []
            for _ in range(STEPS):
                start = perf_counter()
                chosen = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
                torch.cuda.synchronize()
                times.append(perf_counter() - start)
            step_s = float(np.median(times[2:]))
            decode[str(batch)] = {"step_ms": 1000 * step_s, "tokens_per_s": batch / step_s}
            del out
            gc.collect()
    return results
