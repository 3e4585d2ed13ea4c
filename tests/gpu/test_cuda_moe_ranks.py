"""Expert layers of several ranks, in one process on one device: the same sums as one rank's layer.

Ranks go through a step side by side, as their kernels would wait for each other if one came first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from router.placement import Placement
from tests.gpu.test_cuda_moe import MIXTRAL, V3, Case, Pool, relative


def layers_of(case: Case, num_ranks: int) -> list:
    """The same layer, with the experts divided over ranks; all have all of the shared expert."""
    from experts.cuda_moe import CudaMoELayer

    whole, config = case.layer.slots.experts, case.gate.config
    placement = Placement.contiguous(1, config.num_experts, num_ranks)
    layers = []
    for rank in range(num_ranks):
        mine = placement.slots_of_rank(rank)
        experts = replace(whole, buffer_S=whole.buffer_S[mine.start : mine.stop].clone())
        layers.append(
            CudaMoELayer(
                gate=case.gate,
                slots=Pool(experts),
                layer_placement=placement.layer(0),
                rank=rank,
                shared_expert=case.layer.shared_expert,
                gains_E=case.layer.gains_E,
                exchange=object(),
            )
        )
    return layers


def dispatchers(case: Case, num_ranks: int, capacity: int, *, float8: bool) -> list:
    from comms.symmetric_layout import SymmetricLayout
    from tests.gpu.symmetric_cases import dispatchers_in_one_process

    config = case.gate.config
    layout = SymmetricLayout(
        world_size=num_ranks,
        slots_per_rank=config.num_experts // num_ranks,
        hidden=case.x_TH.shape[1],
        num_topk=config.num_experts_per_token,
        capacity=capacity,
        dispatch_dtype="float8" if float8 else "bfloat16",
        combine="node" if case.layer.gains_E is None else "fixed",
    )
    return dispatchers_in_one_process(layout, case.x_TH.device)


def side_by_side(layers: list, ranks: list, parts: list[Tensor]) -> list[Tensor]:
    """`ExpertExchange.routed` of all ranks, each step of it for all before the next."""
    from experts.kernels.types import QuantizedRows

    choices = [layer.choose(x_TH) for layer, x_TH in zip(layers, parts, strict=True)]
    pending = [
        rank.start_dispatch(x_TH, choice.slots_TK, choice.weights_TK, choice.range_T)
        for rank, x_TH, choice in zip(ranks, parts, choices, strict=True)
    ]
    homes = []
    received = [part.wait() for part in pending]
    for layer, rank, part, rows in zip(layers, ranks, pending, received, strict=True):
        x = rows.x_RH
        if rows.scale_RB is not None:
            x = QuantizedRows(q_RH=rows.x_RH, scale_RB=rows.scale_RB)
        y_PH, pairs = layer.compute(x, rows.local_slots_RK)
        homes.append(rank.start_combine(y_PH, pairs.place_RK, part.handle))
    shared = [
        layer.shared_expert(x_TH) if layer.shared_expert and len(x_TH) else None
        for layer, x_TH in zip(layers, parts, strict=True)
    ]
    return [home.wait(extra) for home, extra in zip(homes, shared, strict=True)]


def check(
    device: torch.device, config, sizes, num_ranks: int, *, float8: bool, fixed: bool
) -> None:
    """With sums in integers not a bit depends on how many ranks there are."""
    hidden, intermediate, tokens = sizes
    gains_E = torch.rand(config.num_experts).to(device) + 0.5 if fixed else None
    case = Case(config, hidden, intermediate, device, float8=float8, gains_E=gains_E)
    x_TH = case.x_TH[:tokens]
    expected_TH = case.layer.forward(x_TH)
    cut = max(1, tokens // (num_ranks + 1))
    parts = [x_TH[i * cut : (i + 1) * cut] for i in range(num_ranks - 1)]
    parts.append(x_TH[(num_ranks - 1) * cut :])
    layers = layers_of(case, num_ranks)
    ranks = dispatchers(case, num_ranks, tokens + 3, float8=float8)
    for _ in range(2):  # both buffers
        out_TH = torch.cat(side_by_side(layers, ranks, [part.contiguous() for part in parts]))
        if fixed or num_ranks == 1:
            assert torch.equal(out_TH, expected_TH)
        assert relative(out_TH, expected_TH.float()) < 0.01
    nothing, everything = x_TH[:0], x_TH.contiguous()
    out_TH = side_by_side(layers, ranks, [nothing] * (num_ranks - 1) + [everything])[-1]
    if fixed or num_ranks == 1:
        assert torch.equal(out_TH, expected_TH)
    pairs = sum(int(layer.tokens_per_slot_S.sum()) for layer in layers)
    assert pairs == 3 * tokens * config.num_experts_per_token


def check_small(device: torch.device) -> None:
    check(device, MIXTRAL, (128, 64, 4), 2, float8=False, fixed=True)


@pytest.mark.parametrize(
    ("num_ranks", "float8", "fixed"),
    [(2, False, True), (2, True, True), (2, True, False), (4, False, False)],
)
def test_ranks_together_are_one(
    cuda: torch.device, num_ranks: int, float8: bool, fixed: bool
) -> None:
    check(cuda, V3, (512, 256, 61), num_ranks, float8=float8, fixed=fixed)


@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "fp8"])
def test_an_exchange_with_nobody_else_changes_nothing(cuda: torch.device, float8: bool) -> None:
    from cluster.model.cuda.exchange import ExpertExchange

    case = Case(V3, 512, 256, cuda, float8=float8)
    x_TH = case.x_TH[:50]
    expected_TH = case.layer.forward(x_TH)
    (dispatcher,) = dispatchers(case, 1, 64, float8=float8)
    (layer,) = layers_of(case, 1)
    layer.exchange = ExpertExchange(dispatcher)
    for _ in range(3):
        assert torch.equal(layer.forward(x_TH), expected_TH)
    number = torch.tensor([20], dtype=torch.int32, device=cuda)
    assert torch.equal(layer.forward(x_TH, number)[:20], expected_TH[:20])
