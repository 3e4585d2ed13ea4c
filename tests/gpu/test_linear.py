"""Dense products: right to the last digits their operands have, and a row's bits are its own."""

import math

import pytest
import torch

from tests.gpu.rows import relative_l2

BATCHES = (1, 2, 8, 9, 17, 33, 64, 65, 128, 129, 300, 1024, 1500)
ROUNDING = 8e-3  # of a bf16 result; Triton's interpreter cuts where a GPU rounds
# Beside the magnitudes added up: an instruction lines up 32 products of e4m3 and its accumulator at the
# greatest of them and cuts each off 13 bits below (what DeepSeek-V3 found, arXiv:2412.19437, section 3.5.2).
FLOAT8 = 33 * 2.0**-13
SHAPES = ((96, 192), (2048, 2048), (576, 7168), (2048, 1408 + 32), (5632, 2048), (24576, 1536))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cancelling(*shape, device):
    """Operands whose products cancel: a sum in another order shows in most results."""
    x = torch.randn(*shape, device=device) * torch.exp2(torch.randint(-6, 7, shape, device=device))
    return x.to(torch.bfloat16)


def weights(*shape, device, dtype=torch.bfloat16):
    w = torch.randn(*shape, device=device) / math.sqrt(shape[-1])
    if dtype != torch.float8_e4m3fn:
        return w.to(dtype), None
    blocks = (math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scale = torch.rand(blocks, device=device) / 448 + 1e-3
    return (w * 60).to(dtype), scale


def dequantised(w_OI, scale):
    """In fp64."""
    if scale is None:
        return w_OI.double()
    wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return w_OI.double() * wide[: w_OI.shape[0], : w_OI.shape[1]]


def as_float8(x_TI):
    """What 1 x 128 quantisation leaves of the rows, in fp64."""
    blocks = math.ceil(x_TI.shape[1] / 128)
    x_TBC = torch.nn.functional.pad(x_TI, (0, blocks * 128 - x_TI.shape[1])).float()
    x_TBC = x_TBC.unflatten(1, (blocks, 128))
    scale = x_TBC.abs().amax(2, keepdim=True).clamp(min=1e-4) / 448
    q = (x_TBC / scale).to(torch.float8_e4m3fn).double()
    return (q * scale.double()).flatten(1)[:, : x_TI.shape[1]]


def check_fp32(x_TH, w_EH):
    from experts.kernels.linear import linear_fp32

    x, w = x_TH.double(), w_EH.double()
    assert relative_l2(linear_fp32(x_TH, w_EH), x @ w.T, x.abs() @ w.abs().T) < 1e-6


def interpreted_as_float8(x_TI):
    from experts.kernels.quantize import quantize

    padded = torch.nn.functional.pad(x_TI, (0, -x_TI.shape[1] % 128)).contiguous()
    rows = quantize(padded)
    wide = rows.q_RH.double().unflatten(1, (-1, 128)) * rows.scale_RB.double().unsqueeze(2)
    return wide.flatten(1)[:, : x_TI.shape[1]]


def check_small(device="cpu", dtype="bfloat16"):
    """One part and several, ragged edges, strided rows, other dtypes out."""
    from experts.kernels.linear import linear, linears

    dtype = getattr(torch, dtype)
    device = torch.device(device)
    torch.manual_seed(0)
    for num_tokens, outputs, inputs in ((1, 48, 64), (3, 136, 320), (20, 64, 1100), (130, 72, 96)):
        x = cancelling(num_tokens, inputs + 16, device=device)[:, :inputs]
        w, scale = weights(outputs, inputs, device=device, dtype=dtype)
        # (Triton's interpreter does not round to e4m3 as a GPU does: what it made is what counts.)
        seen = x.double() if scale is None else interpreted_as_float8(x)
        wide = dequantised(w, scale)
        want, terms = seen @ wide.T, seen.abs() @ wide.abs().T
        assert relative_l2(linear(x, w, scale), want) < (
            ROUNDING if scale is None else 2 * ROUNDING
        )
        got = linear(x, w, scale, out_dtype=torch.float32)
        assert got.dtype == torch.float32
        assert relative_l2(got, want, terms) < (1e-6 if scale is None else FLOAT8)
    if dtype == torch.bfloat16:
        x = cancelling(5, 4, 96, device=device)
        w, _ = weights(4, 40, 64, device=device)
        out = torch.full((5, 4, 56), 7.0, device=device, dtype=torch.bfloat16)
        linears(x[..., 32:], w, out[..., :40])
        want = torch.einsum("tni,noi->tno", x[..., 32:].double(), w.double())
        assert relative_l2(out[..., :40], want) < ROUNDING
        assert (out[..., 40:] == 7).all()
        x, (w, _) = (
            cancelling(7, 256, device=device),
            weights(24, 256, device=device, dtype=torch.float32),
        )
        check_fp32(x, w)


def check_interpreted():
    check_small("cpu", "bfloat16")
    check_small("cpu", "float8_e4m3fn")
    check_refusals()


def test_products_are_right_as_interpreted(interpreted):
    interpreted("tests.gpu.test_linear:check_interpreted")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_products_are_right(cuda, dtype):
    check_small(cuda, dtype)


def check_bits(product, x_TI, batches=BATCHES):
    """A row alone, in batches of any size, and shuffled: the same bits."""
    whole = product(x_TI)
    for size in batches:
        part = product(x_TI[:size].contiguous())
        assert torch.equal(part, whole[:size]), f"rows differ in a batch of {size}"
    order = torch.randperm(len(x_TI), device=x_TI.device)
    assert torch.equal(product(x_TI[order]), whole[order])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rows_do_not_depend_on_their_batch(cuda, shape, dtype):
    from experts.kernels.linear import linear

    outputs, inputs = shape
    w, scale = weights(outputs, inputs, device=cuda, dtype=dtype)
    x = cancelling(2048, inputs, device=cuda)
    seen = as_float8(x[:64]) if scale is not None else x[:64].double()
    wide = dequantised(w, scale)
    want, terms = seen @ wide.T, seen.abs() @ wide.abs().T
    got = linear(x[:64], w, scale, out_dtype=torch.float32)
    assert relative_l2(got, want, terms) < (1e-6 if scale is None else FLOAT8)
    assert torch.equal(linear(x[:64], w, scale), got.to(torch.bfloat16))
    check_bits(lambda rows: linear(rows, w, scale, out_dtype=torch.float32), x)


@pytest.mark.parametrize("shape", [(64, 2048), (256, 7168), (8, 256)], ids=str)
def test_logits_do_not_depend_on_their_batch(cuda, shape):
    from experts.kernels.linear import linear_fp32

    w, _ = weights(*shape, device=cuda, dtype=torch.float32)
    x = cancelling(2048, shape[1], device=cuda)
    check_fp32(x, w)
    check_bits(lambda rows: linear_fp32(rows, w), x)


@pytest.mark.parametrize("shape", [(16, 512, 128), (16, 128, 512), (128, 512, 128)], ids=str)
def test_heads_do_not_depend_on_their_batch(cuda, shape):
    from experts.kernels.linear import linears

    num, outputs, inputs = shape
    w, _ = weights(num, outputs, inputs, device=cuda)
    x = cancelling(1500, num, inputs + 64, device=cuda)[..., :inputs]
    want = torch.einsum("tni,noi->tno", x.double(), w.double())
    whole = linears(x, w)
    assert relative_l2(whole, want) < ROUNDING
    check_bits(lambda rows: linears(rows, w), x.contiguous())
    for size in (1, 5, 16, 17):  # slices in, slices out
        out = torch.full((size, num, outputs + 64), 7.0, device=cuda, dtype=torch.bfloat16)
        linears(x[:size], w, out[..., :outputs])
        assert torch.equal(out[..., :outputs], whole[:size])
        assert (out[..., outputs:] == 7).all()


def test_products_of_a_graph_are_those_of_the_stream(cuda):
    """Counters are zero again after each call, captured or not."""
    from experts.kernels.linear import linear

    w, _ = weights(2048, 2048, device=cuda)
    x = cancelling(4, 2048, device=cuda)
    want = linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            got = linear(x, w)
    for _ in range(20):
        x.copy_(cancelling(4, 2048, device=cuda))
        graph.replay()
        assert torch.equal(got, linear(x, w))
    assert not torch.equal(got, want)


def check_refusals():
    from experts.kernels.linear import linear

    x, w = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(8, 32, dtype=torch.bfloat16)
    for bad in ((x, w, None), (x, w.float(), None), (x, w, torch.ones(1, 1))):
        with pytest.raises(ValueError, match=r"x |rows of"):
            linear(*bad)
