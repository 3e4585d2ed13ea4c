"""What a rank reads and holds: its share, no more; and what a broken checkpoint tells its user."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.model.checkpoint import Checkpoint
from cluster.model.config import GqaConfig, ModelConfig
from cluster.model.errors import CheckpointError
from cluster.model.kv_cache import KVCache
from cluster.model.loader import Loader
from comms.topology import Topology
from router.placement import Placement
from tests.model.solo import load_solo

DTYPE = torch.float32
LAYOUTS = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1), (3, 2, 2), (2, 4, 4)]


def read_share(directory, topology, rank):
    """Everything this rank loads, by kind, and the names it read."""
    config = ModelConfig.from_dir(directory)
    checkpoint = Checkpoint(directory)
    loader = Loader(checkpoint=checkpoint, config=config, topology=topology, rank=rank, dtype=DTYPE)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, topology.world_size)
    attention = [loader.attention(layer) for layer in range(config.num_layers)]
    experts = [loader.experts(idx, placement) for idx in range(config.num_moe_layers)]
    return config, attention, experts, checkpoint.names_read


@pytest.mark.parametrize("name", ["deepseek_v3_qlora", "mixtral", "qwen3_moe_norm"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_are_read_once_and_by_their_host_only(tiny_checkpoint, name, layout):
    directory = tiny_checkpoint(name)
    topology = Topology(num_nodes=layout[0], ranks_per_node=layout[1])
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    all_experts = {key for key in index["weight_map"] if ".experts." in key}
    read = [
        {key for key in read_share(directory, topology, rank)[3] if ".experts." in key}
        for rank in range(topology.world_size)
    ]
    assert sum(len(keys) for keys in read) == len(set().union(*read))
    assert set().union(*read) == all_experts
    config = ModelConfig.from_dir(directory)
    most = -(-config.num_experts // topology.world_size) * config.num_moe_layers * 3
    assert max(len(keys) for keys in read) <= most


def expected_attention_elements(config, tp_size):
    """Closed form of one layer's attention weights on one rank, norms included."""
    hidden, a = config.hidden_size, config.attention
    heads = a.num_heads // tp_size
    if isinstance(a, GqaConfig):
        kv_heads = max(1, a.num_kv_heads // tp_size)
        norms = 2 * a.head_dim if a.qk_norm else 0
        return (2 * heads + 2 * kv_heads) * a.head_dim * hidden + norms
    query = heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    latent = a.kv_lora_rank
    down = (latent + a.qk_rope_head_dim) * hidden + latent
    up = heads * (a.qk_nope_head_dim + a.v_head_dim) * latent
    q = a.q_lora_rank * (hidden + 1 + query) if a.q_lora_rank else query * hidden
    return q + down + up + heads * a.v_head_dim * hidden


@pytest.mark.parametrize(
    "name", ["deepseek_v3_qlora", "deepseek_v2_greedy", "mixtral", "qwen3_moe_norm"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_rank_holds_more_than_its_share(tiny_checkpoint, name, layout):
    """Experts, attention and KV bytes of every rank against closed forms of the config."""
    nodes, ranks, tp_size = layout
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=tp_size)
    for rank in range(topology.world_size):
        config, attention, experts, _ = read_share(tiny_checkpoint(name), topology, rank)
        tensors = [
            tensor
            for module in attention
            for value in vars(module).values()
            for tensor in [getattr(value, "weight", value)]
            if isinstance(tensor, torch.Tensor)
        ]
        assert sum(t.nbytes for t in tensors) == (
            4 * config.num_layers * expected_attention_elements(config, tp_size)
        )
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors), "a view of more"
        slots = -(-config.num_experts // topology.world_size)
        per_expert = 3 * config.hidden_size * config.expert_intermediate_size
        assert sum(e.num_bytes for e in experts) == (4 * config.num_moe_layers * slots * per_expert)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes(tiny_checkpoint, tp_size, dtype):
    topology = Topology(num_nodes=1, ranks_per_node=4, tensor_parallel_size=tp_size)
    per_token = {
        "deepseek_v3_qlora": 3 * (20 + 8),  # one latent and one rotary key for all heads
        "qwen3_moe_norm": 3 * 2 * 20 * max(1, 2 // tp_size),
        "mixtral": 3 * 2 * 12 * max(1, 2 // tp_size),
    }
    for name, elements in per_token.items():
        config = ModelConfig.from_dir(tiny_checkpoint(name))
        cache = KVCache(config, topology, 5, 16, dtype)
        assert cache.num_bytes == 5 * 16 * elements * dtype.itemsize
        assert KVCache.bytes_per_block(config, topology, dtype, 16) * 5 == cache.num_bytes
        held = {t.data_ptr(): t for layer in cache.layers for t in (layer.keys, layer.values)}
        assert sum(t.nbytes for t in held.values()) == cache.num_bytes


def test_layouts_that_do_not_divide_show_the_equation(tiny_checkpoint):
    topology = Topology(num_nodes=1, ranks_per_node=3)
    with pytest.raises(ValueError, match="4 % 3 = 1"):
        read_share(tiny_checkpoint("deepseek_v3_qlora"), topology, 0)


def rewrite(directory, key, change):
    """Apply `change(tensor or None) -> tensor or None` to one tensor of a checkpoint."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][key]
    tensors = load_file(file)
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed.contiguous()
    save_file(tensors, file)
    return file


@pytest.fixture
def copy_of(tiny_checkpoint, tmp_path):
    def copy(name):
        return shutil.copytree(tiny_checkpoint(name), tmp_path / "copy")

    return copy


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NAN = torch.tensor(float("nan"))
DAMAGE = [
    (EXPERT, lambda t: t[:, :-1], "has shape [24, 47], expected [24, 48]"),
    (EXPERT, lambda t: torch.where(torch.arange(48) == 5, NAN, t), "NaN or infinite"),
    (EXPERT, lambda t: None, "not in the file"),
    ("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn), "has type F8_E4M3"),
    ("model.layers.0.self_attn.q_b_proj.weight", lambda t: t.T, "has shape [28, 96]"),
    ("model.layers.2.mlp.gate.e_score_correction_bias", lambda t: t / 0, "NaN or infinite"),
    ("lm_head.weight", lambda t: t[:-1], "has shape [130, 48], expected [131, 48]"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "change", "problem"), DAMAGE)
def test_damaged_tensors_are_named(copy_of, key, change, problem):
    directory = copy_of("deepseek_v3_qlora")
    file = rewrite(directory, key, change)
    with pytest.raises(CheckpointError) as error:
        load_solo(directory)
    assert str(file) in str(error.value)
    assert repr(key) in str(error.value)
    assert problem in str(error.value)


def test_truncated_file_is_named(copy_of):
    directory = copy_of("deepseek_v3_qlora")
    file = sorted(directory.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="corrupt or truncated") as error:
        load_solo(directory)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("junk", [b"", b"\x00" * 7, b"\xff" * 64, b"{}" * 50])
def test_junk_file_is_named(copy_of, junk):
    directory = copy_of("deepseek_v3_qlora")
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(junk)
    with pytest.raises(CheckpointError, match="corrupt or truncated") as error:
        load_solo(directory)
    assert str(file) in str(error.value)


def test_missing_file_is_named(copy_of):
    directory = copy_of("deepseek_v3_qlora")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file") as error:
        load_solo(directory)
    assert str(file) in str(error.value)


def test_tensor_missing_from_the_index_is_named(copy_of):
    directory = copy_of("deepseek_v3_qlora")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][EXPERT]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="missing from the checkpoint") as error:
        load_solo(directory)
    assert EXPERT in str(error.value)
    assert str(index) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index_is_named(copy_of, text):
    directory = copy_of("mixtral")
    index = directory / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="index") as error:
        load_solo(directory)
    assert str(index) in str(error.value)


def test_index_may_not_point_outside(copy_of):
    directory = copy_of("mixtral")
    index = directory / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_solo(directory)


def test_directory_without_weights(copy_of):
    directory = copy_of("mixtral")
    for file in directory.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_solo(directory)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_types_are_converted(tmp_path, stored, wanted):
    tensor = torch.randn(6, 4).to(stored)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path).read("x", (6, 4), wanted, rows=slice(2, 5), columns=slice(1, 3))
    assert torch.equal(read, tensor[2:5, 1:3].to(wanted))
    assert read.is_contiguous()
    assert read.untyped_storage().nbytes() == read.nbytes


def test_files_do_not_stay_open(tiny_checkpoint):
    """A rank keeps two files mapped, however many shards the checkpoint has."""
    checkpoint = Checkpoint(tiny_checkpoint("mixtral"))
    for expert in range(7):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        checkpoint.read(name, (80, 48), DTYPE)
        assert len(checkpoint._open) <= 2
    checkpoint.close()
    assert not checkpoint._open


def test_a_shard_is_never_in_memory_as_a_whole(tmp_path):
    """Reading 1 MB out of 128 MB raises the peak of anonymous memory by far less than 128 MB."""
    save_file({"big": torch.zeros(32, 1 << 20)}, tmp_path / "model.safetensors")

    def anonymous_kib():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    checkpoint = Checkpoint(tmp_path)
    before = anonymous_kib()
    part = checkpoint.read("big", (32, 1 << 20), DTYPE, rows=slice(3, 4), columns=slice(0, 1 << 18))
    assert part.nbytes == 1 << 20
    assert anonymous_kib() - before < 32 << 10
