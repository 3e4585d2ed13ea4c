"""Whether a constraint can be kept, found out before any engine sees it.

A grammar from a client may take for ever, or all the memory, or crash the compiler: it is tried in a
process of its own, which can be ended. What came through once is not tried again.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Final

from cluster.engine.constraint import Constraint
from cluster.engine.guided import check_support
from cluster.server.child_process import ChildError, ChildProcess, EndedError, TooSlowError
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
        self._process: ChildProcess | None = None

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
        if self._process:
            self._process.close()

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
        process = self._running()
        try:
            process.ask(json.dumps(asdict(constraint)).encode(), self._time_limit_s)
        except TooSlowError as error:
            return f"constraint.{constraint.kind} {error} to compile"
        except EndedError:
            return f"constraint.{constraint.kind} is too large or too deep to compile"
        except ChildError as error:
            return str(error)
        return None

    def _running(self) -> ChildProcess:
        """A process that tries constraints; raises RequestError."""
        if self._process is None or self._process.ended:
            try:
                self._process = ChildProcess(
                    _WORKER, MEMORY_MIB, *self._arguments, start_timeout_s=START_TIMEOUT_S
                )
            except (TooSlowError, EndedError, OSError) as error:
                raise RequestError(
                    Code.UNAVAILABLE, f"the process that tries constraints does not start: {error}"
                ) from None
            except ChildError as error:
                raise RequestError(Code.FAILED_PRECONDITION, str(error)) from None
        return self._process
