"""The residual stream of a replica, and how its rows go from one block of a layer to the next.

Norms belong to it: they add what the last block left, and stand where rows are exchanged if the replica has
several ranks (see `tensor_parallel`).

Legend: T rows of the replica, O this rank's own rows, H hidden, L logit rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from cluster.model.cuda.ops import Added, Ops
from cluster.model.cuda.weights import Matrix, Norm
from experts.kernels.types import NormedRows


class Stream(NamedTuple):
    """Own rows of the residual stream: x_OH, and what is still to be added to it, None if nothing is."""

    x_OH: Tensor
    added_OH: Added | None = None

    def rows(self, rows_L: Tensor) -> Stream:
        """Some rows of it."""
        x_LH, added_OH = self.x_OH.index_select(0, rows_L), self.summed_OH
        return Stream(x_LH, None if added_OH is None else added_OH.index_select(0, rows_L))

    @property
    def summed_OH(self) -> Tensor | None:
        """`added_OH` as rows."""
        if self.added_OH is None or isinstance(self.added_OH, Tensor):
            return self.added_OH
        return self.added_OH.sum()

    def normed(self, norm: Norm, ops: Ops) -> tuple[NormedRows, Tensor]:
        """(norm of the sum, the sum)."""
        if self.added_OH is None:
            return ops.rms_norm(self.x_OH, norm), self.x_OH
        return ops.add_rms_norm(self.added_OH, self.x_OH, norm)


class Mlp(Protocol):
    """What every token goes through after attention: own rows in, own rows out."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def reads_float8(self) -> bool: ...
    def forward(self, rows: NormedRows, num_tokens: Tensor | None = None) -> Tensor: ...


class Replica(Protocol):
    """Moves of rows; all bfloat16 but the logits. Every rank of the replica, `idx` among them, makes the
    same, and has the rows from idx * O on."""

    @property
    def idx(self) -> int: ...

    def expect(self, num_rows: int) -> None:
        """T of the coming pass."""

    def num_own(self, num: int) -> int:
        """O for a pass of that many rows."""

    def own_tokens(self, num_tokens: Tensor, num_own: int) -> Tensor:
        """How many of the O own rows are tokens: int32 [1] from int32 [1], on the device."""

    def embed(self, ids_T: Tensor, embedding: Tensor) -> Stream: ...

    def gather(self, stream: Stream, norm: Norm) -> tuple[NormedRows, Tensor]:
        """(norm of all rows [T, H], the stream's sum [O, H])."""

    def scatter(self, parts_TH: Tensor, x_OH: Tensor, norm: Norm) -> tuple[NormedRows, Tensor]:
        """From this rank's parts of all rows: (norm of the sum, x + the ranks' sum), [O, H] both."""

    def divided(self, mlp: Mlp) -> Mlp:
        """An MLP of whose channels this rank has its part, as one of own rows."""

    def logits(self, stream: Stream, norm: Norm, rows_L: Tensor, head: Matrix) -> Tensor:
        """fp32 [L, V]."""

    def check(self) -> None:
        """Raise CommTimeout or CommError if a rank failed in a pass that is over."""


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """A replica of a single rank: all rows are its own, all heads, channels and words too."""

    ops: Ops
    idx: int = 0

    def expect(self, num_rows: int) -> None:
        pass

    def num_own(self, num: int) -> int:
        return num

    def own_tokens(self, num_tokens: Tensor, num_own: int) -> Tensor:
        return num_tokens

    def embed(self, ids_T: Tensor, embedding: Tensor) -> Stream:
        return Stream(F.embedding(ids_T, embedding))

    def gather(self, stream: Stream, norm: Norm) -> tuple[NormedRows, Tensor]:
        return stream.normed(norm, self.ops)

    def scatter(self, parts_TH: Tensor, x_OH: Tensor, norm: Norm) -> tuple[NormedRows, Tensor]:
        return Stream(x_OH, parts_TH).normed(norm, self.ops)

    def divided(self, mlp: Mlp) -> Mlp:
        return mlp

    def logits(self, stream: Stream, norm: Norm, rows_L: Tensor, head: Matrix) -> Tensor:
        normed, _ = stream.rows(rows_L).normed(norm, self.ops)
        return self.ops.linear(normed, head).float()

    def check(self) -> None:
        pass
