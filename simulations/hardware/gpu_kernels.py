# ruff: noqa: ANN001, ANN202  (what Triton compiles has no Python types)
"""Triton kernels of what a layer does besides matrix products, for measuring a GPU.

`mla_decode`: one step of multi-head latent attention over cached latents (flash-decoding: each program
takes one part of one sequence's keys for a block of heads, a second kernel joins the parts). The
others read a row once and write it once.

Legend: B sequences, N query rows of a sequence (heads x query tokens), C latent channels, R rotary
channels, S keys; T rows, H channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LATENT, ROTARY = 512, 64


@dataclass(frozen=True, kw_only=True)
class MlaTiles:
    """How `mla_decode` cuts its work; which is best depends on the GPU and the compiler."""

    heads: int
    keys: int
    warps: int
    stages: int


MLA_TILES = (
    MlaTiles(heads=64, keys=64, warps=8, stages=1),
    MlaTiles(heads=64, keys=64, warps=8, stages=2),
    MlaTiles(heads=64, keys=32, warps=8, stages=2),
    MlaTiles(heads=64, keys=128, warps=8, stages=1),
    MlaTiles(heads=64, keys=64, warps=4, stages=1),
    MlaTiles(heads=64, keys=32, warps=4, stages=2),
    MlaTiles(heads=128, keys=32, warps=8, stages=1),
    MlaTiles(heads=128, keys=64, warps=8, stages=1),
    MlaTiles(heads=16, keys=64, warps=4, stages=2),
    MlaTiles(heads=32, keys=64, warps=4, stages=2),
)


def mla_decode(q_BND: Tensor, kv_BSD: Tensor, scale: float, tiles: MlaTiles) -> Tensor:
    """softmax(scale q k^T) v over all keys, the first C channels of a key being its value: [B, N, C].

    bf16, D = C + R = 576, N a multiple of `tiles.heads`.
    """
    num_sequences, num_rows, _ = q_BND.shape
    num_keys = kv_BSD.shape[1]
    blocks = num_rows // tiles.heads
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    parts = max(1, min(multiprocessors // (num_sequences * blocks), num_keys // (4 * tiles.keys)))
    out_BNC = torch.empty(num_sequences, num_rows, LATENT, device="cuda", dtype=q_BND.dtype)
    partial = torch.empty(
        (num_sequences, parts, num_rows, LATENT) if parts > 1 else (1,), device="cuda"
    )
    peak = torch.empty(num_sequences, parts, num_rows, device="cuda")
    _mla_part[(blocks, parts, num_sequences)](
        q_BND, kv_BSD, out_BNC, partial, peak, num_keys, parts, scale * 1.4426950408889634,
        N=num_rows, C=LATENT, R=ROTARY, HEADS=tiles.heads, KEYS=tiles.keys, WHOLE=parts == 1,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if parts > 1:
        _mla_join[(num_sequences * num_rows,)](partial, peak, out_BNC, parts, N=num_rows, C=LATENT)
    return out_BNC


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mla_part(  # type: ignore[no-untyped-def]
    q, kv, out, partial, peak_out, num_keys, parts, scale,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    part, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    latent, rotary = tl.arange(0, C), C + tl.arange(0, R)
    q_rows = q + (sequence * N + rows)[:, None] * (C + R)
    q_latent = tl.load(q_rows + latent[None, :])
    q_rotary = tl.load(q_rows + rotary[None, :])
    each = tl.cdiv(tl.cdiv(num_keys, KEYS), parts) * KEYS
    first = part * each
    last = tl.minimum(first + each, num_keys)
    peak = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, C], tl.float32)
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        here = keys < last
        kv_rows = kv + (sequence * num_keys + keys)[:, None] * (C + R)
        k_latent = tl.load(kv_rows + latent[None, :], mask=here[:, None], other=0.0)
        k_rotary = tl.load(kv_rows + rotary[None, :], mask=here[:, None], other=0.0)
        scores = tl.dot(q_latent, tl.trans(k_latent))
        scores = tl.dot(q_rotary, tl.trans(k_rotary), scores) * scale
        scores = tl.where(here[None, :], scores, -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(k_latent.dtype), k_latent, acc * shrink[:, None])
        peak = new_peak
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    if WHOLE:
        tl.store(out + (sequence * N + rows)[:, None] * C + latent[None, :], acc.to(tl.bfloat16))
    else:
        row = (sequence * parts + part) * N + rows
        tl.store(partial + row[:, None] * C + latent[None, :], acc)
        tl.store(peak_out + row, peak + tl.log2(tl.maximum(total, 1e-30)))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mla_join(  # type: ignore[no-untyped-def]
    partial, peak, out, parts, N: tl.constexpr, C: tl.constexpr
):
    sequence, row = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    latent = tl.arange(0, C)
    highest = -1e30
    for part in range(parts):
        highest = tl.maximum(highest, tl.load(peak + (sequence * parts + part) * N + row))
    total = 0.0
    acc = tl.zeros([C], tl.float32)
    for part in range(parts):
        at = (sequence * parts + part) * N + row
        weight = tl.exp2(tl.load(peak + at) - highest)
        total += weight
        acc += weight * tl.load(partial + at * C + latent)
    tl.store(out + (sequence * N + row) * C + latent, (acc / total).to(tl.bfloat16))


def rms_norm(x_TH: Tensor, gain_H: Tensor) -> Tensor:
    """bf16 in and out."""
    out_TH = torch.empty_like(x_TH)
    num_rows, channels = x_TH.shape
    block = triton.next_power_of_2(channels)
    _rms_norm[(num_rows,)](x_TH, gain_H, out_TH, H=channels, BLOCK=block, num_warps=8)
    return out_TH


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_norm(x, gain, out, H: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * H
    x_row = tl.load(x + row + at, mask=at < H, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_row * x_row, 0) / H + 1e-6)
    scaled = x_row * inverse * tl.load(gain + at, mask=at < H, other=0.0).to(tl.float32)
    tl.store(out + row + at, scaled.to(tl.bfloat16), mask=at < H)


def quantise(x_TH: Tensor, *, gated: bool = False) -> tuple[Tensor, Tensor]:
    """FP8 rows with one fp32 scale per 128 channels; `gated`: of silu(first half) * second half."""
    num_rows = x_TH.shape[0]
    channels = x_TH.shape[1] // (2 if gated else 1)
    out_TH = torch.empty(num_rows, channels, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.empty(num_rows, channels // 128, device="cuda")
    group = next(g for g in (8, 4, 2, 1) if channels // 128 % g == 0)  # blocks of a program
    _quantise[(num_rows, channels // 128 // group)](
        x_TH, out_TH, scales, H=channels, GROUP=group, GATED=gated, num_warps=4
    )
    return out_TH, scales


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _quantise(x, out, scales, H: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    blocks = first + tl.arange(0, GROUP)
    at = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    if GATED:
        gate = tl.load(x + row * 2 * H + at).to(tl.float32)
        values = gate * tl.sigmoid(gate) * tl.load(x + row * 2 * H + H + at).to(tl.float32)
    else:
        values = tl.load(x + row * H + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-4) / 448.0
    tl.store(out + row * H + at, (values / scale[:, None]).to(out.dtype.element_ty))
    tl.store(scales + row * (H // 128) + blocks, scale)


def choose_experts(
    logits_TE: Tensor, bias_E: Tensor, groups: int, kept: int, k: int
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's choice: (ids_TK, weights_TK); sigmoid, the `kept` groups with the largest sum of
    two best, renormalised. Powers of two only."""
    num_rows, num_experts = logits_TE.shape
    ids_TK = torch.empty(num_rows, k, device="cuda", dtype=torch.int64)
    weights_TK = torch.empty(num_rows, k, device="cuda")
    _choose_experts[(num_rows,)](
        logits_TE, bias_E, ids_TK, weights_TK,
        E=num_experts, G=groups, KEPT=kept, K=k, num_warps=1,
    )  # fmt: skip
    return ids_TK, weights_TK


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _choose_experts(  # type: ignore[no-untyped-def]
    logits, bias, ids, weights,
    E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row, group, inside = tl.program_id(0), tl.arange(0, G), tl.arange(0, E // G)
    at = group[:, None] * (E // G) + inside[None, :]
    scores = tl.sigmoid(tl.load(logits + row * E + at).to(tl.float32))
    choice = scores + tl.load(bias + at)
    best = tl.max(choice, 1)
    others = tl.where(inside[None, :] == tl.argmax(choice, 1)[:, None], -1e30, choice)
    sums = best + tl.max(others, 1)
    ahead = (sums[None, :] > sums[:, None]) | (
        (sums[None, :] == sums[:, None]) & (group[None, :] < group[:, None])
    )
    choice = tl.where(tl.sum(ahead.to(tl.int32), 1)[:, None] < KEPT, choice, -1e30)
    left, flat, number = tl.reshape(choice, [E]), tl.reshape(scores, [E]), tl.arange(0, E)
    place = tl.arange(0, K)
    chosen, chosen_scores = tl.zeros([K], tl.int64), tl.zeros([K], tl.float32)
    for k in tl.static_range(K):
        expert = tl.argmax(left, 0)
        score = tl.sum(tl.where(number == expert, flat, 0.0), 0)
        chosen = tl.where(place == k, expert.to(tl.int64), chosen)
        chosen_scores = tl.where(place == k, score, chosen_scores)
        left = tl.where(number == expert, -1e30, left)
    tl.store(ids + row * K + place, chosen)
    tl.store(weights + row * K + place, chosen_scores / tl.sum(chosen_scores, 0))
