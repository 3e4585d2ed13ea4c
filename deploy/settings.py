"""Configuration files by path or by default, and bundled models by name."""

from collections.abc import Sequence
from pathlib import Path

from cluster.config import ServeConfig
from cluster.model.config import ModelConfig

DEPLOY = Path(__file__).resolve().parent
DEMO_CONFIG = DEPLOY / "configs" / "demo.yaml"
BUNDLED_MODELS = {"mosaic": DEPLOY / "models" / "mosaic"}


def read_config(path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """The configuration in `path` (or the demo's) with dotted overrides.

    A `model` that names a bundled model stands for its directory. Raises ConfigError.
    """
    config = ServeConfig.from_yaml(path or DEMO_CONFIG, overrides)
    bundled = BUNDLED_MODELS.get(config.model)
    if bundled is None or Path(config.model).is_dir():
        return config
    return config.model_copy(update={"model": str(bundled), "served_model_name": config.model_name})


def load_config(path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """`read_config`, and a look at the model: refuse in a second what no rank could load.

    Raises ConfigError, CheckpointError or UnsupportedModelError.
    """
    config = read_config(path, overrides)
    ModelConfig.from_dir(config.model)
    return config
