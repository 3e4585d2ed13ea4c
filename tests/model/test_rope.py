"""Rotary angles and scales against transformers' own, for old and new config keys."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from cluster.model.config import MlaConfig, ModelConfig
from cluster.model.rope import RopeConfig, RotaryTable, inverse_frequencies
from tests.checkpoints import SPECS

OLD_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
CASES = {
    "default": {"rope_theta": 50000.0},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old_yarn": {
        "rope_theta": 10000.0, "rope_scaling": OLD_YARN, "max_position_embeddings": 163840,
    },
    "new_yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "truncate": False,
            "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2,
        },
    },
    "yarn_attention_factor": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.25,
            "original_max_position_embeddings": 256, "mscale_all_dim": 1.0,
        },
    },
}  # fmt: skip


def configs(tmp_path, model_name, overrides):
    """The same config.json read by us and by transformers."""
    model_type, values = SPECS[model_name]
    values = {**values, "model_type": model_type, "rms_norm_eps": 1e-6, "topk_group": 1}
    values = {k: v for k, v in values.items() if k != "rope_parameters"} | overrides
    (tmp_path / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_dir(tmp_path), AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_name", ["deepseek_v3_qlora", "qwen3_moe_norm"])
def test_angles_and_scales_equal_transformers(tmp_path, model_name, case):
    ours, theirs = configs(tmp_path, model_name, CASES[case])
    is_mla = isinstance(ours.attention, MlaConfig)
    rotary_class = v3.DeepseekV3RotaryEmbedding if is_mla else qwen3.Qwen3MoeRotaryEmbedding
    attention_class = v3.DeepseekV3Attention if is_mla else qwen3.Qwen3MoeAttention
    positions = torch.tensor([0, 1, 2, 63, 64, 255, 511])
    cos, sin = rotary_class(theirs)(torch.zeros(1), positions.unsqueeze(0))
    rotation = RotaryTable(ours.rope, 512).at(positions)
    half = ours.rope.dim // 2
    torch.testing.assert_close(rotation.cos_TF, cos[0, :, :half], rtol=0, atol=3e-7)
    torch.testing.assert_close(rotation.sin_TF, sin[0, :, :half], rtol=0, atol=3e-7)
    assert ours.attention.softmax_scale == pytest.approx(
        attention_class(theirs, layer_idx=0).scaling, rel=1e-12
    )


def test_yarn_changes_slow_channels_only():
    plain = RopeConfig(dim=64, theta=1e4, interleaved=True)
    yarn = RopeConfig(
        dim=64, theta=1e4, interleaved=True, kind="yarn", factor=40.0, original_max_positions=4096
    )
    ratio = inverse_frequencies(plain) / inverse_frequencies(yarn)
    assert torch.allclose(ratio[:8], torch.ones(8))
    assert torch.allclose(ratio[-4:], torch.full((4,), 40.0))
    assert bool((ratio.diff() >= -1e-4).all())


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_equals_complex_multiplication(interleaved):
    config = RopeConfig(dim=12, theta=100.0, interleaved=interleaved)
    positions = torch.tensor([0, 3, 17])
    x = torch.randn(3, 2, 12)
    turned = RotaryTable(config, 32).at(positions)(x)
    angles = torch.outer(positions.double(), inverse_frequencies(config).double())
    pairs = x.view(3, 2, 6, 2) if interleaved else x.view(3, 2, 2, 6).transpose(-1, -2)
    expected = torch.view_as_complex(pairs.double().contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    expected = torch.view_as_real(expected)
    expected = expected if interleaved else expected.transpose(-1, -2)
    torch.testing.assert_close(turned, expected.reshape(3, 2, 12).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[0], x[0])


@given(offset=st.integers(0, 400), interleaved=st.booleans())
def test_scores_depend_on_distance_only(offset, interleaved):
    table = RotaryTable(RopeConfig(dim=16, theta=1e4, interleaved=interleaved), 512)
    generator = torch.Generator().manual_seed(offset)
    q, k = torch.randn(2, 1, 1, 16, generator=generator)

    def score(q_position, k_position):
        q_turned = table.at(torch.tensor([q_position]))(q)
        return float((q_turned * table.at(torch.tensor([k_position]))(k)).sum())

    assert score(offset + 7, offset + 2) == pytest.approx(score(7, 2), abs=2e-4)


def test_impossible_rope_is_refused():
    with pytest.raises(ValueError, match="dim=7"):
        RopeConfig(dim=7, theta=1e4, interleaved=True)
    with pytest.raises(ValueError, match="factor=0"):
        RopeConfig(dim=8, theta=1e4, interleaved=True, factor=0.0)
    with pytest.raises(IndexError):
        RotaryTable(RopeConfig(dim=8, theta=1e4, interleaved=True), 4).at(torch.tensor([4]))
