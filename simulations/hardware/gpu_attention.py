"""Attention of a GPU: multi-head latent attention in decode (our Triton kernel) and prefill (SDPA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from simulations.hardware.gpu_kernels import LATENT, MLA_TILES, ROTARY, MlaTiles, mla_decode
from simulations.hardware.gpu_products import spread
from simulations.hardware.gpu_timing import Call, Timing, copies_of, seconds_of
from simulations.hardware.tables import table_json

MOST_KEYS = 1 << 23  # of all sequences together: 10 GB of latents
SCALE = (128 + 64) ** -0.5


class MlaDecode:
    """One decode step of all heads, with the tiles that this GPU runs fastest at a middling size."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.tried: dict[str, float] = {}
        self.tiles = self._best_tiles()

    def tables(
        self, sequences: Sequence[int], contexts: Sequence[int], queries: int = 1
    ) -> dict[str, Any]:
        """One table, axes "sequences" and "context"; sizes beyond 8 M keys are computed from half the keys."""
        times = {(b, s): self.seconds(b, s, queries) for b in sequences for s in contexts
                 if b * s <= MOST_KEYS}  # fmt: skip

        def value(b: int, s: int) -> float:
            return times[b, s].p50 if (b, s) in times else 2 * value(b // 2, s)

        table = table_json(
            {"sequences": sequences, "context": contexts},
            [[value(b, s) for s in contexts] for b in sequences],
            p99_over_p50=spread(times.values()),
            kernel=f"Triton flash-decoding, bfloat16 latents, {self.tiles}",
        )
        suffix = "" if queries == 1 else f"/{queries}_queries"
        return {f"mla_decode/bfloat16/{self.num_heads}x{LATENT + ROTARY}{suffix}": table}

    def seconds(self, num_sequences: int, context: int, queries: int = 1) -> Timing:
        shape = (num_sequences, context, LATENT + ROTARY)
        q = torch.randn(num_sequences, self.num_heads * queries, LATENT + ROTARY, **_BF16)
        caches = copies_of(lambda: torch.randn(shape, **_BF16), 2.0 * num_sequences * context * 576)
        tiles = self.tiles
        return seconds_of([lambda kv=kv: mla_decode(q, kv, SCALE, tiles) for kv in caches])  # type: ignore[misc]

    def error(self) -> float:
        """Relative L2 distance from attention in float32, at an uneven size."""
        q, kv = torch.randn(3, self.num_heads, 576, **_BF16), torch.randn(3, 1000, 576, **_BF16)
        weights = torch.softmax(SCALE * q.float() @ kv.float().mT, dim=-1)
        expected = weights @ kv[..., :LATENT].float()
        found = mla_decode(q, kv, SCALE, self.tiles).float()
        return float((found - expected).norm() / expected.norm())

    def _best_tiles(self) -> MlaTiles:
        found: dict[MlaTiles, float] = {}
        for tiles in MLA_TILES:
            if self.num_heads % tiles.heads:
                continue
            self.tiles = tiles
            try:
                found[tiles] = self.seconds(128, 4096).p50
            except Exception as error:
                if "out of resource" not in str(error):
                    raise
        self.tried = {str(tiles): float(f"{seconds:.4g}") for tiles, seconds in found.items()}
        return min(found, key=lambda tiles: found[tiles])

    def work(self) -> Call:
        """A ready call of a typical size, to be run beside something else."""
        q = torch.randn(64, self.num_heads, LATENT + ROTARY, **_BF16)
        kv = torch.randn(64, 4096, LATENT + ROTARY, **_BF16)
        return lambda: mla_decode(q, kv, SCALE, self.tiles)


_BF16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def prefill_tables(num_heads: int, prompts: Sequence[int]) -> dict[str, Any]:
    """One table over "tokens": causal attention of one prompt, keys of 192 channels, values of 128."""
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
