"""A whole model on one GPU, with random weights, beside the floor of the memory and transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.model.cuda.transformer import Quantization
from simulations.bench.decode_compile import compile_kernels
from simulations.bench.model_on_gpu import ModelBench
from simulations.hardware.gpu_rows import memory_bandwidth
from simulations.hardware.gpu_timing import ClockLog, warm_up
from simulations.presets import load_model


def run(
    preset: str = "deepseek-v2-lite",
    *,
    quantizations: Sequence[Quantization] = (None, "fp8"),
    batches: Sequence[int] = (1, 16, 128, 512),
    context: int = 128,
    prefill: tuple[int, int] = (4, 2048),
    profile: Path | None = None,
    stock: Callable[[], dict[str, Any]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """{"device", "copy_bytes_per_s", "results": {"bfloat16" | "fp8": {"decode": {batch: ...}, ...}}}.

    decode: step_ms, tokens_per_s, floor_ms, over_floor, served_ms, experts (that are read, mean of layers);
    prefill: tokens, ms, tokens_per_s. `profile`: a folder for tables of kernels by time. `stock` measures
    another library on the same device and shapes, after our memory is free.
    """
    say("compiling kernels")
    compile_kernels(preset, quantizations, batches, context, prefill)
    config = load_model(preset)
    warm_up()
    bandwidth = memory_bandwidth()["write"]
    of_models: dict[str, Any] = {}
    report: dict[str, Any] = {
        "model": preset,
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": bandwidth,
        "context": context,
        "results": of_models,
    }
    torch.cuda.empty_cache()
    with ClockLog() as clock:
        for quantization in quantizations:
            name = quantization or "bfloat16"
            bench = ModelBench(config, quantization, bandwidth)
            say(f"{name}: {bench.bytes_read() / 1e9:.2f} GB of weights besides experts")
            decode: dict[str, Any] = {}
            results = {"decode": decode, "prefill": bench.prefill(*prefill)}
            say(f"{name} prefill: {results['prefill']}")
            of_models[name] = {**results, "memory": bench.memory()}
            for batch in batches:
                table = profile and profile / f"decode_{name}_{batch}.txt"
                decode[str(batch)] = row = bench.decode(batch, context, table)
                say(f"{name} decode {batch}: {row}")
            del bench
            gc.collect()
            torch.cuda.empty_cache()
    report["clock"] = clock.summary()
    if stock is not None:
        of_models["stock"] = stock()
    return report
