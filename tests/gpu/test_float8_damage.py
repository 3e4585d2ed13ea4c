"""Checkpoints in FP8 that are damaged, or quantised otherwise: who opens them reads which file and which tensor."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.model.config import ModelConfig
from cluster.model.cuda.checkpoint import DeviceCheckpoint
from cluster.model.errors import CheckpointError
from experts.float8 import FLOAT8
from tests.gpu.float8_checkpoints import HIDDEN, load, write
from tests.model.solo import load_solo

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"


def test_a_file_that_shrinks_is_named(checkpoints, tmp_path, device):
    shutil.copytree(checkpoints["gqa"], tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    with DeviceCheckpoint(tmp_path / "copy", device) as checkpoint:
        checkpoint.read("model.norm.weight", (HIDDEN,), torch.bfloat16)
        os.truncate(file, 100)
        name = "model.layers.0.input_layernorm.weight"
        with pytest.raises(CheckpointError, match=f"{name}': cannot be read: the file") as error:
            checkpoint.read(name, (HIDDEN,), torch.bfloat16)
    assert str(file) in str(error.value)


def test_a_tensor_that_the_index_lists_and_the_file_lacks_is_named(checkpoints, tmp_path, device):
    shutil.copytree(checkpoints["gqa"], tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors[UP]
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{UP}': listed in .* but not in the file"):
        load(tmp_path / "copy", device)


def damaged(directory: Path, to: Path, name: str, change) -> Path:
    shutil.copytree(directory, to)
    tensors = load_file(to / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors")
    return to / "model.safetensors"


def with_nan(w: torch.Tensor) -> torch.Tensor:
    bits = w.view(torch.uint8).clone()
    bits[7, 9] = 0xFF
    return bits.view(FLOAT8)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (UP, with_nan, "holds NaN"),
        (f"{UP}_scale_inv", lambda s: s / 0, "holds NaN or infinite values"),
        (f"{OUT}_scale_inv", lambda s: s * torch.nan, "holds NaN or infinite values"),
        (f"{OUT}_scale_inv", lambda s: s[:1], r"has shape \[1, 1\], expected \[2, 1\]"),
        (f"{UP}_scale_inv", None, f"has type F8_E4M3 without {UP}_scale_inv"),
        (OUT, lambda w: w.to(torch.float32), "has type F32, expected F8_E4M3"),
    ],
)
def test_damage_is_named(checkpoints, tmp_path, name, change, problem, device):
    file = damaged(checkpoints["mla"], tmp_path / "copy", name, change)
    where = name if change else UP
    for loading in (lambda: load(tmp_path / "copy", device), lambda: load_solo(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match=problem) as error:
            loading()
        assert str(file) in str(error.value)
        assert repr(where) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"weight_block_size": [64, 64]}, {"quant_method": "awq"}, {"activation_scheme": "static"}],
)
def test_other_quantisation_is_refused(tmp_path, change):
    directory = write(tmp_path / "other", "gqa")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="otherwise quantised weights"):
        ModelConfig.from_dir(directory)
