"""What every group of ranks can do, whatever carries the bytes.

All members call the same operations in the same order. Any dtype works (bfloat16, float8, int64...)
and any shape, including zero rows. Sums run in rank order in fp32 (fp64 and integers in themselves)
and are cast back, so a sum has the same bits on every rank, every run and every implementation.
Every wait has a deadline; after an error a group stays unusable and the caller builds the next one.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class CommError(RuntimeError):
    """A collective could not finish: a peer died, the group was aborted, or the calls disagree."""


class CommTimeout(CommError):  # noqa: N818  (a timeout is named by what happened)
    """Peers did not arrive before the deadline; the message names who waited for whom, in what."""

    def __init__(
        self, *, group: str, operation: str, rank: int, silent: Sequence[int], deadline_s: float
    ) -> None:
        who = f"ranks {list(silent)}" if silent else "peers that could not be identified"
        super().__init__(
            f"group {group!r}: rank {rank} waited {deadline_s:g} s in {operation} for {who}"
        )
        self.group = group
        self.operation = operation
        self.rank = rank
        self.silent = tuple(silent)
        self.deadline_s = deadline_s

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.group, self.operation, self.rank, self.silent, self.deadline_s)
        return _rebuild_timeout, fields


def _rebuild_timeout(
    group: str, operation: str, rank: int, silent: tuple[int, ...], deadline_s: float
) -> CommTimeout:
    return CommTimeout(
        group=group, operation=operation, rank=rank, silent=silent, deadline_s=deadline_s
    )


class Group(Protocol):
    """Ranks that communicate. `ranks` are world ranks in group order; `idx` is my position in it.

    `timeout_s` on a call replaces the group's deadline for that call only.
    Raises CommTimeout or CommError as described there, ValueError for arguments that cannot fit.
    """

    @property
    def name(self) -> str: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def idx(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x [sizes[idx], ...] -> [sum(sizes), ...], the members' rows in group order."""

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x [sum(sizes), ...] -> [sizes[idx], ...], my rows summed over the members."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """x of one shape everywhere -> the sum over the members, a new tensor."""

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        """x [sum(send_sizes), ...], rows by destination -> [sum(recv_sizes), ...], rows by source.

        send_sizes[j] here equals recv_sizes[my idx] at member j; zeros are fine.
        """

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The source's x on every member; others pass a tensor of the same shape and dtype."""

    def broadcast_bytes(
        self, data: bytes | None, source: int, timeout_s: float | None = None
    ) -> bytes:
        """The source's bytes on every member; others pass None and need not know the length."""

    def barrier(self, timeout_s: float | None = None) -> None:
        """Return when every member has arrived."""

    def abort(self) -> None:
        """Make this group unusable, here and for the peers waiting in it. From any thread."""

    def close(self) -> None:
        """Free memory and sockets. Call it when every member is past its last operation."""
