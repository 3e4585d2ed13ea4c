"""Whether a constraint can be kept, found out before any engine sees it.

A grammar from a client may take for ever, or all the memory, or crash the compiler: it is tried in a
process of its own, which can be ended. What came through once is not tried again.
"""

import asyncio
import json
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final

from cluster.engine.constraint import Constraint
from cluster.engine.guided import check_support
from cluster.server.errors import Code, RequestError

START_TIMEOUT_S: Final = 60.0
TIME_LIMIT_S: Final = 5.0
MEMORY_MIB: Final = 1024
_WORKER = Path(__file__).with_name("constraint_worker.py")
_REMEMBERED = 1024


class ConstraintCheck:
    """For one model; its process starts on first use, and again after it was ended."""

    def __init__(
        self,
        model_dir: str | Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self._model_dir = Path(model_dir)
        self._eos_token_ids = tuple(eos_token_ids)
        self._arguments = [str(model_dir), vocab_size, *eos_token_ids]
        self._time_limit_s = time_limit_s
        self._known: OrderedDict[Constraint, str | None] = OrderedDict()
        # Of its own: whoever waits here must not keep others from tokenizing.
        self._thread = ThreadPoolExecutor(1, "constraints")
        self._connection: Connection | None = None
        self._end: weakref.finalize[..., Any] | None = None

    async def check(self, constraint: Constraint) -> None:
        """Raises RequestError with the reason why the constraint is refused."""
        if constraint in self._known:
            reason = self._known[constraint]
        else:
            try:
                check_support(self._model_dir, self._eos_token_ids)
            except ValueError as error:
                raise RequestError(Code.FAILED_PRECONDITION, str(error)) from None
            loop = asyncio.get_running_loop()
            reason = await loop.run_in_executor(self._thread, self._try_once, constraint)
        if reason:
            raise RequestError(Code.INVALID_ARGUMENT, reason)

    def close(self) -> None:
        """End the process, if it runs."""
        if self._end:
            self._end()
        self._connection = None

    def _try_once(self, constraint: Constraint) -> str | None:
        """What is wrong with it. Whoever waited for the same one need not have it tried again."""
        if constraint in self._known:
            return self._known[constraint]
        reason = self._known[constraint] = self._try(constraint)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return reason

    def _try(self, constraint: Constraint) -> str | None:
        """What is wrong with it."""
        try:
            connection = self._connection or self._start()
            connection.send_bytes(json.dumps(asdict(constraint)).encode())
            if not connection.poll(self._time_limit_s):
                self.close()
                limit = f"{self._time_limit_s:g} s"
                return f"constraint.{constraint.kind} takes longer than {limit} to compile"
            error: str | None = json.loads(connection.recv_bytes()).get("error")
            return error
        except (OSError, EOFError):
            self.close()
            return f"constraint.{constraint.kind} is too large or too deep to compile"

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            arguments = [theirs.fileno(), MEMORY_MIB, *self._arguments]
            process = subprocess.Popen(
                # -I: neither the environment nor the working directory decides what is imported.
                [sys.executable, "-I", str(_WORKER), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._end = weakref.finalize(self, _end, process, ours)
        if not ours.poll(START_TIMEOUT_S):
            self.close()
            raise RequestError(
                Code.UNAVAILABLE,
                f"the process that tries constraints did not start within {START_TIMEOUT_S:g} s",
            )
        if error := json.loads(ours.recv_bytes()).get("error"):
            self.close()
            raise RequestError(Code.FAILED_PRECONDITION, error)
        self._connection = ours
        return ours


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
