"""A configuration says exactly what is wrong with it, and prints back what is in force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigError, ServeConfig


def test_defaults_need_only_a_model():
    config = ServeConfig.from_dict({"model": "/models/mosaic"})
    assert config.model_name == "mosaic"
    assert config.parallel.world_size == config.parallel.num_replicas == 1


def test_layout_arithmetic():
    config = ServeConfig.from_dict(
        {
            "model": "m",
            "parallel": {"num_nodes": 3, "ranks_per_node": 4, "tensor_parallel_size": 2},
        }
    )
    assert (config.parallel.world_size, config.parallel.num_replicas) == (12, 6)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("scheduler.max_num_seq", "scheduler.max_num_seqs"),
        ("max_num_seqs", "scheduler.max_num_seqs"),
        ("tensor_parallel_size", "parallel.tensor_parallel_size"),
        ("schedular.max_num_seqs", "scheduler.max_num_seqs"),
        ("modle", "model"),
        ("comm", "comms"),
        ("parallel.block_size", "cache.block_size"),
        ("qqqqqqqq", None),
    ],
)
def test_unknown_key_names_the_nearest(key, suggestion):
    with pytest.raises(ConfigError, match="unknown key") as caught:
        ServeConfig.from_dict({"model": "m"}, [f"{key}=1"])
    message = str(caught.value)
    assert repr(key) in message or repr(key.split(".")[0]) in message
    if suggestion:
        assert repr(suggestion) in message or repr(suggestion.split(".")[0]) in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("dtype=float16", ["dtype = 'float16'", "'bfloat16' or 'float32'"]),
        ("comms.combine=mean", ["comms.combine = 'mean'", "'node', 'exact' or 'fixed'"]),
        ("server.port=70000", ["server.port = 70000", ">= 0", "<= 65535"]),
        ("parallel.num_nodes=0", ["parallel.num_nodes = 0", ">= 1"]),
        ("parallel.tensor_parallel_size=0", ["parallel.tensor_parallel_size = 0", ">= 1", "null"]),
        ("scheduler.max_num_seqs='8'", ["scheduler.max_num_seqs = '8'", "int"]),
        ("scheduler.max_num_seqs=true", ["scheduler.max_num_seqs = True", "int"]),
        ("cache.block_size=3", ["cache.block_size = 3", "16"]),
        ("cache.memory_gib=.nan", ["cache.memory_gib = nan", "> 0"]),
        ("cache.memory_gib=.inf", ["cache.memory_gib = inf", "> 0"]),
        ("max_model_len=1", ["max_model_len = 1", ">= 2"]),
        ("seed=-1", ["seed = -1", ">= 0"]),
        ("model=", ["model = None", "str"]),
        ("parallel=4", ["parallel = 4"]),
        (
            "scheduler.max_num_batched_tokens=4",
            ["scheduler", "4 < max_num_seqs = 32"],
        ),
        ("parallel.tensor_parallel_size=2", ["parallel", "1 % 2 = 1"]),
        ("eplb_config.threshold=0.9", ["eplb_config.threshold = 0.9", ">= 1"]),
        ("eplb_config.target=1.1", ["eplb_config", "1.1 > 1.05"]),
        ("eplb_config.bandwidth_mib_s=0", ["eplb_config.bandwidth_mib_s = 0", "> 0"]),
    ],
)
def test_bad_value_names_field_and_allowed_values(override, parts):
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({"model": "m"}, [override])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("split", ["balanced", "activated", "nodes"])
def test_such_splits_need_sums_that_do_not_depend_on_them(split):
    """Neither section is wrong by itself, so the message names both options."""
    overrides = [f"experts.split={split}", "comms.combine=node"]
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({"model": "m"}, overrides)
    message = str(caught.value)
    assert message.startswith(f"experts.split = {split!r} with comms.combine = 'node'")
    assert "set comms.combine to 'fixed' or 'exact', or experts.split to" in message
    assert ServeConfig.from_dict({"model": "m"}, overrides[1:]).experts.split == "auto"


def test_all_errors_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({}, ["dtype=int8", "server.port=-1"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("override", ["port", "=3", "a..b=1", ".a=1", "model.x=1"])
def test_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="override"):
        ServeConfig.from_dict({"model": "m"}, [override])


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nparallel:\nserver:\n  port: 1\n")
    config = ServeConfig.from_yaml(path, ["server.port=2", "parallel.num_nodes=2"])
    assert (config.server.port, config.parallel.num_nodes) == (2, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a list", "expected a mapping"),
        ("", "expected a mapping"),
        ("model: [", "cannot be read as YAML"),
        ("model: a\nmodel: b\n", "key 'model' is given twice"),
        ("model: a\nprot: 3\n", "did you mean"),
        ("model: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_bad_file_is_named(tmp_path, text, reason):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        ServeConfig.from_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        ServeConfig.from_yaml(tmp_path / "absent.yaml")


@given(
    model=st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable()),
    name=st.none() | st.sampled_from(["null", "yes", "1e3", "模型", "a: b"]),
    nodes=st.integers(1, 64),
    timeout=st.floats(0.001, 86_400),
    tp=st.sampled_from([None, 1, 2, 4]),
)
def test_to_yaml_round_trips(tmp_path_factory, model, name, nodes, timeout, tp):
    config = ServeConfig.from_dict(
        {
            "model": model,
            "served_model_name": name,
            "parallel": {"num_nodes": nodes, "ranks_per_node": 4, "tensor_parallel_size": tp},
            "comms": {"timeout_s": timeout},
        }
    )
    path = tmp_path_factory.mktemp("config") / "serve.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert ServeConfig.from_yaml(path) == config


def test_configuration_is_frozen():
    config = ServeConfig.from_dict({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        config.server.port = 3
