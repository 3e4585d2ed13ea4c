"""Work spread over processes of one thread each; results come in the order in which they finish.

Not concurrent.futures: its main thread holds locks that its other threads need, and Ctrl-C while it
does leaves all of them waiting. Here one thread waits for pipes, and holds nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_finished(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, function(item)) of all items; with one process, here and in order.

    `function`, items, results and errors are pickled. Whatever ends the iteration early, Ctrl-C among
    it, ends the processes too. Raises RuntimeError if one of them dies, and what `function` raises.
    """
    if num_processes == 1 or len(items) < 2:
        for item in items:
            yield item, function(item)
        return
    left = iter(items)
    with _workers(function, min(num_processes, len(items))) as workers:
        busy = {worker: _given(worker, item) for worker, item in zip(workers, left, strict=False)}
        while busy:
            for worker in wait([*busy]):
                assert isinstance(worker, Connection)
                done, (is_error, answer) = busy.pop(worker), _answer(worker)
                if is_error:
                    raise answer
                for item in left:
                    busy[worker] = _given(worker, item)
                    break
                yield done, answer


def _given(worker: Connection, item: Item) -> Item:
    with suppress(BrokenPipeError):  # it died; its answer, which is none, will tell
        worker.send(item)
    return item


def _answer(worker: Connection) -> tuple[bool, Any]:
    try:
        is_error, answer = worker.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RuntimeError(
            "a process was killed, for want of memory perhaps: try fewer --jobs"
        ) from error
    return is_error, answer


@contextmanager
def _workers(function: Callable[[Any], Any], number: int) -> Iterator[list[Connection]]:
    """Processes that are gone when this ends, whether they were at work or not."""
    context = get_context("spawn")
    pipes, processes = [], []
    try:
        with _one_thread_each():
            for _ in range(number):
                mine, theirs = context.Pipe()
                pipes.append(mine)
                process = context.Process(target=_work, args=(function, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()  # so that a process that dies ends its pipe
        yield pipes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def _work(function: Callable[[Any], Any], items: Connection) -> None:
    """What a process does until it is ended."""
    # Ctrl-C reaches the whole process group, but only the parent knows what to keep.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_after_parent, daemon=True).start()
    with suppress(EOFError):
        while True:
            item = items.recv()
            try:
                items.send((False, function(item)))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                items.send((True, error))


def _end_after_parent() -> None:
    """A parent that is killed tells nobody."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread: libraries read these when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
