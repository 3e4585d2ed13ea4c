"""The models a simulation can be asked for by name: their published `config.json`, sizes only.

The values are those of the configuration files published with the weights: DeepSeek-V3,
DeepSeek-V2-Lite, Qwen3-235B-A22B, Kimi-K2-Instruct, Mixtral-8x7B-v0.1, and the bundled `mosaic`.
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.model.config import ModelConfig, from_values
from cluster.model.config_json import ConfigJson
from cluster.model.errors import CheckpointError

_DIRECTORY = Path(__file__).parent / "presets"
_MOSAIC = Path(__file__).parents[1] / "deploy" / "models" / "mosaic" / "config.json"

PRESETS: tuple[str, ...] = (
    "deepseek-v3",
    "deepseek-v2-lite",
    "qwen3-235b",
    "kimi-k2",
    "mixtral-8x7b",
    "mosaic",
)


def load_model(name_or_path: str) -> ModelConfig:
    """The sizes of a preset, of a `config.json`, or of a directory with one.

    A checkpoint's `quantization_config` is set aside: in which format weights are kept is part of
    the deployment here. Raises ValueError for what is neither, CheckpointError for a file that is
    no model configuration, UnsupportedModelError for a model that we cannot run.
    """
    if name_or_path in PRESETS:
        return _read(_MOSAIC if name_or_path == "mosaic" else _DIRECTORY / f"{name_or_path}.json")
    path = Path(name_or_path)
    if path.is_dir():
        return _read(path / "config.json")
    if path.is_file():
        return _read(path)
    raise ValueError(
        f"unknown preset {name_or_path!r}: choose from {', '.join(PRESETS)}, "
        "or give a config.json or a directory with one"
    )


def shown_name(name_or_path: str) -> str:
    """A preset as it is called, a file by its architecture; for what `load_model` accepts."""
    return load_model(name_or_path).architecture if "/" in name_or_path else name_or_path


def _read(file: Path) -> ModelConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(file, "no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(file, "not a JSON object")
    values.pop("quantization_config", None)
    return from_values(ConfigJson(file=file, values=values), ())
