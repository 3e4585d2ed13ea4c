"""Small experts computed together have the bits of experts computed one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import experts.grouped
from experts.grouped import run_experts
from experts.linear import small_tiles, stable_linear, stable_linears
from experts.stability import cancelling_operands
from experts.weights import ExpertSlots

DTYPES = [torch.bfloat16, torch.float32]
HIDDEN, INTERMEDIATE, SLOTS = 64, 32, 7


def slots_of(dtype: torch.dtype) -> ExpertSlots:
    generator = torch.Generator().manual_seed(3)
    slots = ExpertSlots(SLOTS, HIDDEN, INTERMEDIATE, dtype)
    for slot in range(SLOTS):
        gate, up = torch.randn(2, INTERMEDIATE, HIDDEN, generator=generator)
        slots.load(slot, gate, up, torch.randn(HIDDEN, INTERMEDIATE, generator=generator))
    return slots


def reference(x_RH, slots_RK, slots: ExpertSlots) -> torch.Tensor:
    """fp64, pair by pair."""
    rows = []
    for row, chosen in zip(x_RH.double(), slots_RK.tolist(), strict=True):
        for slot in (slot for slot in chosen if slot >= 0):
            gate, up = (slots[slot].w13.double() @ row).chunk(2)
            rows.append(slots[slot].w2.double() @ (torch.nn.functional.silu(gate) * up))
    return torch.stack(rows) if rows else torch.empty(0, HIDDEN).double()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(0, 90),
    num_used=st.integers(1, SLOTS),
    seed=st.integers(0, 1000),
)
def test_together_is_one_by_one(dtype, num_rows, num_used, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = slots_of(dtype)
    x_RH = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    slots_RK = torch.randint(-1, num_used, (num_rows, 3), generator=generator)
    together = run_experts(x_RH, slots_RK, slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.grouped, "small_tiles", lambda *shape: ())
        one_by_one = run_experts(x_RH, slots_RK, slots)
    assert torch.equal(together, one_by_one)
    expected = reference(x_RH, slots_RK, slots)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (together.double() - expected).norm() <= tolerance * expected.norm()


def test_these_are_small_enough_to_be_computed_together() -> None:
    """Or the test above would compare a thing with itself."""
    for dtype in DTYPES:
        x_TH = torch.empty(1, HIDDEN, dtype=dtype)
        if small_tiles(x_TH, 2 * INTERMEDIATE, HIDDEN):
            return
    pytest.skip("no product of this machine's kernels stands in for another")


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(32, 128), (128, 64), (64, 96), (24, 40), (33, 7), (256, 128)]),
    groups=st.integers(1, 9),
    num_rows=st.integers(0, 80),
)
def test_maps_of_many_groups_at_once(dtype, shape, groups, num_rows) -> None:
    """On operands that show every change of the order of a sum, also where x is a transposed view."""
    features, outputs = shape
    x_TI, w_OI = cancelling_operands(max(1, num_rows), outputs, features, dtype)
    order = [(5 * g + 1) % outputs for g in range(groups)]
    w_GOI = torch.stack([w_OI.roll(shift, 0) for shift in order])
    x_TGI = torch.stack(
        [x_TI[:num_rows].flip(0) if g % 2 else x_TI[:num_rows] for g in range(groups)], 1
    )
    together = stable_linears(x_TGI.transpose(0, 1), w_GOI)
    expected = [stable_linear(x_TGI[:, g].contiguous(), w_GOI[g]) for g in range(groups)]
    assert torch.equal(together, torch.stack(expected))
