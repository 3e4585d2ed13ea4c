"""config.json of every architecture, and refusal by name of what we cannot compute exactly."""

import json
from dataclasses import replace

import pytest

from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from tests.checkpoints import SPECS


def write(tmp_path, name, **overrides):
    model_type, values = SPECS[name]
    values = {"model_type": model_type, "rms_norm_eps": 1e-6, **values, **overrides}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_deepseek_layer_kinds_and_sizes(tmp_path):
    config = ModelConfig.from_dir(write(tmp_path, "deepseek_v2_greedy", eos_token_id=[3, 5]))
    assert config.moe_layers == (1, 2)
    assert config.shared_intermediate_size == 2 * 24
    assert isinstance(config.attention, MlaConfig)
    assert config.attention.q_lora_rank == 0
    assert config.eos_token_ids == (3, 5)
    assert config.gate.scoring == "softmax"
    assert not config.has_correction_bias


def test_qwen3_layer_kinds(tmp_path):
    path = write(
        tmp_path, "qwen3_moe_norm", num_hidden_layers=8, decoder_sparse_step=2, mlp_only_layers=[3]
    )
    config = ModelConfig.from_dir(path)
    assert config.moe_layers == (1, 5, 7)  # (i + 1) % 2 == 0, without layer 3
    assert isinstance(config.attention, GqaConfig)
    assert config.attention.qk_norm


def test_head_dim_defaults_to_hidden_over_heads(tmp_path):
    config = ModelConfig.from_dir(write(tmp_path, "mixtral"))
    assert config.attention.head_dim == 48 // 4
    assert config.rope.theta == 1e6


def test_generation_config_names_the_eos(tmp_path):
    write(tmp_path, "mixtral", eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (7, 9)


def test_published_deepseek_v3_keys(tmp_path):
    """The old spelling (rope_scaling, rope_theta, torch_dtype, topk_method) of the release."""
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    path = write(
        tmp_path, "deepseek_v3_qlora", topk_method="noaux_tc", scoring_func="sigmoid",
        moe_layer_freq=1, ep_size=1, rope_theta=10000, rope_scaling=rope, torch_dtype="bfloat16",
        max_position_embeddings=163840, num_nextn_predict_layers=1, n_group=8, topk_group=4,
    )  # fmt: skip
    config = ModelConfig.from_dir(path)
    assert config.rope.kind == "yarn"
    assert config.rope.attention_factor == 1.0
    assert config.attention.softmax_scale == pytest.approx(24**-0.5 * 1.3688879**2, rel=1e-6)
    assert config.gate.group_score == "top2_sum"
    assert config.dtype == "bfloat16"


REFUSED = [
    ("deepseek_v3_qlora", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ("deepseek_v3_qlora", {"attention_bias": True}, "attention_bias=True"),
    ("deepseek_v3_qlora", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("deepseek_v3_qlora", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("deepseek_v3_qlora", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3_qlora", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("deepseek_v3_qlora", {"first_k_dense_replace": 3}, "without a single expert layer"),
    ("deepseek_v2_greedy", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ("deepseek_v2_greedy", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("deepseek_v2_greedy", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen3_moe_norm", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
    ("qwen3_moe_norm", {"rope_parameters": {"rope_type": "llama3"}}, "default, linear, yarn"),
    ("qwen3_moe_norm", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("qwen3_moe_norm", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ("mixtral", {"sliding_window": 256}, "sliding_window=256"),
    ("mixtral", {"model_type": "llama"}, "deepseek_v3, kimi_k2, mixtral, qwen3_moe"),
    ("mixtral", {"model_type": None}, "model_type None"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED)
def test_what_is_not_supported_is_named(tmp_path, name, overrides, message):
    with pytest.raises(UnsupportedModelError) as error:
        ModelConfig.from_dir(write(tmp_path, name, **overrides))
    assert message in str(error.value)
    assert "not supported" in str(error.value)


def test_ineffective_sliding_windows_are_accepted(tmp_path):
    ModelConfig.from_dir(write(tmp_path, "mixtral", sliding_window=512))
    ModelConfig.from_dir(
        write(tmp_path, "qwen3_moe_norm", use_sliding_window=False, sliding_window=64)
    )


BROKEN = [
    ({"hidden_size": "many"}, "hidden_size must be a positive integer, got 'many'"),
    ({"hidden_size": -1}, "hidden_size must be a positive integer, got -1"),
    ({"vocab_size": None}, "vocab_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
]


@pytest.mark.parametrize(("overrides", "message"), BROKEN)
def test_broken_values_name_file_and_key(tmp_path, overrides, message):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dir(write(tmp_path, "mixtral", **overrides))
    assert message in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"x"'])
def test_unreadable_config_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_impossible_heads_show_the_equation(tmp_path):
    with pytest.raises(ValueError, match="4 % 3 = 1"):
        ModelConfig.from_dir(write(tmp_path, "mixtral", num_key_value_heads=3))


def test_kimi_k2_is_deepseek_v3_in_other_sizes(tmp_path):
    """Its config.json names the architecture DeepseekV3ForCausalLM; only the model type differs."""
    kimi = ModelConfig.from_dir(write(tmp_path, "deepseek_v3_qlora", model_type="kimi_k2"))
    deepseek = ModelConfig.from_dir(write(tmp_path, "deepseek_v3_qlora"))
    assert replace(kimi, architecture="deepseek_v3") == deepseek
