"""Grouped experts against a dense fp64 SwiGLU, and pair by pair against themselves alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experts.activation import silu_and_multiply
from experts.grouped import run_experts
from experts.mlp import GatedMLP
from experts.weights import ExpertSlots

# Largest relative L2 error of a row (all zeros: 1). BF16 rounds three times, 2e-3 each on average,
# and a row whose sums cancel shows a few times that.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_slots(num_slots, hidden, intermediate, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = ExpertSlots(num_slots, hidden, intermediate, dtype)
    for slot in range(num_slots):
        gate, up, down = (
            torch.randn(intermediate, hidden, generator=generator) * hidden**-0.5,
            torch.randn(intermediate, hidden, generator=generator) * hidden**-0.5,
            torch.randn(hidden, intermediate, generator=generator) * intermediate**-0.5,
        )
        slots.load(slot, gate, up, down)
    return slots


def dense_expert(x, slots, slot):
    """One expert in fp64, from its buffers, written out."""
    w1, w3 = slots.w13[slot].double().chunk(2)
    x = x.double()
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ slots.w2[slot].double().T


def relative_error(actual, exact):
    return ((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pairs_equal_a_dense_fp64_swiglu_in_row_major_order(dtype, data):
    num_rows, num_slots = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    num_choices, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    hidden, intermediate = data.draw(st.sampled_from([(32, 16), (40, 24), (256, 64)]))
    slots = random_slots(num_slots, hidden, intermediate, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    local_slots_RK = torch.randint(-1, num_slots, (num_rows, num_choices), generator=generator)
    y_PH = run_experts(x_RH, local_slots_RK, slots)
    assert y_PH.dtype == dtype
    pairs = [(row, int(s)) for row in range(num_rows) for s in local_slots_RK[row] if s >= 0]
    assert len(y_PH) == len(pairs)
    if pairs:
        exact = torch.stack([dense_expert(x_RH[row], slots, slot) for row, slot in pairs])
        assert relative_error(y_PH, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pair_keeps_its_bits_in_any_company(dtype):
    slots = random_slots(5, 64, 48, dtype)
    generator = torch.Generator().manual_seed(1)
    x_RH = torch.randn(150, 64, generator=generator).to(dtype)
    local_slots_RK = torch.randint(-1, 5, (150, 3), generator=generator)
    together = run_experts(x_RH, local_slots_RK, slots)
    alone = [run_experts(x_RH[i : i + 1], local_slots_RK[i : i + 1], slots) for i in range(150)]
    assert torch.equal(together, torch.cat(alone))
    one_by_one = [
        run_experts(x_RH[i : i + 1], choice.view(1, 1), slots)
        for i in range(150)
        for choice in local_slots_RK[i]
    ]
    assert torch.equal(together, torch.cat(one_by_one))


def test_an_expert_gives_the_same_bits_in_every_slot():
    """Needed for results that do not depend on the placement."""
    for hidden, intermediate in ((32, 16), (36, 20)):
        slots = random_slots(4, hidden, intermediate, torch.float32)
        weights = (*slots.w13[0].chunk(2), slots.w2[0])
        for slot in range(1, 4):
            slots.load(slot, *weights)
        x_RH = torch.randn(9, hidden)
        first, *others = [run_experts(x_RH, torch.full((9, 1), s), slots) for s in range(4)]
        assert all(torch.equal(first, other) for other in others)


def test_nothing_to_do():
    slots = random_slots(2, 32, 16, torch.bfloat16)
    x_RH = torch.randn(3, 32).bfloat16()
    assert run_experts(x_RH, torch.full((3, 2), -1), slots).shape == (0, 32)
    assert run_experts(x_RH[:0], torch.zeros(0, 2, dtype=torch.int64), slots).shape == (0, 32)
    empty = ExpertSlots(0, 32, 16, torch.bfloat16)
    assert run_experts(x_RH, torch.full((3, 2), -1), empty).shape == (0, 32)


@pytest.mark.parametrize("width", [1, 3, 8, 20, 33, 48, 100, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_activation_is_accurate_and_row_independent(width, dtype):
    generator = torch.Generator().manual_seed(width)
    gate_up = (torch.randn(203, 2 * width, generator=generator) * 4).to(dtype)
    gate_up[7, :width] = -200  # exp overflows to infinity: the activation is zero, not NaN
    gate, up = gate_up.double().chunk(2, dim=1)
    y_TI = silu_and_multiply(gate_up)
    torch.testing.assert_close(
        y_TI.double(), F.silu(gate) * up, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-30
    )
    assert torch.equal(y_TI, torch.cat([silu_and_multiply(row) for row in gate_up.split(1)]))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_mlp_equals_fp64(dtype):
    slots = random_slots(1, 96, 40, dtype)
    mlp = GatedMLP(slots.w13[0], slots.w2[0])
    x_TH = torch.randn(30, 96).to(dtype)
    assert relative_error(mlp(x_TH), dense_expert(x_TH, slots, 0)) < TOLERANCE[dtype]
    assert mlp.num_bytes == 3 * 96 * 40 * dtype.itemsize
    with pytest.raises(ValueError, match=r"w13 \[79, 96\] and w2 \[96, 40\]"):
        GatedMLP(slots.w13[0][1:], slots.w2[0])


def test_slots_take_memory_once_and_load_where_told():
    slots = ExpertSlots(3, 32, 16, torch.bfloat16)
    assert slots.num_bytes == 3 * 3 * 32 * 16 * 2
    before = [weights.data_ptr() for weights in slots.w13]
    gate, up, down = torch.ones(16, 32), torch.full((16, 32), 2.0), torch.full((32, 16), 3.0)
    slots.load(1, gate, up, down)
    assert [weights.data_ptr() for weights in slots.w13] == before
    assert [int(weights.sum()) for weights in slots.w13] == [0, 16 * 32 * 3, 0]
    assert torch.equal(slots.w13[1][16:].float(), up)
    assert [int(weights.sum()) for weights in slots.w2] == [0, 16 * 32 * 3, 0]


def test_other_weights_take_a_slot_by_reference():
    slots = random_slots(3, 32, 16, torch.bfloat16)
    old, neighbours = slots[1], [slots[0], slots[2]]
    before = old.w13.clone()
    other = slots.new_weights()
    other.fill(torch.ones(16, 32), torch.ones(16, 32), torch.ones(32, 16))
    slots[1] = other
    assert slots[1] is other
    assert slots.w13[1] is other.w13
    assert [slots[0], slots[2]] == neighbours
    assert torch.equal(old.w13, before)
    assert slots.num_bytes == 3 * 3 * 32 * 16 * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_fingerprint_is_of_every_byte_and_of_nothing_else(dtype):
    here, there = random_slots(2, 32, 16, dtype), random_slots(2, 32, 16, dtype)
    assert here[0].fingerprint() == there[0].fingerprint() != here[1].fingerprint()
    assert here[0].num_bytes == 3 * 32 * 16 * dtype.itemsize == len(here[0].data)
    assert bytes(here[0].data) == b"".join(
        part.view(torch.uint8).numpy().tobytes() for part in (here[0].w13, here[0].w2)
    )
    for position in (0, 700, len(here[0].data) - 1):
        there[0].data[position] ^= 4
        assert there[0].fingerprint() != here[0].fingerprint()
        there[0].data[position] ^= 4


def test_wrong_loads_are_refused():
    slots = ExpertSlots(2, 32, 16, torch.float32)
    good = (torch.zeros(16, 32), torch.zeros(16, 32), torch.zeros(32, 16))
    with pytest.raises(ValueError, match=r"slot\(2\) is outside \[0, num_slots\(2\)\)"):
        slots.load(2, *good)
    with pytest.raises(ValueError, match=r"I=16, H=32; got \[\[16, 32\], \[16, 1\], \[32, 16\]\]"):
        slots.load(0, good[0], torch.zeros(16, 1), good[2])
    with pytest.raises(ValueError, match=r"hidden\(0\)"):
        ExpertSlots(1, 0, 4, torch.float32)
    with pytest.raises(ValueError, match=r"slot\(5\) is outside"):
        run_experts(torch.zeros(1, 32), torch.tensor([[5]]), slots)
