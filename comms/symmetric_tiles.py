"""How the kernels of the exchange cut their work: few rows want all of a GPU at once, many want overlap.

A program works on some channels of a row at a time: a *unit*. All ranks cut alike, by the number of rows
per source alone.
"""

from dataclasses import dataclass
from typing import Any

from comms.symmetric_layout import PROGRAMS, SymmetricLayout

_PART = 1024  # channels of a unit of 4 warps, 16 bytes to a thread
_LEAST_CHUNK = 3  # units between two signals: each waits for what the link still carries
_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """programs: that share the units; rounds: units of a program; chunk: of them between signals."""

    channels: int
    warps: int
    programs: int
    rounds: int
    chunk: int

    @property
    def options(self) -> dict[str, Any]:
        """A fused multiply-add would round once where `comms/reference.py` rounds twice."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """Measured on H200 at 7168 channels. programs: at most so many, None for what is fastest."""

    layout: SymmetricLayout
    multiprocessors: int
    programs: int | None = None

    def dispatch(self, num_rows: int) -> Tile:
        """Whole rows, two programs to a multiprocessor."""
        return self._tile(self._row, 16, 2 * self.multiprocessors, num_rows)

    def combine(self, num_rows: int) -> Tile:
        """Whole rows, all at once, where there are few; "fixed" always takes whole rows."""
        is_fixed, all_of_them = self.layout.combine == "fixed", self.multiprocessors
        if num_rows <= all_of_them:
            return self._tile(self._row, 32 if is_fixed else 16, all_of_them, num_rows)
        if is_fixed:
            return self._tile(self._row, 32, all_of_them, num_rows, overlaps=True)
        units = num_rows * -(-self.layout.hidden // _PART)
        return self._tile(min(_PART, self._row), 4, 4 * all_of_them, units, overlaps=True)

    @property
    def _row(self) -> int:
        return 1 << (self.layout.hidden - 1).bit_length()

    def _tile(
        self, channels: int, warps: int, most: int, units: int, *, overlaps: bool = False
    ) -> Tile:
        programs = min(units, self.programs or most, PROGRAMS)
        rounds = -(-units // programs)
        chunk = max(_LEAST_CHUNK, rounds // _CHUNKS) if overlaps else rounds
        return Tile(channels=channels, warps=warps, programs=programs, rounds=rounds, chunk=chunk)
