"""Tries constraints in a process of its own; run by `constraint_check.py`, never imported.

The arguments are the number of an open connection, the memory that a constraint may take in MiB, the
model's directory and vocabulary, and its end-of-sequence tokens. The first answer says that the
process is ready. Each message is a constraint as JSON, each answer JSON: {} or {"error": ...}.
"""

import json
import resource
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from time import thread_time

import numpy as np

from cluster.engine.constraint import Constraint
from cluster.engine.guided import MAX_TOKEN_S, GuideCompiler

_STACK_BYTES = 1 << 20
"""Less than the engine's threads have: what is nested too deep fails here and not there."""
_TRIED_TOKENS = 100


def try_out(compiler: GuideCompiler, constraint: Constraint, eos: list[int]) -> None:
    """Compile it and follow it at random, ending late; ValueError if that fails or takes long."""
    guide = compiler.guide(compiler.compile(constraint))
    random, completion = np.random.default_rng(0), list[int]()
    for _ in range(_TRIED_TOKENS):
        began = thread_time()
        allowed = np.flatnonzero(guide.allowed(completion))
        if thread_time() - began > MAX_TOKEN_S / 2:
            raise ValueError(f"constraint.{constraint.kind} takes too long to follow")
        if not len(allowed):
            if not completion or not guide.is_finished:
                raise ValueError(f"constraint.{constraint.kind} can be met by no completion")
            return
        going_on = allowed[~np.isin(allowed, eos)]
        completion.append(int(random.choice(going_on if len(going_on) else allowed)))


def answer(compiler: GuideCompiler, request: bytes, eos: list[int]) -> dict[str, str]:
    try:
        try_out(compiler, Constraint.of(json.loads(request)), eos)
    except ValueError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "the constraint needs too much memory"}
    return {}


def serve(connection_fd: int, memory_mib: int, path: str, vocab_size: int, eos: list[int]) -> None:
    with Connection(connection_fd) as connection:
        try:
            compiler = GuideCompiler(Path(path), vocab_size, eos)
        except ValueError as error:
            connection.send_bytes(json.dumps({"error": str(error)}).encode())
            return
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = in_use + (memory_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        connection.send_bytes(b"{}")
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:  # the server has ended or does not need us any more
                return
            connection.send_bytes(json.dumps(answer(compiler, request, eos)).encode())


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    fd, memory, model, vocabulary, *ends = sys.argv[1:]
    arguments = (int(fd), int(memory), model, int(vocabulary), list(map(int, ends)))
    thread = threading.Thread(target=serve, args=arguments)
    thread.start()
    thread.join()
