"""The associative sum: exact against Python's integers, and the same bits in every grouping."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.fixed import add_rows, fixed_sum, pack_sums, steps_per_range, to_floats, unpack_sums
from comms.routes import Pairs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS, HIDDEN, EXPERTS, TOP_K = 5, 11, 12, 4


class Batch:
    """Tokens with their experts' outputs y_TKH; `spread` is the range in units of their size."""

    def __init__(self, seed: int, dtype: torch.dtype, spread: float, peculiar: list[float]) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.experts_TK = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
        self.experts_TK[rng.random((TOKENS, TOP_K)) < 0.1] = -1
        y_TKH = torch.from_numpy(rng.standard_t(3, (TOKENS, TOP_K, HIDDEN)))
        for value in peculiar:
            y_TKH[tuple(rng.integers(0, y_TKH.shape))] = value
        self.y_TKH = y_TKH.to(dtype)
        self.weights_TK = torch.from_numpy(rng.random((TOKENS, TOP_K))).float()
        self.range_T = torch.from_numpy(spread * rng.uniform(0.5, 2, TOKENS)).float()

    def summed(self, nodes_E: list[int], ranks_E: list[int]) -> Tensor:
        """As dispatchers sum: on each rank, then on its node, then over messages at the origin."""
        total_TC = torch.zeros((TOKENS, HIDDEN + 1), dtype=torch.int32)
        for node in sorted(set(nodes_E)):
            node_TC = torch.zeros_like(total_TC)
            for rank in sorted(set(ranks_E)):
                here_TK = np.array([[e >= 0 and nodes_E[e] == node and ranks_E[e] == rank
                                     for e in row] for row in self.experts_TK])  # fmt: skip
                rows = here_TK.any(axis=1).nonzero()[0]
                y_PH = self.y_TKH[torch.from_numpy(here_TK)]
                pairs = pairs_at(here_TK[rows], self.weights_TK[rows])
                add_rows(node_TC, fixed_sum(y_PH, pairs, self.range_T[rows]), rows)
            message = pack_sums(node_TC, self.dtype)
            add_rows(total_TC, unpack_sums(message, TOKENS, HIDDEN), np.arange(TOKENS))
        return total_TC

    def expected(self) -> tuple[list[list[int]], list[int]]:
        """Totals and refused pairs by the formula, in fp32 scalars and Python's integers."""
        limit = (2**31 - 1) / TOP_K
        totals = [[0] * HIDDEN for _ in range(TOKENS)]
        refused = [0] * TOKENS
        for t in range(TOKENS):
            unit = np.float32(steps_per_range(self.dtype)) / np.float32(self.range_T[t])
            for k in range(TOP_K):
                if self.experts_TK[t, k] < 0:
                    continue
                factor = np.float32(self.weights_TK[t, k]) * unit
                with np.errstate(all="ignore"):
                    q_H = np.rint(self.y_TKH[t, k].float().numpy() * factor).astype(np.float64)
                if np.isfinite(q_H).all() and np.abs(q_H).max() < limit:
                    totals[t] = [a + int(b) for a, b in zip(totals[t], q_H, strict=True)]
                else:
                    refused[t] += 1
        return totals, refused


def pairs_at(here_RK: np.ndarray, weights_RK: Tensor) -> Pairs:
    """The pairs whose outputs are here, row by row."""
    return Pairs.of(np.where(here_RK, 0, -1), weights_RK.numpy())


groupings = st.tuples(
    st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS),
    st.lists(st.integers(0, 2), min_size=EXPERTS, max_size=EXPERTS),
)


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-6, 1e-3, 0.3, 10.0, 1e4]),
    peculiar=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 6e4, -3e4, 0.0]), max_size=3),
    first=groupings,
    second=groupings,
)
@settings(max_examples=150, deadline=None)
def test_exact_and_the_same_in_every_grouping(seed, dtype, spread, peculiar, first, second) -> None:
    """From ranges that hold everything to ranges that nearly everything escapes or is refused."""
    batch = Batch(seed, dtype, spread, peculiar)
    total_TC = batch.summed(*first)
    totals, refused = batch.expected()
    assert total_TC[:, :HIDDEN].tolist() == totals
    assert total_TC[:, HIDDEN].tolist() == refused
    assert torch.equal(batch.summed(*second), total_TC)
    out_TH = to_floats(total_TC, batch.range_T, dtype)
    assert out_TH.dtype == dtype
    assert torch.equal(out_TH.isnan().all(dim=1), torch.tensor(refused) > 0)
    assert torch.equal(out_TH.isnan().any(dim=1), torch.tensor(refused) > 0)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2**15), (torch.float32, 2**22)])
def test_error_against_fp64(dtype, steps) -> None:
    """K pairs of half a step each, then one rounding to the dtype."""
    rng = np.random.default_rng(0)
    y_TKH = torch.from_numpy(rng.standard_normal((50, 8, 300))).to(dtype)
    weights_TK = torch.from_numpy(rng.random((50, 8))).float()
    range_T = torch.from_numpy(rng.uniform(10, 40, 50)).float()
    pairs = pairs_at(np.ones((50, 8), dtype=bool), weights_TK)
    total_TC = fixed_sum(y_TKH.flatten(0, 1), pairs, range_T)
    out_TH = to_floats(total_TC, range_T, dtype).double()
    exact_TH = (y_TKH.double() * weights_TK.double()[:, :, None]).sum(dim=1)
    step_T1 = range_T.double()[:, None] / steps
    rounding = torch.finfo(dtype).eps / 2 * exact_TH.abs()
    assert ((out_TH - exact_TH).abs() <= 4.02 * step_T1 + 1.01 * rounding).all()
    error_T = (total_TC[:, :-1] * step_T1 - exact_TH).norm(dim=1)
    rms_T = step_T1[:, 0] * math.sqrt(8 / 12) * math.sqrt(300)  # uniform rounding errors
    if dtype == torch.bfloat16:  # in fp32 the products' own rounding is of the same size
        assert ((error_T > 0.85 * rms_T) & (error_T < 1.15 * rms_T)).all()


def test_many_rows_equal_one_row() -> None:
    rng = np.random.default_rng(1)
    here_RK = rng.random((350, 2)) < 0.7
    weights_RK, range_R = torch.rand(350, 2), torch.rand(350) + 5
    pairs = pairs_at(here_RK, weights_RK)
    y_PH = torch.from_numpy(rng.standard_normal((len(pairs), 2000))).bfloat16()
    y_PH[300] *= 1e6  # from here on more than fp32 can add up
    total_RC = fixed_sum(y_PH, pairs, range_R)
    assert total_RC.abs().sum() > 0
    for r in (0, 1, 130, 131, int(pairs.rows_P[300]), 349):
        one = slice(r, r + 1)
        y_VH = y_PH[torch.from_numpy(pairs.rows_P == r)]
        alone = fixed_sum(y_VH, pairs_at(here_RK[one], weights_RK[one]), range_R[one])
        assert torch.equal(alone[0], total_RC[r])
    assert not fixed_sum(y_PH[:0], pairs_at(here_RK & False, weights_RK), range_R).any()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_range_that_cannot_be_refuses_the_row(bad) -> None:
    y_PH = torch.ones(2, 3, dtype=torch.bfloat16)
    ranges = torch.tensor([bad, 1.0])
    total = fixed_sum(y_PH, pairs_at(np.ones((2, 1), dtype=bool), torch.ones(2, 1)), ranges)
    assert total[:, -1].tolist() == [1, 0]
    out = to_floats(total, ranges, torch.bfloat16)
    assert out[0].isnan().all()
    assert out[1].tolist() == [1, 1, 1]


# --- messages -------------------------------------------------------------------------------------

int32s = st.one_of(
    st.integers(-(2**15) - 2, 2**15 + 2), st.integers(-(2**31), 2**31 - 1), st.just(0)
)


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 9)),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_messages_say_all(shape, data, dtype) -> None:
    rows, hidden = shape
    size = rows * hidden
    channels = data.draw(st.lists(int32s, min_size=size, max_size=size))
    refused = data.draw(st.lists(st.integers(0, 8), min_size=rows, max_size=rows))
    total_VC = torch.zeros((rows, hidden + 1), dtype=torch.int32)
    total_VC[:, :hidden] = torch.tensor(channels, dtype=torch.int64).view(rows, hidden)
    total_VC[:, hidden] = torch.tensor(refused)
    message = pack_sums(total_VC, dtype)
    assert message.dtype == torch.uint8
    assert torch.equal(unpack_sums(message, rows, hidden), total_VC)
    unaligned = torch.cat([message.new_zeros(1), message])[1:]
    assert torch.equal(unpack_sums(unaligned, rows, hidden), total_VC)
    escapes = sum(r > 0 for r in refused)
    body = 4 * size
    if dtype != torch.float32:
        escapes += sum(not -(2**15) <= c < 2**15 for c in channels)
        body = (2 * size + 3) // 4 * 4
    assert len(message) == 8 + body + 6 * escapes
    assert torch.equal(message, pack_sums(total_VC.clone(), dtype))


def test_a_message_of_another_shape_is_refused() -> None:
    message = pack_sums(torch.zeros((3, 5), dtype=torch.int32), torch.bfloat16)
    with pytest.raises(ValueError, match="expected 40 bytes of 4 rows of 4 channels"):
        unpack_sums(message, 4, 4)
