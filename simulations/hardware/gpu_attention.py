"""Attention of whole prompts by PyTorch: keys of 192 channels, values of 128, as in DeepSeek's models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from simulations.hardware.gpu_products import spread
from simulations.hardware.gpu_timing import Timing, seconds_of
from simulations.hardware.tables import table_json

_BF16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def prefill_tables(num_heads: int, prompts: Sequence[int]) -> dict[str, Any]:
    """One table over "tokens": causal attention of one prompt."""
    run, backend = _best_prefill(num_heads)
    times = [run(tokens) for tokens in prompts]
    table = table_json(
        {"tokens": prompts}, [t.p50 for t in times], p99_over_p50=spread(times), kernel=backend
    )
    return {f"attention_prefill/{num_heads}x{192 + 128}": table}


def _best_prefill(num_heads: int) -> tuple[Callable[[int], Timing], str]:
    """cuDNN takes values narrower than keys; flash attention gets them padded."""

    def seconds(backend: SDPBackend, value_dim: int, tokens: int) -> Timing:
        q, k = (torch.randn(1, num_heads, tokens, 192, **_BF16) for _ in range(2))
        v = torch.randn(1, num_heads, tokens, value_dim, **_BF16)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return seconds_of([call])

    found = {}
    for name, backend, value_dim in (
        ("SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION, 128),
        ("SDPA, flash, values padded to 192", SDPBackend.FLASH_ATTENTION, 192),
    ):
        try:
            found[name] = seconds(backend, value_dim, 4096).p50, backend, value_dim
        except RuntimeError:
            torch.cuda.synchronize()
    name = min(found, key=lambda name: found[name][0])
    _, backend, value_dim = found[name]
    return lambda tokens: seconds(backend, value_dim, tokens), name
