"""What the codecs promise: their formulas, errors, bytes, and the fate of values out of the ordinary."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.bits import WIDTHS, pack_bits, packed_bytes, unpack_bits
from comms.codec import WireFormat
from comms.codecs import CODECS

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
LOSSY = [name for name in CODECS if name != "bfloat16"]
BLOCK_OF = {name: 64 if name == "int6" else 128 for name in LOSSY}
FAITHFUL = 4e-2  # of the block's greatest magnitude: what any codec keeps of a single value


def round_trip(name: str, x_RH: Tensor) -> Tensor:
    codec = CODECS[name]
    rows = codec.encode(x_RH)
    assert rows.dtype == torch.uint8
    assert rows.shape == (len(x_RH), codec.row_bytes(x_RH.shape[1], x_RH.dtype))
    assert rows.shape[1] % 4 == 0
    decoded = codec.decode(rows, x_RH.shape[1], x_RH.dtype)
    assert decoded.dtype == x_RH.dtype
    assert decoded.shape == x_RH.shape
    return decoded


def relative_l2(y_RH: Tensor, x_RH: Tensor) -> Tensor:
    return (y_RH.double() - x_RH.double()).norm(dim=1) / x_RH.double().norm(dim=1)


def normal(rows: int, hidden: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, hidden), generator=generator).to(dtype)


def bits_of(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals the same NaN."""
    return x.contiguous().view(torch.uint8)


def blocks_of(name: str, x_H: Tensor) -> list[Tensor]:
    return list(torch.split(x_H, BLOCK_OF[name]))


shapes = st.tuples(st.integers(0, 5), st.integers(1, 400))


# --- formulas, element by element, in fp64 --------------------------------------------------------


def random_rows(rows: int, hidden: int, seed: int) -> Tensor:
    """Normal rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)
    return torch.randn((rows, hidden), generator=generator) * scale


def torch_float8(x_RH: Tensor) -> Tensor:
    """The cast of DeepSeek-V3 in torch's own float8, per 128 channels."""
    out = torch.empty_like(x_RH)
    for start in range(0, x_RH.shape[1], 128):
        block = x_RH[:, start : start + 128].float()
        scale = block.abs().amax(dim=1, keepdim=True).clamp(min=1e-4) / 448
        q = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[:, start : start + 128] = q.float() * scale
    return out


@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_float8_is_torchs_float8(shape, seed, dtype) -> None:
    x_RH = random_rows(*shape, seed).clamp(-6e4, 6e4).to(dtype)
    assert torch.equal(round_trip("float8", x_RH), torch_float8(x_RH))


def test_float8_layout() -> None:
    """e4m3 bytes padded to 4, then fp32 scales."""
    x_RH = normal(3, 130)
    rows = CODECS["float8"].encode(x_RH)
    scales = rows[:, 132:].contiguous().view(torch.float32)
    for block, amax in ((0, x_RH[:, :128].abs().amax(1)), (1, x_RH[:, 128:].abs().amax(1))):
        assert torch.equal(scales[:, block], amax / 448)
    q = (x_RH[:, :128] / scales[:, :1]).to(torch.float8_e4m3fn)
    assert torch.equal(rows[:, :128], q.view(torch.uint8))
    assert (rows[:, 130:132] == 0).all()


@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ue8m0_scales_are_the_next_power_of_two(shape, seed) -> None:
    x_RH = random_rows(*shape, seed)
    y_RH = round_trip("float8_ue8m0", x_RH)
    for x_H, y_H in zip(x_RH, y_RH, strict=True):
        for x_C, y_C in zip(blocks_of("float8", x_H), blocks_of("float8", y_H), strict=True):
            scale = 2.0 ** math.ceil(math.log2(x_C.abs().max().item() / 448))
            expected = (x_C.double() / scale).to(torch.float8_e4m3fn).double() * scale
            assert torch.equal(y_C.double(), expected)


@pytest.mark.parametrize("name", ["int6", "int8", "int10"])
@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_integers_are_within_half_a_step(name, shape, seed) -> None:
    greatest = {"int6": 31, "int8": 127, "int10": 511}[name]
    x_RH = random_rows(*shape, seed)
    y_RH = round_trip(name, x_RH)
    for x_H, y_H in zip(x_RH.double(), y_RH.double(), strict=True):
        for x_C, y_C in zip(blocks_of(name, x_H), blocks_of(name, y_H), strict=True):
            step = x_C.abs().max().item() / greatest * (1 + 2**-8)
            assert (y_C - x_C).abs().max() <= step / 2 * (1 + 1e-6)
            assert y_C.abs().max() <= x_C.abs().max() * (1 + 2**-8)


@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_logfmt_is_within_half_a_step_of_its_logarithm(shape, seed) -> None:
    x_RH = random_rows(*shape, seed)
    y_RH = round_trip("logfmt10", x_RH)
    for x_H, y_H in zip(x_RH.double(), y_RH.double(), strict=True):
        for x_C, y_C in zip(blocks_of("logfmt10", x_H), blocks_of("logfmt10", y_H), strict=True):
            # stored ends are rounded outwards to 8 bits: at most 2 * 2^-7 wider
            low, high = x_C.abs().min().item() * (1 - 2**-7), x_C.abs().max().item() * (1 + 2**-7)
            step = 2.0 ** (math.log2(high / low) / 510)
            assert torch.equal(x_C.sign(), y_C.sign())
            bound = x_C.abs() * ((step - 1) / 2 * 1.01 + 2e-5)
            assert ((y_C - x_C).abs() <= bound).all()


def test_logfmt_clips_at_32_octaves() -> None:
    x_RH = torch.tensor([[1.0, 2.0**-31.5, -(2.0**-31.9), 2.0**-33, 2.0**-40, 0.0]])
    y_RH = round_trip("logfmt10", x_RH)
    # steps are 32/510 octaves: 2.2 % to the middle; what is below the clip is zero
    assert torch.allclose(y_RH[0, :3], x_RH[0, :3], rtol=0.03, atol=0)
    assert y_RH[0, 3:].tolist() == [0, 0, 0]


# --- errors and bytes -----------------------------------------------------------------------------

# Relative L2 of fp32 normal rows, all rows within. FP8: research says 0.0257 and 0.0266. Integers:
# amax / rms of 128 normal values is 2.7 +- 0.4, divided by steps and sqrt(12).
EXPECTED = {
    "float8": (0.0245, 0.0275),
    "float8_ue8m0": (0.0245, 0.0290),
    "logfmt10": (0.0028, 0.0045),
    "int6": (0.0210, 0.0270),
    "int8": (0.0055, 0.0075),
    "int10": (0.0013, 0.0018),
}
BYTES_OF_7168 = {
    "bfloat16": 14336,
    "float8": 7168 + 56 * 4,
    "float8_ue8m0": 7168 + 56,
    "logfmt10": 8960 + 56 * 4,
    "int6": 5376 + 112 * 2,
    "int8": 7168 + 56 * 2,
    "int10": 8960 + 56 * 2,
}


@pytest.mark.parametrize("name", LOSSY)
def test_error_of_normal_rows(name) -> None:
    low, high = EXPECTED[name]
    x_RH = normal(50, 7168)
    errors_R = relative_l2(round_trip(name, x_RH), x_RH)
    assert ((errors_R > low) & (errors_R < high)).all(), errors_R


@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_7168_channels(name) -> None:
    assert CODECS[name].row_bytes(7168, torch.bfloat16) == BYTES_OF_7168[name]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=128), st.integers(-60, 60))
@settings(max_examples=300, deadline=None)
def test_int8_never_exceeds_its_bound(values, exponent) -> None:
    """sqrt(128)/127/2: every value in the middle between two steps. FP8's worst is 0.0625."""
    x_RH = torch.tensor([values]) * 2.0**exponent
    if (x_RH.abs().max() > 2.0**-120).item():
        error = relative_l2(round_trip("int8", x_RH), x_RH).item()
        assert error <= math.sqrt(128) / 127 / 2 * (1 + 2**-8)


@pytest.mark.parametrize("spikes", [1, 2, 8, 128])
def test_int8_is_no_worse_than_float8_whatever_the_peak(spikes) -> None:
    """From one peak over noise (amax = 11 rms) to uniform blocks: int8 stays below 0.0257."""
    generator = torch.Generator().manual_seed(spikes)
    x_RH = (torch.rand((400, 128), generator=generator) - 0.5) * 0.2
    x_RH[:, :spikes] = 1.0 + torch.rand((400, spikes), generator=generator)
    ours, theirs = (relative_l2(round_trip(n, x_RH), x_RH).mean() for n in ("int8", "float8"))
    assert 0 < ours <= math.sqrt(128) / 127 / math.sqrt(12) * (1 + 2**-8)
    if spikes > 2:  # FP8 keeps a block's greatest value exactly
        assert ours < theirs


# --- rows are on their own ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@given(
    rows=st.integers(1, 300),
    hidden=st.sampled_from([1, 7, 24, 63, 64, 100, 128, 129, 130, 391, 512, 2048]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_a_row_is_the_same_alone_and_in_company(name, rows, hidden, dtype, seed) -> None:
    x_RH = normal(rows, hidden, dtype, seed)
    if rows > 2:
        x_RH[rows // 3] = math.nan  # bad company
    codec = CODECS[name]
    packed = codec.encode(x_RH)
    decoded = codec.decode(packed, hidden, dtype)
    for r in {0, rows - 1, rows // 2, seed % rows}:
        alone = codec.encode(x_RH[r : r + 1].clone())
        assert torch.equal(alone[0], packed[r])
        assert torch.equal(bits_of(codec.decode(alone, hidden, dtype)[0]), bits_of(decoded[r]))
        # as columns of a wider and unaligned buffer
        wide = torch.full((3, packed.shape[1] + 5), 255, dtype=torch.uint8)
        wide[1, 3:-2] = packed[r]
        seen = codec.decode(wide[1:2, 3:-2], hidden, dtype)
        assert torch.equal(bits_of(seen[0]), bits_of(decoded[r]))


@pytest.mark.parametrize("name", ["bfloat16", "float8", "float8_ue8m0", "int8"])
@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_encoding_again_changes_nothing(name, shape, seed) -> None:
    """In fp32. The scale of int8 has 9 bits and its greatest integer is always 127, so q * scale
    and the way back are exact. Not so for int10 (509 to 511) and logfmt10."""
    once = round_trip(name, random_rows(*shape, seed))
    assert torch.equal(round_trip(name, once), once)


# --- values out of the ordinary -------------------------------------------------------------------


@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), hidden=st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_plain_rows_carry_every_bit(seed, dtype, hidden) -> None:
    rng = np.random.default_rng(seed)
    raw = torch.from_numpy(rng.integers(0, 256, (3, hidden * dtype.itemsize), dtype=np.uint8))
    assert torch.equal(bits_of(round_trip("bfloat16", raw.view(dtype))), raw)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_is_not_finite_decodes_to_nan_and_no_other(name, bad, dtype) -> None:
    block = BLOCK_OF[name]
    clean = normal(5, 3 * block + 7, dtype)
    x_RH = clean.clone()
    x_RH[1, block + 3] = bad
    x_RH[3, -1] = bad
    expected = round_trip(name, clean)
    expected[1, block : 2 * block] = math.nan
    expected[3, 3 * block :] = math.nan
    y_RH = round_trip(name, x_RH)
    assert torch.equal(y_RH.isnan(), expected.isnan())
    assert torch.equal(y_RH.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero(name, dtype) -> None:
    x_RH = normal(4, 300, dtype)
    x_RH[:, ::3] = 0
    x_RH[2] = 0
    x_RH[3, :128] = 0
    y_RH = round_trip(name, x_RH)
    assert (y_RH[x_RH == 0] == 0).all()
    assert y_RH[0].abs().sum() > 0


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [1.0, 0.999, 0.97, 0.75, 0.51])
def test_the_greatest_values_stay_finite(name, dtype, fraction) -> None:
    limit = torch.finfo(dtype).max * fraction
    x_RH = torch.tensor([[limit, -limit, limit / 3, 1.0, 0.0, limit * 0.98]]).to(dtype)
    y_RH = round_trip(name, x_RH).double()
    x_RH = x_RH.double()
    assert y_RH.isfinite().all()
    assert ((y_RH - x_RH).abs() <= 0.065 * x_RH.abs().max()).all()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("exponent", [-60, -100, -117, -118, -119, -126, -130, -140, -149])
def test_tiny_blocks(name, exponent) -> None:
    """Relative accuracy while a block's greatest is 2^-117 or more (float8: 1e-4, its formula);
    below, the error is at most 1/16 of the block's greatest or the least normal number."""
    x_RH = normal(2, 256)
    x_RH = x_RH / x_RH.abs().amax() * 2.0**exponent
    y_RH = round_trip(name, x_RH)
    if name == "float8":
        assert (y_RH.abs() <= 1e-4).all()
    elif exponent >= -117:
        assert (relative_l2(y_RH, x_RH) < 0.03).all()
    else:
        assert ((y_RH - x_RH).abs() <= max(2.0 ** (exponent - 4), 2.0**-126)).all()


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@given(shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_integers_come_back(bits, shape, seed) -> None:
    rng = np.random.default_rng(seed)
    q_RH = torch.from_numpy(rng.integers(0, 2**bits, shape, dtype=np.int16))
    size = packed_bytes(shape[1], bits)
    assert 0 <= size - shape[1] * bits / 8 < len(WIDTHS[bits])
    out = torch.full((shape[0], size + 3), 255, dtype=torch.uint8)
    pack_bits(q_RH, bits, out)
    assert torch.equal(unpack_bits(out, shape[1], bits), q_RH)
    assert (out[:, size:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_slots", [1, 2**15, 2**15 + 1, 2**31 - 1])
@pytest.mark.parametrize(("hidden", "rows"), [(1, 1), (7, 3), (128, 2), (130, 1), (5, 0)])
@pytest.mark.parametrize("with_range", [False, True])
def test_rows_survive_packing(dtype, codec, num_slots, hidden, rows, with_range) -> None:
    wire = WireFormat(
        hidden=hidden,
        num_topk=3,
        dtype=dtype,
        codec=codec,
        num_slots=num_slots,
        with_range=with_range,
    )
    x_RH = normal(rows, hidden, dtype)
    slots_RK = torch.randint(-1, num_slots, (rows, 3))
    if rows:
        slots_RK[0, :2] = torch.tensor([-1, num_slots - 1])
    weights_RK = torch.randn(rows, 3)
    range_R = torch.rand(rows) if with_range else None
    packed = wire.pack(x_RH, slots_RK, weights_RK, range_R)
    assert packed.nbytes == rows * wire.row_bytes
    not_aligned = torch.frombuffer(bytearray(b"?" + packed.tobytes()), dtype=torch.uint8)[1:]
    records = wire.records(not_aligned)
    assert np.array_equal(records["tail"]["slots"], slots_RK.numpy())
    assert np.array_equal(records["tail"]["weights"], weights_RK.numpy())
    assert torch.equal(wire.decode(records["payload"]), round_trip(codec, x_RH))
    if with_range:
        assert np.array_equal(records["tail"]["range"], range_R.numpy())
    again = wire.pack(x_RH.clone(), slots_RK, weights_RK, range_R)
    assert packed.tobytes() == again.tobytes()  # no byte is left as the memory was


def test_bytes_per_token_of_deepseek_v3() -> None:
    """7168 channels and top-8 of 256 slots: the payload, 2 bytes a slot and 4 a weight."""
    for codec, payload in BYTES_OF_7168.items():
        wire = WireFormat(hidden=7168, num_topk=8, dtype=torch.bfloat16, codec=codec, num_slots=256)
        assert wire.row_bytes == payload + 16 + 32


def test_what_does_not_fit_together_is_refused() -> None:
    options = {"hidden": 4, "num_topk": 1, "dtype": torch.float32, "num_slots": 1}
    with pytest.raises(ValueError, match=r"codec must be one of bfloat16, .*, got 'float7'"):
        WireFormat(codec="float7", **options)
    row = (torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(ValueError, match="with_range"):
        WireFormat(codec="int8", **options).pack(*row, torch.ones(1))
    with pytest.raises(ValueError, match="with_range"):
        WireFormat(codec="int8", with_range=True, **options).pack(*row)
    with pytest.raises(ValueError, match="with_address"):
        WireFormat(codec="int8", **options).pack(*row, first_address=0)
