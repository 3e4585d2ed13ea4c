"""How fast `transformers` generates from the same checkpoint on the same processors.

It runs in a process of its own, so that its threads are its own, and is asked again and again in turns
with ours. Its dtype, its greedy decoding and its static batch of equally long prompts are what its users
would take; it gets the number of threads with which it is fastest here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from simulations.bench.helper_process import HelperError, HelperProcess

_WARM_UP_TOKENS = 4
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Batch:
    """`size` prompts of `prompt_tokens`, to be continued by `output_tokens` each."""

    size: int
    prompt_tokens: int
    output_tokens: int


def missing() -> str | None:
    """Why it cannot be compared with, if so."""
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install 'expertmesh[verify]'"
    return None


class TransformersProcess(HelperProcess):
    """`tokens_per_s` of batches; use it as a context. It does nothing while it is not asked."""

    def __init__(self, model_dir: str, dtype: str) -> None:
        super().__init__("transformers", _serve, model_dir, dtype)

    def tokens_per_s(self, batch: Batch, num_threads: int) -> float:
        """Tokens of all sequences, prefill included. Raises HelperError if it fails."""
        self.send((batch, num_threads))
        return float(self.receive(_TIMEOUT_S))


def thread_counts() -> tuple[int, ...]:
    """One thread, and all processors: which is faster depends on the model."""
    return tuple(sorted({1, len(os.sched_getaffinity(0))}))


def _serve(pipe: Connection, model_dir: str, dtype: str) -> None:
    try:
        model = _load(model_dir, dtype)
    except Exception as error:  # noqa: BLE001 - the parent says it
        pipe.recv()
        pipe.send(HelperError(f"transformers cannot load {model_dir}: {error!r}"))
        return
    while True:
        batch, num_threads = pipe.recv()
        _generate(model, batch, num_threads, _WARM_UP_TOKENS)
        start = perf_counter()
        _generate(model, batch, num_threads, batch.output_tokens)
        pipe.send(batch.size * batch.output_tokens / (perf_counter() - start))


def _load(model_dir: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # every sequence runs to its planned length
    return model


def _generate(model: Any, batch: Batch, num_threads: int, num_tokens: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    shape = (batch.size, batch.prompt_tokens)
    ids = torch.randint(16, model.config.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
