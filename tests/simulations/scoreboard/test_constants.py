"""The calibrations of published figures: what is committed is what the figures give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations.hardware import calibration as hardware
from simulations.hardware.calibration import Calibration
from simulations.scoreboard import constants
from simulations.scoreboard.targets import read_targets

DATA = Path(hardware.__file__).parent / "data"


@pytest.mark.parametrize("name", constants.NAMES)
def test_files_are_made_of_the_published_figures(name: str) -> None:
    assert (DATA / f"{name}.json").read_text(encoding="utf-8") == constants.text(name)


def test_products_take_what_their_published_speed_says() -> None:
    table = Calibration.named("h800-deepep-v1").tables["gemm/float8/7168x16384"]
    flop = 2 * 64 * 7168 * 16384
    assert float(table.at(tokens=64)) == pytest.approx(flop / 336e12, rel=1e-3)
    assert float(table.at(tokens=128)) == pytest.approx(50e-6)
    assert float(table.at(tokens=8192)) == pytest.approx(1652e-6 * 108 / 132, rel=1e-3)


def test_grouped_products_are_those_of_both_profiles() -> None:
    table = Calibration.named("h800-deepep-v1").tables["grouped_gemm/float8/7168x2048"]
    decode = float(table.at(experts=2, tokens_per_expert=512))
    assert decode == pytest.approx((81 + 8 + 39) * 1e-6, rel=0.01)
    prefill = float(table.at(experts=8, tokens_per_expert=8192))
    kernels = 3534 + 2381 + 728 + 314 + 594
    assert prefill == pytest.approx(kernels * 1e-6 * 108 / 132, rel=0.02)


def test_more_tokens_and_more_experts_never_take_less() -> None:
    for name in constants.NAMES:
        for table in Calibration.named(name).tables.values():
            values = table.values
            for axis in range(values.ndim):
                assert (values.take(range(1, values.shape[axis]), axis) >= values.take(
                    range(values.shape[axis] - 1), axis
                )).all()  # fmt: skip


def test_no_constant_is_a_blind_figure() -> None:
    source = Path(constants.__file__).read_text(encoding="utf-8").replace("_", "")
    numbers = {float(text) for text in re.findall(r"\d+(?:\.\d+)?", source)}
    figures = {target.published for target in read_targets() if target.blind}
    assert len(figures) > 10
    assert not figures & numbers
