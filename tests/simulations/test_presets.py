"""The presets against what their publishers say of them, and files against their errors."""

import json

import pytest
from safetensors import safe_open

from cluster.model.config import ModelConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from simulations.arithmetic import active_params, total_params
from simulations.presets import PRESETS, load_model
from tests.model.conftest import MOSAIC

PUBLISHED = {  # billions of parameters, in all and for a token, as the model cards have them
    "deepseek-v3": (671, 37, 256, 8),
    "deepseek-v2-lite": (15.7, 2.4, 64, 6),
    "qwen3-235b": (235, 22, 128, 8),
    "kimi-k2": (1000, 32, 384, 8),
    "mixtral-8x7b": (46.7, 12.9, 8, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model, (total, active, experts, chosen) = load_model(name), PUBLISHED[name]
    assert total_params(model) / 1e9 == pytest.approx(total, rel=0.03)
    assert active_params(model) / 1e9 == pytest.approx(active, rel=0.03)
    assert (model.num_experts, model.gate.num_experts_per_token) == (experts, chosen)


def test_the_presets_are_all_there_is():
    assert set(PRESETS) == {*PUBLISHED, "mosaic"}


def test_mosaic_is_the_bundled_model():
    model = load_model("mosaic")
    assert model == load_model(str(MOSAIC)) == load_model(str(MOSAIC / "config.json"))
    with safe_open(MOSAIC / "model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    products = sum(shape[0] * shape[1] for shape in sizes if len(shape) == 2)
    assert total_params(model) == products


def test_how_weights_are_stored_is_not_the_models_business(tmp_path):
    values = json.loads((MOSAIC / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_model(str(tmp_path)) == load_model("mosaic")
    with pytest.raises(UnsupportedModelError):
        ModelConfig.from_dir(tmp_path)


def test_what_is_no_model_says_so_in_a_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown preset 'gpt': choose from deepseek-v3, .*mosaic"
    ):
        load_model("gpt")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))
    file = tmp_path / "model.json"
    for text in ("", "{", "[1]", "[" * 100_000, '{"model_type": "llama"}', "\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"model\.json") as error:
            load_model(str(file))
        assert "\n" not in str(error.value)
