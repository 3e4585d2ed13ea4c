"""The expert layer on a GPU: against fp32 on what its weights stand for, and bit for bit against itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from router.gate import Gate, GateConfig
from router.placement import LayerPlacement, Placement

MIXTRAL = GateConfig(num_experts=8, num_experts_per_token=2, renormalize=True)
V3 = GateConfig(
    num_experts=64, num_experts_per_token=8, scoring="sigmoid", num_groups=8, num_groups_per_token=4,
    group_score="top2_sum", renormalize=True, scaling_factor=2.5,
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    experts: object


class Case:
    """A layer with random weights, and those weights in fp32."""

    def __init__(
        self, config: GateConfig, hidden: int, intermediate: int, device: torch.device,
        *, float8: bool, shared: bool = True, placement: LayerPlacement | None = None,
        gains_E: Tensor | None = None,
    ) -> None:  # fmt: skip
        from experts.cuda_moe import CudaMoELayer, SharedExpert
        from experts.float8 import dequantized, quantize_blocks
        from experts.kernels.types import DeviceExperts

        generator = torch.Generator().manual_seed(hidden)

        def weights(*shape: int) -> tuple[Tensor, Tensor | None, Tensor]:
            values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            if not float8:
                values = values.to(torch.bfloat16)
                return values.to(device), None, values.float().to(device)
            quantized, scale = quantize_blocks(values)
            return quantized.to(device), scale.to(device), dequantized(quantized, scale).to(device)

        experts = config.num_experts
        self.placement = placement or Placement.contiguous(1, experts, 1).layer(0)
        w13, w13_scale, self.w13 = weights(experts, 2 * intermediate, hidden)
        w2, w2_scale, self.w2 = weights(experts, hidden, intermediate)
        s13, s13_scale, self.s13 = weights(2 * intermediate, hidden)
        s2, s2_scale, self.s2 = weights(hidden, intermediate)
        bias_E = torch.randn(experts, generator=generator) / 10
        self.gate = Gate(
            config,
            torch.randn(experts, hidden, generator=generator).to(device) / hidden**0.5,
            bias_E.to(device) if config.scoring == "sigmoid" else None,
        )
        self.shared, self.float8 = shared, float8
        slots = self.placement.slots_per_rank
        self.layer = CudaMoELayer(
            gate=self.gate,
            slots=Pool(
                DeviceExperts(
                    w13_BNH=w13, w2_BHI=w2, w13_scale=w13_scale, w2_scale=w2_scale,
                    buffer_S=torch.arange(slots, dtype=torch.int32, device=device) % experts,
                )
            ),
            layer_placement=self.placement,
            shared_expert=SharedExpert(w13=s13, w2=s2, w13_scale=s13_scale, w2_scale=s2_scale)
            if shared
            else None,
            gains_E=gains_E,
        )  # fmt: skip
        self.x_TH = torch.randn(400, hidden, generator=generator).to(torch.bfloat16).to(device)

    def expected(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """In fp32, with the layer's own choice and the casts that it has to make."""
        cast = _through_float8 if self.float8 else Tensor.float
        x_TH = cast(x_TH)
        out_TH = torch.zeros_like(x_TH)
        if self.shared:
            out_TH += _mlp(x_TH, self.s13, self.s2, cast, between=torch.bfloat16)
        for expert in range(len(self.w13)):
            y_TH = _mlp(x_TH, self.w13[expert], self.w2[expert], cast)
            out_TH += (weights_TK * (ids_TK == expert)).sum(1, keepdim=True) * y_TH
        return out_TH


def _mlp(
    x_TH: Tensor, w13: Tensor, w2: Tensor, cast: Callable[[Tensor], Tensor],
    between: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`between` the products: a number that is rounded another way is cast to another FP8 number."""
    gate, up = (x_TH @ w13.T).to(between).float().chunk(2, dim=1)
    h = (torch.nn.functional.silu(gate) * up).to(between)
    return cast(h) @ w2.T


def _through_float8(x_TI: Tensor) -> Tensor:
    """What is left of rows that are cast to FP8, 128 channels at a time, as both products' inputs are."""
    blocks = x_TI.float().unflatten(1, (-1, 128))
    scale = blocks.abs().amax(2, keepdim=True).clamp(min=1e-4) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)


def relative(found: Tensor, expected: Tensor) -> float:
    """Greatest relative L2 error of a row."""
    error_T = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(error_T.max())


def compare(case: Case, x_TH: Tensor, tolerance: float) -> None:
    from experts.kernels.choose import choose
    from experts.kernels.linear import linear_fp32

    layer = case.layer
    layer.forget_counters()
    layer.record = []
    out_TH = layer.forward(x_TH)
    (ids_TK,) = layer.record
    layer.record = None
    logits_TE = linear_fp32(x_TH, case.gate.weight_EH)
    same_TK, weights_TK = choose(logits_TE, case.gate.config, case.gate.correction_bias_E)
    assert torch.equal(same_TK, ids_TK)
    expected_TH = case.expected(x_TH, ids_TK, weights_TK)
    assert relative(out_TH, expected_TH) <= tolerance
    if case.float8:  # a few rows hang on how one large number was cast; most do not
        error_T = (out_TH.float() - expected_TH).norm(dim=1) / expected_TH.norm(dim=1)
        assert error_T.mean() < tolerance / 3
    experts = case.gate.config.num_experts
    counts_E = torch.bincount(ids_TK.flatten(), minlength=experts).cpu()
    assert torch.equal(layer.routed_E, counts_E)
    assert int(layer.tokens_per_slot_S.sum()) == ids_TK.numel()
    assert torch.equal(layer.recent_TK, ids_TK[:32].cpu())


def check_small(device: torch.device) -> None:
    """For the interpreter: parity, padding, and a row alone."""
    case = Case(MIXTRAL, 128, 64, device, float8=False)
    x_TH = case.x_TH[:5]
    compare(case, x_TH, 0.01)
    out_TH = case.layer.forward(x_TH)
    padded = case.layer.forward(x_TH, torch.tensor([3], dtype=torch.int32, device=device))
    assert torch.equal(padded[:3], out_TH[:3])
    assert case.layer.recent_TK.shape == (3, 2)
    assert case.layer.forward(x_TH[:0]).shape == (0, 128)
    assert case.layer.recent_TK.shape == (0, 2)
    assert torch.equal(case.layer.forward(x_TH[2:3]), out_TH[2:3])


SIZES = {
    "bf16 mixtral": (MIXTRAL, 256, 64, False, 0.01),
    "bf16 v3": (V3, 512, 256, False, 0.01),
    "fp8 v3": (V3, 512, 256, True, 0.06),
}


def cases(device: torch.device, name: str, **more: object) -> tuple[Case, float]:
    config, hidden, intermediate, float8, tolerance = SIZES[name]
    return Case(config, hidden, intermediate, device, float8=float8, **more), tolerance


@pytest.mark.parametrize("name", SIZES)
def test_layer_computes_what_its_weights_stand_for(cuda: torch.device, name: str) -> None:
    case, tolerance = cases(cuda, name)
    for rows in (1, 2, 17, 130, 400):
        compare(case, case.x_TH[:rows], tolerance)


@pytest.mark.parametrize("name", SIZES)
def test_a_row_does_not_depend_on_its_batch(cuda: torch.device, name: str) -> None:
    case, _ = cases(cuda, name)
    layer, x_TH = case.layer, case.x_TH
    whole_TH = layer.forward(x_TH)
    order_T = torch.randperm(len(x_TH), device=cuda)
    assert torch.equal(layer.forward(x_TH[order_T]), whole_TH[order_T])
    for start, rows in ((0, 1), (3, 2), (5, 8), (100, 17), (10, 64), (200, 130), (7, 393)):
        part = slice(start, start + rows)
        assert torch.equal(layer.forward(x_TH[part]), whole_TH[part]), (start, rows)
    for real in (0, 1, 33, 399):
        number = torch.tensor([real], dtype=torch.int32, device=cuda)
        assert torch.equal(layer.forward(x_TH, number)[:real], whole_TH[:real])
    for _ in range(20):
        assert torch.equal(layer.forward(x_TH), whole_TH)


@pytest.mark.parametrize("name", ["bf16 v3", "fp8 v3"])
def test_a_graph_replays_it_on_other_inputs_and_placements(cuda: torch.device, name: str) -> None:
    """Also with copies of experts in other slots: nothing but the table's contents changes."""
    physical = torch.arange(80)[None].numpy() % 64
    placement = Placement(physical_to_logical=physical, num_experts=64, num_ranks=1)
    case, _ = cases(cuda, name, placement=placement.layer(0))
    layer = case.layer
    x_TH = case.x_TH[:48].clone()
    number = torch.tensor([48], dtype=torch.int32, device=cuda)
    expected_TH = layer.forward(x_TH, number)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.forward(x_TH, number)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out_TH = layer.forward(x_TH, number)
    layer.forget_counters()
    graph.replay()
    assert torch.equal(out_TH, expected_TH)
    assert int(layer.routed_E.sum()) == 48 * 8
    x_TH.copy_(case.x_TH[48:96])
    number.fill_(40)
    graph.replay()
    assert torch.equal(out_TH[:40], layer.forward(case.x_TH[48:88]))
    moved = placement.physical_to_logical.copy()
    moved[0, :16], moved[0, 64:] = moved[0, 16:32].copy(), moved[0, :16].copy()
    buffers = torch.from_numpy(moved[0]).to(cuda, torch.int32)
    expected_TH = out_TH.clone()
    case.layer.slots.experts.buffer_S.copy_(buffers)
    moved[0, 16:32] = -1
    layer.layer_placement = placement.with_layers({0: moved[0]}).layer(0)
    graph.replay()
    assert torch.equal(out_TH[:40], expected_TH[:40])


def test_fixed_sums_do_not_depend_on_where_copies_are(cuda: torch.device) -> None:
    case, _ = cases(cuda, "bf16 v3", gains_E=torch.ones(64, device=cuda))
    x_TH = case.x_TH[:100]
    exact, _ = cases(cuda, "bf16 v3")
    assert relative(case.layer.forward(x_TH), exact.layer.forward(x_TH).float()) < 0.01
    whole_TH = case.layer.forward(x_TH)
    assert torch.equal(case.layer.forward(x_TH[50:51]), whole_TH[50:51])


def test_layers_that_do_not_fit_together_are_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"num_slots\(4\) != slots_per_rank\(8\)"):
        _refused(Placement.contiguous(1, 8, 1).layer(0))
    with pytest.raises(ValueError, match=r"num_ranks\(2\) need an exchange"):
        _refused(Placement.contiguous(1, 8, 2).layer(0))


def _refused(placement: LayerPlacement) -> None:
    from experts.cuda_moe import CudaMoELayer
    from experts.kernels.types import DeviceExperts

    experts = DeviceExperts(
        w13_BNH=torch.zeros(4, 128, 64, dtype=torch.bfloat16),
        w2_BHI=torch.zeros(4, 64, 64, dtype=torch.bfloat16),
        buffer_S=torch.arange(4, dtype=torch.int32),
    )
    CudaMoELayer(
        gate=Gate(MIXTRAL, torch.zeros(8, 64)), slots=Pool(experts), layer_placement=placement
    )
