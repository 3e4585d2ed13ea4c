"""Norms, activation, rotation and cache writes: what the CPU modules compute, in fewer launches."""

import pytest
import torch

from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from cluster.model.rope import RopeConfig, RotaryTable
from experts.activation import silu_and_multiply as cpu_silu
from experts.kernels.types import QuantizedRows
from tests.gpu.rows import assert_same_rows, relative_l2

CLOSE = 1.2e-2  # a step of bf16: Triton's interpreter cuts where a GPU rounds


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def bf16(*shape, device):
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def check_norms(device="cpu"):
    from cluster.model.cuda.fused import add_rms_norm, rms_norm, silu_and_multiply
    from experts.kernels.quantize import quantize

    for rows, channels in ((1, 64), (5, 160), (3, 1536)):
        wide, weight = bf16(rows, channels + 32, device=device), bf16(channels, device=device)
        x = wide[:, :channels]
        norm = RmsNorm(weight, 1e-6)
        assert relative_l2(rms_norm(x, weight, 1e-6), norm(x)) < CLOSE
        heads = bf16(rows, 4, channels, device=device)
        assert relative_l2(rms_norm(heads, weight, 1e-6), norm(heads)) < CLOSE
        residual = bf16(rows, channels, device=device)
        got, total = add_rms_norm(x, residual, weight, 1e-6)
        assert relative_l2(total, residual + x) < CLOSE
        assert relative_l2(got, norm(residual + x)) < 2 * CLOSE
        if channels % 128 == 0:  # also quantised in the same launch
            q, q_added = (QuantizedRows.empty(rows, channels, x.device) for _ in range(2))
            assert torch.equal(rms_norm(x, weight, 1e-6, q), rms_norm(x, weight, 1e-6))
            assert_same_rows(q, quantize(rms_norm(x, weight, 1e-6)))
            assert torch.equal(add_rms_norm(x, residual, weight, 1e-6, q_added)[0], got)
            assert_same_rows(q_added, quantize(got))
        gate_up = bf16(rows, 2 * channels, device=device)
        assert relative_l2(silu_and_multiply(gate_up), cpu_silu(gate_up)) < CLOSE


def check_latents(device="cpu"):
    """A slice of the down projection in; cache rows and query slices out, and nothing else written."""
    from cluster.model.cuda.fused import RopeTable, mla_write

    num_tokens, heads, nope, latent, rotary = 5, 3, 32, 96, 16
    for interleaved in (True, False):
        table = RotaryTable(RopeConfig(dim=rotary, theta=1e4, interleaved=interleaved), 64)
        down = bf16(num_tokens, heads * (nope + rotary) + latent + rotary, device=device)
        down[1, heads * (nope + rotary)] = float("inf")
        gain = bf16(latent, device=device)
        positions = torch.tensor([3, 4, 5, 0, 63], device=device)
        slots = torch.tensor([7, 8, 30, 0, 16], device=device)
        cache = torch.full((1, 4, 8, latent + rotary), 9.0, dtype=torch.bfloat16, device=device)
        q = torch.full(
            (num_tokens, heads, latent + rotary), 9.0, dtype=torch.bfloat16, device=device
        )
        query = down[:, : heads * (nope + rotary)].view(num_tokens, heads, -1)
        rows = down[:, heads * (nope + rotary) :]
        mla_write(
            query, rows, gain, 1e-6, RopeTable.of(table, 64, torch.device(device)),
            positions, slots, cache, q,
        )  # fmt: skip
        rotated = table.at(positions.cpu())(
            torch.cat([query[..., nope:], rows[:, None, latent:]], 1).cpu()
        )
        want = torch.cat([RmsNorm(gain, 1e-6)(rows[:, :latent]).cpu(), rotated[:, -1]], -1)
        other = torch.full((1, 4, 8, latent + rotary), 9.0, dtype=torch.bfloat16)
        LayerCache(keys=other, values=other).write(slots.cpu(), want.unsqueeze(1))
        assert bool(cache.isfinite().all())
        fine = [0, 2, 3, 4]  # the second row is broken, and only finite
        flat = cache.flatten(1, 2)[0].cpu()
        assert (
            relative_l2(flat[slots.cpu()[fine]], other.flatten(1, 2)[0][slots.cpu()[fine]]) < CLOSE
        )
        untouched = torch.ones(32, dtype=torch.bool)
        untouched[slots.cpu()] = False
        assert (flat[untouched] == 9).all()
        assert relative_l2(q[..., latent:].cpu(), rotated[:, :-1]) < CLOSE
        assert (q[..., :latent] == 9).all()


def check_grouped(device="cpu"):
    from cluster.model.cuda.fused import RopeTable, gqa_write

    num_tokens, heads, kv_heads, dim = 4, 6, 2, 32
    positions = torch.tensor([0, 9, 10, 31], device=device)
    slots = torch.tensor([3, 20, 21, 8], device=device)
    for interleaved, normed in ((False, True), (True, False)):
        table = RotaryTable(RopeConfig(dim=dim, theta=1e4, interleaved=interleaved), 32)
        qkv = bf16(num_tokens, (heads + 2 * kv_heads) * dim, device=device)
        qkv[0, -1] = float("nan")
        gains = [bf16(dim, device=device) if normed else None for _ in range(2)]
        keys = torch.zeros(kv_heads, 4, 8, dim, dtype=torch.bfloat16, device=device)
        values = torch.zeros_like(keys)
        got = gqa_write(
            qkv, heads, *gains, 1e-6, RopeTable.of(table, 32, torch.device(device)),
            positions, slots, keys, values,
        )  # fmt: skip
        q, k, v = qkv.cpu().view(num_tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
        if normed:
            q, k = (RmsNorm(g.cpu(), 1e-6)(x) for g, x in zip(gains, (q, k), strict=True))
        rotation = table.at(positions.cpu())
        cpu = LayerCache(keys=torch.zeros_like(keys.cpu()), values=torch.zeros_like(keys.cpu()))
        cpu.write(slots.cpu(), rotation(k), v)
        assert relative_l2(got.cpu(), rotation(q)) < 2 * CLOSE
        at = slots.cpu()
        assert (
            relative_l2(keys.flatten(1, 2)[:, at].cpu(), cpu.keys.flatten(1, 2)[:, at]) < 2 * CLOSE
        )
        assert torch.equal(values.cpu(), cpu.values)


CHECKS = ("check_norms", "check_latents", "check_grouped")


def check_interpreted():
    torch.manual_seed(0)
    for check in CHECKS:
        globals()[check]()


def test_it_is_the_cpu_modules_as_interpreted(interpreted):
    interpreted("tests.gpu.test_fused:check_interpreted")


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_the_cpu_modules(cuda, check):
    globals()[check](cuda)


def test_rows_of_a_norm_do_not_depend_on_their_batch(cuda):
    from cluster.model.cuda.fused import add_rms_norm, rms_norm

    x, residual, weight = (bf16(*s, device=cuda) for s in ((300, 2048), (300, 2048), (2048,)))
    whole, (added, total) = rms_norm(x, weight, 1e-6), add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x)
    for size in (1, 2, 17, 64):
        assert torch.equal(rms_norm(x[:size], weight, 1e-6), whole[:size])
        assert torch.equal(add_rms_norm(x[:size], residual[:size], weight, 1e-6)[0], added[:size])
    assert torch.equal(rms_norm(total, weight, 1e-6), added)
