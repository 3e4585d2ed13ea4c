"""Dumps of expert load that other servers write, as counts [steps, layers, experts].

`name` is what errors call the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router.load import LoadFileError

MAX_EXPERTS = 1 << 14
ZIP = b"PK\x03\x04"


def torch_counts(data: bytes, name: str) -> Any:
    """What SGLang's recorder saves with torch.save: the counts, still to be checked.

    `logical_count` [steps, layers, experts] (mode stat), or `records` (per_pass, per_token) with the
    `global_physical_count` [layers, slots] of each rank's forward passes and one
    `last_physical_to_logical_map` [layers, slots].
    """
    if not data.startswith(ZIP):  # before 2020 torch.save wrote pickles: not read here
        raise LoadFileError(f"{name}: not a file written by torch.save")
    try:
        # Tensors and plain containers only: with weights_only nothing in a file can run.
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # a parser of foreign bytes may raise anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoadFileError(f"{name}: cannot be read as tensors ({first})") from error
    if isinstance(content, dict) and "logical_count" in content:
        return _plain(content["logical_count"])
    if isinstance(content, dict) and "records" in content:
        try:
            return _passes(content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise LoadFileError(
                f"{name}: 'records' must have forward_pass_id and global_physical_count [layers, "
                f"slots] each, and 'last_physical_to_logical_map' the same shape ({error!r})"
            ) from error
    raise LoadFileError(f"{name}: expected 'logical_count' or 'records', as SGLang writes them")


def _passes(content: Mapping[str, Any]) -> NDArray[Any]:
    """[passes, layers, experts] from counts by slot, those of a pass's ranks added."""
    logical_LS = np.asarray(_plain(content["last_physical_to_logical_map"])).astype(np.int64)
    if logical_LS.ndim != 2 or not 0 <= logical_LS.min() <= logical_LS.max() < MAX_EXPERTS:
        raise ValueError(f"map {list(logical_LS.shape)} is not expert ids [layers, slots]")
    shape = (len(logical_LS), int(logical_LS.max()) + 1)
    layers = np.arange(len(logical_LS))[:, None]
    passes: dict[int, NDArray[np.int64]] = {}
    for record in content["records"]:
        counts_LS = np.asarray(_plain(record["global_physical_count"])).astype(np.int64)
        if counts_LS.shape != logical_LS.shape:
            raise ValueError(f"count {list(counts_LS.shape)}, map {list(logical_LS.shape)}")
        of_pass = passes.setdefault(int(record["forward_pass_id"]), np.zeros(shape, np.int64))
        np.add.at(of_pass, (layers, logical_LS), counts_LS)
    return np.stack([passes[i] for i in sorted(passes)])


def json_counts(data: bytes, name: str) -> Any:
    """`logical_count` as SGLang takes it, or vLLM's `load_history` of `logical_expert_load`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LoadFileError(f"{name}: not JSON ({error})") from error
    if isinstance(content, dict) and "logical_count" in content:
        return content["logical_count"]
    history = content.get("load_history") if isinstance(content, dict) else None
    if isinstance(history, list) and all(isinstance(step, dict) for step in history):
        return [step.get("logical_expert_load") for step in history]
    raise LoadFileError(f"{name}: expected 'logical_count' or 'load_history'")


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value
