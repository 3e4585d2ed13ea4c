"""How far rows are from what they should be."""

import torch


def relative_l2(got, want, terms=None):
    """The worst row's ||got - want|| / ||want||; a row of zeros or a NaN counts as 1 or more.

    Where what is added up cancels, rounding is in proportion to `terms`, the sums of magnitudes, and
    is divided by those.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double().flatten(0, -2), want.double().flatten(0, -2)
    size = (want if terms is None else terms.double().flatten(0, -2)).norm(dim=1)
    assert not bool((want.norm(dim=1) < 5e-3 * size).any()), "zeros would be near enough"
    error = (got - want).norm(dim=1) / size.clamp(min=1e-30)
    return float(torch.nan_to_num(error, nan=1e9).max())


def assert_same_rows(got, want):
    """Quantised rows of the same bytes."""
    assert torch.equal(got.q_RH.view(torch.uint8), want.q_RH.view(torch.uint8))
    torch.testing.assert_close(got.scale_RB, want.scale_RB, rtol=0, atol=0, equal_nan=True)
