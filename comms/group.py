"""What every group of ranks can do, whatever carries the bytes.

All members call the same operations in the same order. Any dtype works (bfloat16, float8, int64...)
and any shape, including zero rows. Sums run in rank order in fp32 (fp64 and integers in themselves)
and are cast back, so a sum has the same bits on every rank, every run and every implementation.
Every wait has a deadline; after an error a group stays unusable and the caller builds the next one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor


class CommError(RuntimeError):
    """A collective could not finish: a peer died, the group was aborted, or the calls disagree."""


class CommTimeout(CommError):  # noqa: N818  (a timeout is named by what happened)
    """Peers did not arrive before the deadline.

    The message names where the rank was (`where`: step and layer), who waited for whom in which
    `operation` (or stage of an exchange), how many bytes of theirs had come (`progress`: by silent
    rank, received and expected bytes, expected None while unannounced), and `because`: what the
    silent peers themselves were waiting for, if they said.
    """

    def __init__(
        self,
        *,
        group: str,
        operation: str,
        rank: int,
        silent: Sequence[int],
        deadline_s: float,
        where: str = "",
        progress: Mapping[int, tuple[int, int | None]] | None = None,
        because: str = "",
    ) -> None:
        self.group = group
        self.operation = operation
        self.rank = rank
        self.silent = tuple(silent)
        self.deadline_s = deadline_s
        self.where = where
        self.progress = dict(progress or {})
        self.because = because
        super().__init__(self._message())

    def _message(self) -> str:
        prefix = f"{self.where}, " if self.where else ""
        who = ", ".join(f"rank {rank}{self._received(rank)}" for rank in self.silent)
        because = f"; {self.because}" if self.because else ""
        return (
            f"{prefix}group {self.group!r}: rank {self.rank} waited {self.deadline_s:g} s in "
            f"{self.operation} for {who or 'peers that could not be identified'}{because}"
        )

    def _received(self, rank: int) -> str:
        if rank not in self.progress:
            return ""
        received, expected = self.progress[rank]
        of = "an unannounced message" if expected is None else f"{expected:,}"
        return f" (received {received:,} bytes of {of})"

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.group, self.operation, self.rank, self.silent, self.deadline_s)
        return _rebuild_timeout, (*fields, self.where, self.progress, self.because)


def _rebuild_timeout(
    group: str,
    operation: str,
    rank: int,
    silent: tuple[int, ...],
    deadline_s: float,
    where: str,
    progress: dict[int, tuple[int, int | None]],
    because: str,
) -> CommTimeout:
    return CommTimeout(
        group=group,
        operation=operation,
        rank=rank,
        silent=silent,
        deadline_s=deadline_s,
        where=where,
        progress=progress,
        because=because,
    )


class PendingExchange(Protocol):
    """An exchange under way. Several may be; they finish in the order in which they started."""

    def wait(self) -> list[Tensor]:
        """What each member sent me, in group order, flat uint8; my own part is what I passed.

        The group's deadline counts from this call. Call it once.
        """

    @property
    def waits(self) -> list[float]:
        """After wait: seconds by member from the call of wait until its bytes were here (>= 0)."""

    @property
    def finished(self) -> float:
        """After wait: time.perf_counter() at which the last byte was here."""


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

    def exchange(self, parts: Sequence[Tensor], stage: str) -> list[Tensor]:
        """parts[j], flat uint8 of any length, to member j; returns what each member sent me.

        Receivers need not know lengths. `stage` names the exchange in errors; it is the same on
        every member. The same as start_exchange([parts], stage).wait().
        """

    def start_exchange(self, chunks: Iterable[Sequence[Tensor]], stage: str) -> PendingExchange:
        """Like exchange, but returns before the bytes have arrived, and takes them in chunks.

        Each chunk has one part per member and is sent as soon as `chunks` yields it, so that making
        the next one overlaps with sending; a member receives its parts of all chunks in one piece.
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
