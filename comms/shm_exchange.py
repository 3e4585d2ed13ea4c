"""One exchange over the segments of a node: messages side by side in my segment, one wait a round.

The header of a round says where in my data each member's piece lies. Messages that do not fit
together go in R rounds, of which round r holds bytes [len * r // R, len * (r + 1) // R) of each:
so all members read at the same time, and nobody but the sender need know R or the lengths before.

    total: R | numbers: where the piece of member 0, 1, .. starts, and the end; lengths if R > 1
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from comms.segments import Segments


class ShmExchange:
    """A PendingExchange: its first round is posted when it is made, its peers' taken on finish.

    Parts are copied when they are posted; what is received is memory of its own (`into`, if given).
    """

    def __init__(
        self,
        segments: Segments,
        parts: Sequence[Tensor],
        stage: str,
        into: Sequence[Tensor] | None = None,
    ) -> None:
        self._segments, self._stage, self._into = segments, stage, into
        self._parts = parts
        self._received: list[Tensor] = list(into if into is not None else parts)
        self._lengths = [part.numel() for part in parts]
        self._lengths[segments.idx] = 0
        total, capacity = sum(self._lengths), segments.capacity
        # A piece is up to a byte longer than its share: hence room for one per member.
        self._rounds = 1 if total <= capacity else -(-total // (capacity - len(parts)))
        self._peer_rounds: dict[int, int] = {}
        self._arrived: dict[int, float] = {}
        self._round = 0
        self._done = False
        self.waits: list[float] = []
        self.finished = 0.0
        self._post()

    def wait(self) -> list[Tensor]:
        start = time.perf_counter()
        self.finish()
        self.waits = [0.0] * len(self._parts)
        for j, arrived in self._arrived.items():
            self.waits[j] = max(0.0, arrived - start)
        received, self._received, self._parts = self._received, [], ()
        return received

    def finish(self) -> None:
        """Take what the peers posted, and post and take the further rounds, if any."""
        if self._done:
            return
        self._take()
        while self._round + 1 < max(self._rounds, *self._peer_rounds.values()):
            self._round += 1
            self._segments.begin(self._stage)
            self._post()
            self._take()
        self._done = True
        self.finished = time.perf_counter()

    def _post(self) -> None:
        segments, r, rounds = self._segments, self._round, self._rounds
        memory, half = segments.memory[segments.idx], segments.half
        begin = segments.data_range(half)
        at, starts = begin, [0]
        for part, length in zip(self._parts, self._lengths, strict=True):
            if length and r < rounds:
                if rounds > 1:
                    part = part[length * r // rounds : length * (r + 1) // rounds]
                    length = part.numel()
                memory[at : at + length] = part
                at += length
            starts.append(at - begin)
        segments.set_header(
            half, self._stage, rounds, starts if rounds == 1 else starts + self._lengths
        )
        segments.post()

    def _take(self) -> None:
        segments, r, me = self._segments, self._round, self._segments.idx
        arrived = segments.wait(segments.peers, self._stage, progress=self._progress)
        begin = segments.data_range(segments.half)
        for j in segments.peers:
            rounds = segments.checked_total(j, self._stage)
            if r >= rounds:
                continue
            if j in arrived:
                self._arrived[j] = arrived[j]
            start, stop = segments.numbers(j, me, me + 2)
            piece = segments.memory[j][begin + start : begin + stop]
            if r == 0:
                self._peer_rounds[j] = rounds
                length = stop - start if rounds == 1 else self._announced(j)
                if self._into is not None:
                    self._check_length(j, length)
                elif rounds == 1:
                    self._received[j] = piece.clone()
                    continue
                else:
                    self._received[j] = torch.empty(length, dtype=torch.uint8)
            if start < stop:
                first = self._received[j].numel() * r // rounds
                self._received[j][first : first + stop - start] = piece

    def _announced(self, peer: int) -> int:
        """The length of the whole message, where it comes in several rounds."""
        i = len(self._parts) + 1 + self._segments.idx
        return self._segments.numbers(peer, i, i + 1)[0]

    def _check_length(self, peer: int, length: int) -> None:
        segments, expected = self._segments, self._received[peer].shape[0]
        if length != expected:
            raise segments.fail(
                f"rank {segments.ranks[peer]} sends {length} bytes in {self._stage} "
                f"but rank {segments.ranks[segments.idx]} expects {expected}"
            )

    def _progress(self, peers: Sequence[int]) -> Mapping[int, tuple[int, int | None]]:
        """By world rank: bytes received so far, and of how many, if that is known yet."""
        ranks = self._segments.ranks
        if self._round == 0 and self._into is None:
            return {ranks[j]: (0, None) for j in peers}
        lengths = {j: self._received[j].numel() for j in peers}
        return {
            ranks[j]: (min(n, n * self._round // self._peer_rounds.get(j, 1)), n)
            for j, n in lengths.items()
        }
