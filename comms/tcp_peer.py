"""One connection to one member: frames out of what leaves, messages out of what comes.

    frame:  payload bytes (8) | call (4) | flags (1) | length of the name (1) | name | payload

`call` counts the group's operations and `name` says which one it is, so that members that disagree
are found out. A message is one or more frames of one call, the last of them flagged. Everything here
is non-blocking: `flush` and `receive` do what the kernel lets them do at once.
"""

import socket
import struct
import time
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

_HEAD = struct.Struct("<QIBB")
_LAST, _ABORT = 1, 2
_BUFFER_BYTES = 16 * 1024  # small messages come through it, several in one call of the kernel
_MAX_BUFFERS = 32  # per call of the kernel
_WAKE_BYTES = 256 * 1024  # of a long message: wake for this many, not for every packet


class Inbox:
    """The message that one operation expects from one member."""

    __slots__ = ("call", "done", "expected", "finished", "name", "parts", "received", "view")

    def __init__(self, call: int, name: bytes, slot: Tensor | None) -> None:
        self.call, self.name = call, name
        self.parts: list[Tensor] = [] if slot is None else [slot]
        self.expected = None if slot is None else slot.shape[0]  # None: until the last frame
        self.view = None if slot is None else memory_of(slot)
        self.received = 0
        self.done = False
        self.finished = 0.0


class Peer:
    """One member and the connection to it; `rank` and `my_rank` are for errors.

    `fault` says why no more will come and go: it went away, it aborted (`aborted`), or it called
    another operation than I did (`disagrees`).
    """

    def __init__(self, sock: socket.socket, rank: int, my_rank: int) -> None:
        self.sock, self.fd = sock, sock.fileno()
        self.rank, self._my_rank = rank, my_rank
        self.expected: deque[Inbox] = deque()
        self.fault: str | None = None
        self.disagrees = False
        self.aborted = False
        self.queued = 0  # bytes ever put into the queue
        self.sent = 0  # bytes of them that the kernel has taken
        self._queue: deque[memoryview] = deque()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._lo = self._hi = 0
        self._target: memoryview | None = None  # rest of the open frame's payload
        self._last = False
        self._low_water = 1

    # -- out ---------------------------------------------------------------------------------

    def send(self, call: int, name: bytes, payload: Tensor | None, last: bool) -> None:
        num_bytes = 0 if payload is None else payload.shape[0]
        self._put(memoryview(_HEAD.pack(num_bytes, call, last, len(name)) + name))
        if payload is not None and num_bytes:
            self._put(memory_of(payload))
        self.flush()

    def send_abort(self, reason: str) -> None:
        """Tell the other side, unless that would land in the middle of a frame."""
        if not self._queue and self.fault is None:
            name = reason.encode()[:255]
            self._put(memoryview(_HEAD.pack(0, 0, _ABORT, len(name)) + name))
            self.flush()

    def hang_up(self) -> None:
        """Nothing more will leave; what has left still arrives."""
        with suppress(OSError):  # the other side was faster
            self.sock.shutdown(socket.SHUT_WR)

    def _put(self, data: memoryview) -> None:
        self._queue.append(data)
        self.queued += data.nbytes

    def flush(self) -> None:
        queue = self._queue
        while queue and self.fault is None:
            buffers = [queue[i] for i in range(min(len(queue), _MAX_BUFFERS))]
            try:
                sent = self.sock.sendmsg(buffers)
            except BlockingIOError:
                return
            except OSError as error:
                self.receive()  # its last words may say why
                self._lose(error.strerror or str(error))
                return
            self.sent += sent
            for data in buffers:
                if sent < data.nbytes:
                    queue[0] = data[sent:]
                    break
                sent -= data.nbytes
                queue.popleft()

    @property
    def unsent(self) -> int:
        return self.queued - self.sent

    # -- in ----------------------------------------------------------------------------------

    def expect(self, inbox: Inbox) -> bool:
        """An operation wants a message. Returns what `receive` returns."""
        self.expected.append(inbox)
        return self._lo == self._hi or self.receive()  # it may be here, where no poll sees it

    def receive(self) -> bool:
        """Take what has come. False when more may be there but no operation expects it yet."""
        while self.fault is None:
            if self._target is not None:
                if not self._fill_target():
                    return True
            elif not self._open_frame():
                if self._is_ahead():
                    return False
                if not self._fill_buffer():
                    return True
        return True

    def _is_ahead(self) -> bool:
        """Whether a whole header lies here that no operation of ours has asked for."""
        return self._head() is not None and not self.expected

    def _head(self) -> tuple[int, int, int, bytes] | None:
        """(payload bytes, call, flags, name) of the next frame, once its header is here."""
        here = self._hi - self._lo
        if here < _HEAD.size:
            return None
        num_bytes, call, flags, length = _HEAD.unpack_from(self._buffer, self._lo)
        if here < _HEAD.size + length:
            return None
        start = self._lo + _HEAD.size
        return num_bytes, call, flags, bytes(self._buffer[start : start + length])

    def _open_frame(self) -> bool:
        """Begin with the next frame, if its header is here and somebody expects it."""
        head = self._head()
        if head is None:
            return False
        num_bytes, call, flags, name = head
        if flags & _ABORT:
            self.aborted = True
            self._lose(name.decode(errors="replace"))
            return True
        if not self.expected:
            return False
        inbox = self.expected[0]
        if (call, name) != (inbox.call, inbox.name):
            theirs, mine = name.decode(errors="replace"), inbox.name.decode()
            if theirs == mine:
                theirs, mine = f"{theirs} (call {call})", f"{mine} (call {inbox.call})"
            self._disagree(f"called {theirs} while rank {self._my_rank} called {mine}")
            return True
        last = bool(flags & _LAST)
        total = inbox.received + num_bytes
        if inbox.view is not None:
            if total != inbox.expected and (last or total > inbox.view.nbytes):
                self._disagree(
                    f"brings {total} bytes to {name.decode()} but rank {self._my_rank} "
                    f"expects {inbox.expected}"
                )
                return True
            self._target = inbox.view[inbox.received : total]
        else:
            part = torch.empty(num_bytes, dtype=torch.uint8)
            inbox.parts.append(part)
            self._target = memory_of(part)
            if last:
                inbox.expected = total
        self._lo += _HEAD.size + len(name)
        self._last = last
        if num_bytes == 0:
            self._close_frame(inbox)
        return True

    def _fill_target(self) -> bool:
        """Bytes for the open frame, from the buffer first; False when there are no more now."""
        target, inbox = self._target, self.expected[0]
        assert target is not None
        here = min(self._hi - self._lo, target.nbytes)
        if here:
            target[:here] = self._buffer[self._lo : self._lo + here]
            self._lo += here
        elif target.nbytes < _BUFFER_BYTES // 2:  # what follows comes along in the same call
            return self._fill_buffer() or self._wake_for(target.nbytes)
        else:
            here = self._receive_into(target)
            if here == 0:
                return self._wake_for(target.nbytes)
        inbox.received += here
        self._target = target[here:]
        if here == target.nbytes:
            self._close_frame(inbox)
        return True

    def _close_frame(self, inbox: Inbox) -> None:
        self._target = None
        self._wake_for(1)
        if self._last:
            inbox.done = True
            inbox.finished = time.perf_counter()
            inbox.view = None
            self.expected.popleft()

    def _fill_buffer(self) -> bool:
        if self._lo == self._hi:
            self._lo = self._hi = 0
        elif self._lo:
            rest = bytes(self._buffer[self._lo : self._hi])
            self._buffer[: len(rest)] = rest
            self._lo, self._hi = 0, len(rest)
        here = self._receive_into(self._buffer[self._hi :])
        self._hi += here
        return here > 0

    def _receive_into(self, view: memoryview) -> int:
        """0 when nothing is there now, or ever will be (then `fault` says so)."""
        try:
            here = self.sock.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lose(error.strerror or str(error))
            return 0
        if here == 0:
            self._lose("the connection was closed")
        return here

    def _wake_for(self, num_bytes: int) -> bool:
        """Let the kernel report the socket as readable only when that many bytes are there.

        False: nothing is there now.
        """
        low_water = max(1, min(num_bytes, _WAKE_BYTES))
        if low_water != self._low_water and self.fault is None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        return False

    def _lose(self, reason: str) -> None:
        self.fault = self.fault or reason
        self._queue.clear()

    def _disagree(self, reason: str) -> None:
        self.disagrees = True
        self._lose(f"rank {self.rank} {reason}")


def memory_of(part: Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor themselves, not a copy."""
    return memoryview(part.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
