"""A load generator in a process of its own, so that measuring costs the measured as little as it can.

It runs niced, as ranks are: on a machine that it shares with them the gateway goes first. Its processor time
is part of every result, for that is what the server did not get.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import process_time

from cluster.server.client import AsyncClient, Client
from simulations.bench.helper_process import HelperError, HelperProcess
from simulations.bench.load_client import Tally, send_load
from simulations.bench.serving_load import Load, Planned
from simulations.bench.serving_outcomes import Outcome

NICENESS = 5
_PROGRESS_S = 0.25
_STOP_S = 20.0
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Progress:
    """Of a load that is under way."""

    seconds: float
    num_sent: int
    num_ended: int
    num_tokens: int


@dataclass(frozen=True)
class Sent:
    """A load that has ended, or was `interrupted`. `cpu_s`: processor time of the generator."""

    outcomes: list[Outcome]
    seconds: float
    cpu_s: float
    interrupted: bool = False


class LoadProcess(HelperProcess):
    """Sends loads to one endpoint, one after the other; use it as a context.

    Raises ClientError where nobody answers there.
    """

    def __init__(self, endpoint: str, niceness: int = NICENESS) -> None:
        with Client(endpoint) as client:
            model = client.model_info()
        self._vocab_size, self._max_model_len = model.vocab_size, model.max_model_len
        super().__init__(
            "the load generator", _generate, endpoint, niceness, patience_s=_PATIENCE_S
        )

    def run(
        self,
        load: Load,
        show: Callable[[Progress], None] = lambda progress: None,
        *,
        first: int | None = None,
    ) -> Sent:
        """Send all requests of the load, or the `first` so many of them.

        Ctrl-C ends it early and keeps what there is: see `Sent.interrupted`. Raises ValueError for a
        load that does not fit the model, HelperError if the generator fails.
        """
        self.send((load, load.plan(self._vocab_size, self._max_model_len)[:first]))
        interrupted = False
        while True:
            try:
                answer = self.receive(_STOP_S if interrupted else None)
                if isinstance(answer, Sent):
                    return answer
                show(answer)
            except KeyboardInterrupt:
                interrupted = True
                self.send(None)


def _generate(pipe: Connection, endpoint: str, niceness: int) -> None:
    """What the process does until its pipe ends."""
    os.nice(niceness)
    gc.freeze()
    asyncio.run(_send_all(pipe, endpoint))


async def _send_all(pipe: Connection, endpoint: str) -> None:
    async with AsyncClient(endpoint, max_retries=0) as client:
        while True:
            task: tuple[Load, list[Planned]] | None = await asyncio.to_thread(pipe.recv)
            if task is None:
                continue  # Ctrl-C as the last load ended
            try:
                pipe.send(await _send(pipe, client, *task))
            except Exception as error:  # noqa: BLE001 - the parent says it
                pipe.send(HelperError(f"the load generator failed: {error!r}"))


async def _send(pipe: Connection, client: AsyncClient, load: Load, planned: list[Planned]) -> Sent:
    tally, cpu_s, interrupted = Tally(), process_time(), False
    sending = asyncio.create_task(send_load(client, load, planned, tally))
    while not (await asyncio.wait([sending], timeout=_PROGRESS_S))[0]:
        if pipe.poll():
            pipe.recv()
            interrupted = True
            sending.cancel()
        pipe.send(Progress(tally.seconds, len(tally.outcomes), tally.num_ended, tally.num_tokens))
    seconds = tally.seconds
    with suppress(asyncio.CancelledError):
        await sending
    return Sent(tally.outcomes, seconds, process_time() - cpu_s, interrupted)
