"""A row's bits depend on the row alone: not on its batch, position, neighbours or memory.

Rows are compared with `torch.equal` on cancelling operands, whose products are pure rounding
error: any change of summation order shows there, while random BF16 data would round it away.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experts.linear import next_tile, stable_bmm, stable_linear
from experts.stability import CANDIDATE_TILES, cancelling_operands, stable_tiles

DTYPES = [torch.float32, torch.bfloat16]
# In- and out-features of tiny test models, of mosaic, and of one large expert.
SHAPES = [
    (16, 8), (16, 32), (24, 8), (32, 4), (32, 64), (33, 7), (48, 12), (64, 16), (64, 32), (64, 130),
    (64, 512), (96, 33), (128, 256), (256, 8), (256, 32), (256, 64), (256, 128), (256, 192),
    (256, 4096), (512, 256), (100, 1000), (576, 96), (2048, 1536),
]  # fmt: skip


def bits_equal(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def unaligned(x, offset):
    """A contiguous copy of x that starts `offset` elements into a fresh buffer."""
    view = torch.empty(x.numel() + 64, dtype=x.dtype)[offset : offset + x.numel()].view_as(x)
    return view.copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_rows_do_not_depend_on_the_number_of_rows(shape, dtype):
    x_TI, w_OI = cancelling_operands(300, shape[1], shape[0], dtype, seed=1)
    alone = torch.cat([stable_linear(x_TI[i : i + 1].clone(), w_OI) for i in range(70)])
    for num_rows in (2, 3, 4, 7, 8, 9, 15, 17, 31, 33, 64, 65, 70, 257, 300):
        together = stable_linear(x_TI[:num_rows], w_OI)
        assert together.shape == (num_rows, shape[1])
        assert bits_equal(together[:70], alone[:num_rows]), f"{num_rows=} {shape=} {dtype=}"


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([s for s in SHAPES if s[0] * s[1] < 2**19]),
    num_rows=st.integers(1, 90),
    data=st.data(),
)
def test_linear_row_keeps_its_bits_in_any_company(dtype, shape, num_rows, data):
    x_TI, w_OI = cancelling_operands(num_rows, shape[1], shape[0], dtype, seed=2)
    bias_O = torch.randn(shape[1]).to(dtype) if data.draw(st.booleans(), "bias") else None
    position = data.draw(st.integers(0, num_rows - 1), "position")
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1e20, float("nan"), float("inf")]), "neighbours")
    alone = stable_linear(x_TI[position : position + 1].clone(), w_OI, bias_O)
    company = torch.randn(num_rows, shape[0]).to(dtype) * scale
    company[position] = x_TI[position]
    offset = data.draw(st.integers(0, 17), "offset")
    columns = torch.cat([torch.zeros(num_rows, 5, dtype=dtype), company], dim=1)[:, 5:]
    for x_TI in (company, unaligned(company, offset), columns):
        assert bits_equal(stable_linear(x_TI, w_OI, bias_O)[position : position + 1], alone)
    assert bits_equal(
        stable_linear(company, unaligned(w_OI, offset), bias_O)[position : position + 1], alone
    )


def test_plain_linear_lacks_the_property():
    """The reason for stable_linear; if this fails on some machine, tiles are needless there."""
    differing = []
    for dtype in DTYPES:
        for in_features, out_features in SHAPES[:-1]:
            x_TI, w_OI = cancelling_operands(64, out_features, in_features, dtype)
            alone = torch.cat([F.linear(x_TI[i : i + 1], w_OI) for i in range(64)])
            if not bits_equal(F.linear(x_TI, w_OI), alone):
                differing.append((dtype, in_features, out_features))
    assert differing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_accurate(dtype, bias):
    torch.manual_seed(0)
    for in_features, out_features in ((33, 7), (256, 128), (512, 256)):
        x, w = torch.randn(77, in_features).to(dtype), torch.randn(out_features, in_features)
        w, b = w.to(dtype), torch.randn(out_features).to(dtype) if bias else None
        exact = x.double() @ w.double().T + (b.double() if bias else 0)
        error = (stable_linear(x, w, b).double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.max() < (1e-6 if dtype == torch.float32 else 3e-3)


def test_linear_of_no_rows_and_of_wrong_shapes():
    assert stable_linear(torch.zeros(0, 32), torch.zeros(5, 32)).shape == (0, 5)
    with pytest.raises(ValueError, match=r"x \[3, 31\] and w \[5, 32\]"):
        stable_linear(torch.zeros(3, 31), torch.zeros(5, 32))
    with pytest.raises(ValueError, match="one dtype"):
        stable_linear(torch.zeros(3, 32), torch.zeros(5, 32, dtype=torch.bfloat16))


@given(num_rows=st.integers(1, 2000), tiles=st.sampled_from([(1,), (8,), CANDIDATE_TILES]))
def test_tiles_cover_the_rows_with_less_than_one_tile_of_padding(num_rows, tiles):
    left = num_rows
    while left > 0:
        tile = next_tile(tiles, left)
        assert tile in tiles
        assert tile - left < min(tile, 64)
        left -= tile


def test_an_unstable_kernel_falls_back_to_single_rows(monkeypatch):
    """A library whose rows depend on their position must be noticed, whatever the machine."""
    plain = F.linear

    def positional(x, w, b=None):
        y = plain(x, w, b)
        y[0] += 1e-3
        return y

    monkeypatch.setattr(F, "linear", positional)
    key = (torch.float32, torch.device("cpu"), 48, 20, False, 1)
    assert stable_tiles.__wrapped__(*key) == (1,)
    monkeypatch.undo()
    assert stable_tiles.__wrapped__(*key)[0] == 8


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_bmm_entries_do_not_depend_on_the_batch(rows, transposed):
    """What paged attention relies on: scores q @ k.T (D contracted) and p @ v (64 contracted)."""
    shapes = [(d, 64) for d in (16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 576)]
    shapes += [(64, n) for n in (16, 24, 32, 128, 192, 512, 576)]
    for features, columns in shapes:
        a, b = cancelling_operands(40 * rows, 40 * columns, features, torch.float32, seed=3)
        a_BMD, b_BND = a.view(40, rows, features), b.view(40, columns, features)
        b_BDN = b_BND.transpose(1, 2)
        if not transposed:
            b_BDN = b_BDN.contiguous()
        alone = torch.cat([stable_bmm(a_BMD[i : i + 1], b_BDN[i : i + 1]) for i in range(40)])
        for count in (2, 3, 8, 39, 40):
            context = f"{count=} {rows=} {features=} {columns=}"
            assert bits_equal(stable_bmm(a_BMD[:count], b_BDN[:count]), alone[:count]), context
            late = stable_bmm(a_BMD[-count:], b_BDN[-count:])
            assert bits_equal(late, alone[-count:]), context
        noise = torch.full_like(a_BMD, float("nan"))
        noise[17] = a_BMD[17]
        assert bits_equal(stable_bmm(unaligned(noise, 3), b_BDN)[17], alone[17])


def test_plain_bmm_is_as_stable_for_aligned_operands():
    """Paged attention may call torch.bmm itself when it aligns its operands."""
    for rows in (1, 2, 4, 8):
        for features in (16, 64, 128, 576):
            a, b = cancelling_operands(24 * rows, 24 * 64, features, torch.float32)
            a, b = a.view(24, rows, features), b.view(24, 64, features).transpose(1, 2)
            alone = torch.cat([torch.bmm(a[i : i + 1], b[i : i + 1]) for i in range(24)])
            for count in (2, 7, 24):
                assert bits_equal(torch.bmm(a[:count], b[:count]), alone[:count])


def test_bmm_is_accurate():
    torch.manual_seed(0)
    for features in (20, 64, 576):
        a, b = torch.randn(5, 4, features), torch.randn(5, features, 64)
        exact = a.double() @ b.double()
        for operand in (b, b.mT.contiguous().mT):
            error = (stable_bmm(a, operand).double() - exact).norm() / exact.norm()
            assert error < 1e-6


@pytest.mark.parametrize("width", [1, 3, 8, 20, 33, 64, 100, 256, 1000])
def test_row_wise_functions_used_around_the_products(width):
    """Gates, norms and the online softmax build on these in fp32; silu and sigmoid are not here."""
    functions = {
        "exp": torch.exp,
        "softmax": lambda x: x.softmax(-1),
        "rsqrt": lambda x: torch.rsqrt(x.abs() + 1e-3),
        "mean square": lambda x: x.square().mean(-1, keepdim=True),
        "sum": lambda x: x.sum(-1, keepdim=True),
        "maximum": lambda x: x.amax(-1, keepdim=True),
    }
    x = torch.randn(203, width, generator=torch.Generator().manual_seed(width)) * 3
    for name, function in functions.items():
        for count in (1, 2, 5, 33):
            parts = [function(part.clone()) for part in x.split(count)]
            assert bits_equal(function(x), torch.cat(parts)), f"{name} {count=}"
