"""Gains of experts and ranges of tokens: what they measure, and what they must not depend on."""

import math

import numpy as np
import torch

from experts.gains import expert_gains, token_ranges
from experts.mlp import gated_mlp
from experts.weights import ExpertSlots

HIDDEN, INTERMEDIATE = 96, 64


def random_slots(scales, dtype=torch.bfloat16, order=None) -> ExpertSlots:
    """Slot i holds expert order[i], whose down projection is scaled by scales[expert]."""
    slots = ExpertSlots(len(scales), HIDDEN, INTERMEDIATE, dtype)
    for slot, expert in enumerate(order or range(len(scales))):
        generator = torch.Generator().manual_seed(expert)
        gate, up, down = (
            torch.randn(shape, generator=generator) * shape[1] ** -0.5
            for shape in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        )
        slots.load(slot, gate, up, down * scales[expert])
    return slots


def norm_weight() -> torch.Tensor:
    return torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9)) * 3 + 0.2


def test_a_gain_is_the_rms_of_outputs_within_half_an_octave() -> None:
    """On other random inputs than the probe's, many more, in fp64."""
    scales = [0.02, 0.3, 1.0, 5.0, 700.0]
    slots = random_slots(scales)
    rng = np.random.default_rng(7)
    x_TH = torch.from_numpy(rng.standard_normal((2000, HIDDEN))) * norm_weight().double()
    for slot, gain in enumerate(expert_gains(slots, norm_weight()).tolist()):
        gate_up = x_TH @ slots.w13[slot].double().T
        gate, up = gate_up.chunk(2, dim=1)
        y_TH = torch.nn.functional.silu(gate) * up @ slots.w2[slot].double().T
        rms = float(y_TH.square().mean().sqrt())
        assert gain == 2.0 ** round(math.log2(gain))
        assert 2**-0.6 < gain / rms < 2**0.6


def test_gains_do_not_depend_on_where_an_expert_lives() -> None:
    scales = [0.5, 3.0, 20.0, 0.1]
    here = expert_gains(random_slots(scales), norm_weight())
    there = expert_gains(random_slots(scales, order=[2, 0, 3, 1]), norm_weight())
    assert len(set(here.tolist())) > 2
    assert torch.equal(there, here[[2, 0, 3, 1]])
    alone = random_slots([scales[1]] * 2, order=[1, 1])
    for slot in range(2):
        alone.w2[slot].copy_(random_slots(scales).w2[1])
    assert expert_gains(alone, norm_weight()).tolist() == [here[1].item()] * 2


def test_empty_slots_and_weights_that_are_not_finite() -> None:
    slots = random_slots([1.0, 1.0, 1.0])
    slots.w13[0].zero_()
    slots.w2[0].zero_()
    slots.w2[1][3, 3] = math.nan
    gains = expert_gains(slots, norm_weight())
    assert gains[0] == 0
    assert gains[1].isnan()
    assert gains[2] > 0


def test_ranges_follow_their_formula_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    ids_TK = torch.from_numpy(rng.integers(-1, 20, (301, 7)))
    weights_TK = torch.from_numpy(rng.random((301, 7))).float()
    gains_E = torch.exp2(torch.arange(20) - 10.0)
    ranges_T = token_ranges(ids_TK, weights_TK, gains_E, margin=16.0)
    assert ranges_T.dtype == torch.float32
    for t in range(301):
        terms = [
            (float(weights_TK[t, k]) * float(gains_E[e])) ** 2
            for k, e in enumerate(ids_TK[t].tolist())
            if e >= 0
        ]
        assert math.isclose(ranges_T[t], 16.0 * math.sqrt(sum(terms)), rel_tol=1e-6)
        alone = token_ranges(ids_TK[t : t + 1], weights_TK[t : t + 1], gains_E, margin=16.0)
        assert torch.equal(alone, ranges_T[t : t + 1])


def test_ranges_are_positive_and_finite_or_nan() -> None:
    gains_E = torch.tensor([0.0, 1e30, math.nan, math.inf])
    ids_TK = torch.tensor([[0, 0], [1, 1], [0, 2], [3, 0], [-1, -1], [0, 0]])
    weights_TK = torch.tensor([[1.0, 1], [1e9, 1], [1, 1], [1, 1], [1, 1], [math.nan, 1]])
    ranges = token_ranges(ids_TK, weights_TK, gains_E)
    assert ((ranges > 0) & ranges.isfinite()).tolist() == [True, True, False, True, True, False]
    assert ranges[[2, 5]].isnan().all()


def test_outputs_of_the_experts_that_the_gate_picks_stay_in_range() -> None:
    """Noise through random experts: not an element in a million beyond 16 times the rms."""
    slots = random_slots([1.0] * 8)
    gains_E = expert_gains(slots, norm_weight())
    rng = np.random.default_rng(3)
    x_TH = (torch.from_numpy(rng.standard_normal((200, HIDDEN))).float() * norm_weight()).bfloat16()
    y = torch.stack([gated_mlp(x_TH, slots.w13[e], slots.w2[e]) for e in (1, 4)], dim=1)
    weights_TK = torch.tensor([[0.7, 0.3]]).expand(200, 2)
    ids_TK = torch.tensor([[1, 4]]).expand(200, 2)
    out_TH = (y.float() * weights_TK[:, :, None]).sum(dim=1)
    ratio = out_TH.abs() / token_ranges(ids_TK, weights_TK, gains_E, margin=1.0)[:, None]
    assert 0.5 < ratio.square().mean().sqrt() < 2
    assert ratio.max() < 16
