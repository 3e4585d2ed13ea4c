"""Configuration files by path or by default, and bundled models by name."""

from collections.abc import Sequence
from pathlib import Path

from cluster.config import ServeConfig

DEPLOY = Path(__file__).resolve().parent
DEMO_CONFIG = DEPLOY / "configs" / "demo.yaml"
BUNDLED_MODELS = {"mosaic": DEPLOY / "models" / "mosaic"}


def load_config(path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """Read `path` (or the demo's configuration) with dotted overrides.

    A `model` that names a bundled model stands for its directory. Raises ConfigError.
    """
    config = ServeConfig.from_yaml(path or DEMO_CONFIG, overrides)
    bundled = BUNDLED_MODELS.get(config.model)
    if bundled is None or Path(config.model).is_dir():
        return config
    return config.model_copy(update={"model": str(bundled), "served_model_name": config.model_name})
