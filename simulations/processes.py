"""Work spread over processes of one thread each; results come in the order in which they finish."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import TypeVar

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

    `function` and items are pickled. Whatever ends the iteration early, Ctrl-C among it, ends the
    processes too. Raises RuntimeError if one of them dies, and what `function` raises.
    """
    if num_processes == 1 or len(items) < 2:
        for item in items:
            yield item, function(item)
        return
    with _pool(min(num_processes, len(items))) as pool:
        item_of: dict[Future[Result], Item] = {pool.submit(function, item): item for item in items}
        try:
            while item_of:
                for future in wait(item_of, return_when=FIRST_COMPLETED).done:
                    yield item_of.pop(future), future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process of the sweep was killed, for want of memory perhaps: try fewer --jobs"
            ) from error


@contextmanager
def _pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are gone when this ends, whether they were at work or not."""
    before = set(active_children())
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            num_processes, mp_context=get_context("spawn"), initializer=_live_and_die_with_parent
        )
        try:
            yield pool
        except BaseException:
            for child in set(active_children()) - before:
                child.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown()


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


def _live_and_die_with_parent() -> None:
    """Ctrl-C reaches the whole process group, but only the parent knows what to keep."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    """A parent that is killed tells nobody."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
