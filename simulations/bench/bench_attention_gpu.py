"""Dense products and paged attention on this GPU: time, share of the floor, the library beside them.

    python -m simulations.bench.bench_attention_gpu

Products: DeepSeek-V2-Lite's and V3's weights, weights from memory (copies that exceed the L2 cache),
beside torch's (cuBLAS), whose rows may depend on their batch. Attention over cached latents: achieved
bandwidth of the cache, and rate of the absorbed arithmetic.

Legend: T tokens, O output and I input channels, N heads, D channels of a query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.model.cuda.attention import AttentionMeta, paged_attention
from experts.kernels.linear import linear
from experts.kernels.quantize import quantize
from simulations.hardware.gpu_timing import copies_of, seconds_of, warm_up

WEIGHTS = (
    (2048, 2048),
    (3648, 2048),
    (5632, 2048),
    (2048, 2816),
    (2048, 10944),
    (102400, 2048),
    (2112, 7168),
    (24576, 1536),
    (7168, 2048),
    (7168, 16384),
)
TOKENS = (1, 16, 64, 128, 512, 4096)
LATENT, ROTARY, BLOCK_SIZE, MOST_KEYS = 512, 64, 16, 4096
STEPS = (  # heads, sequences, keys each, queries of each
    (16, 1, 128, 1),
    (16, 1, 4000, 1),
    (16, 128, 256, 1),
    (16, 512, 256, 1),
    (16, 128, 2048, 1),
    (16, 8, 1024, 1024),
    (16, 4, 2048, 2048),
    (128, 64, 4000, 1),
    (128, 1, 2048, 1024),
)


def main() -> None:
    warm_up()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s")
    for outputs, inputs in WEIGHTS:
        for num_tokens in TOKENS if outputs < 50_000 else TOKENS[:4]:
            print(product_line(num_tokens, outputs, inputs, bandwidth), flush=True)
    for heads, sequences, keys, queries in STEPS:
        call, num_bytes, flops = attention_step(heads, sequences, keys, queries)
        seconds = seconds_of([call]).p50
        print(
            f"attention, {heads} heads, {sequences} x {queries} queries, {keys} keys: "
            f"{seconds * 1e6:8.1f} us, {num_bytes / seconds / 1e12:.2f} TB/s, "
            f"{flops / seconds / 1e12:.0f} TFLOP/s",
            flush=True,
        )


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of([lambda: target.copy_(source)]).p50


def product_line(num_tokens: int, outputs: int, inputs: int, bandwidth: float) -> str:
    def weight() -> Tensor:
        return torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)

    x_TI = torch.randn(num_tokens, inputs, device="cuda", dtype=torch.bfloat16)
    wide = copies_of(weight, outputs * inputs * 2)
    narrow = [w.to(torch.float8_e4m3fn) for w in wide]
    scale = torch.rand(-(-outputs // 128), -(-inputs // 128), device="cuda")
    rows = quantize(F.pad(x_TI, (0, -inputs % 128)).contiguous())

    def timed(calls: list[Callable[[], object]], num_bytes: float) -> str:
        seconds = seconds_of(calls).p50
        floor = num_bytes / bandwidth / seconds
        rate = 2 * num_tokens * outputs * inputs / seconds / 1e12
        return f"{seconds * 1e6:8.1f} us {floor:4.0%} of the bandwidth {rate:4.0f} TFLOP/s"

    num_weights = outputs * inputs
    torchs = timed([lambda w=w: F.linear(x_TI, w) for w in wide], 2 * num_weights)  # type: ignore[misc]
    ours = timed([lambda w=w: linear(x_TI, w) for w in wide], 2 * num_weights)  # type: ignore[misc]
    float8 = timed([lambda w=w: linear(rows, w, scale) for w in narrow], num_weights)  # type: ignore[misc]
    return (
        f"{outputs} x {inputs}, {num_tokens:5d} tokens: bf16 {ours}, cuBLAS {torchs}, e4m3 {float8}"
    )


def attention_step(
    heads: int, sequences: int, keys: int, queries: int
) -> tuple[Callable[[], Tensor], float, float]:
    """The call, the bytes of cache, queries and outputs it must move, its floating-point operations."""
    blocks = -(-keys // BLOCK_SIZE)
    tables = torch.zeros(sequences, MOST_KEYS // BLOCK_SIZE, dtype=torch.int32, device="cuda")
    places = torch.randperm(sequences * blocks, device="cuda").int()
    tables[:, :blocks] = places.view(sequences, blocks)
    cache = torch.randn(
        1, sequences * blocks, BLOCK_SIZE, LATENT + ROTARY, device="cuda", dtype=torch.bfloat16
    )
    positions = torch.arange(keys - queries, keys, device="cuda").int().repeat(sequences)
    sequence = torch.arange(sequences, device="cuda").int().repeat_interleave(queries)
    q_TND = torch.randn(len(positions), heads, LATENT + ROTARY, device="cuda", dtype=torch.bfloat16)
    meta = AttentionMeta(positions_T=positions, sequence_T=sequence, block_tables_SB=tables)
    pairs = float((positions + 1).sum())
    return (
        lambda: paged_attention(q_TND, cache, cache, meta, 0.05, LATENT),
        cache.nbytes + q_TND.nbytes * (1 + LATENT / (LATENT + ROTARY)),
        2 * heads * pairs * (2 * LATENT + ROTARY),
    )


if __name__ == "__main__":
    main()
