"""Checkpoints in FP8: on the device byte by byte as in the file, and the same numbers on a CPU."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config import CommsConfig
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.cuda import staging, weights
from cluster.model.cuda.checkpoint import DeviceCheckpoint
from cluster.model.cuda.transformer import CudaTransformer
from cluster.model.errors import CheckpointError
from cluster.model.loader import Loader
from comms.topology import Topology
from experts.float8 import FLOAT8, BlockScaled, dequantized, halves, plain, quantize_blocks
from experts.weights import ExpertWeights
from router.placement import Placement
from tests.gpu.float8_checkpoints import EXPERT, EXPERTS, HIDDEN, write
from tests.gpu.plain_ops import PlainOps
from tests.model.solo import load_solo, make_batch, new_cache, solo_groups

CPU = torch.device("cpu")
KINDS = ["mla", "gqa"]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
IDS = [5, 9, 33, 70, 2, 8, 90, 41, 17]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("float8")
    found = {kind: write(root / kind, kind) for kind in KINDS}
    return found | {
        f"{kind}-fp32": write(root / f"{kind}-fp32", kind, float8=False) for kind in KINDS
    }


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    return CPU if request.param == "cpu" else request.getfixturevalue("cuda")


def loader_of(checkpoint: Checkpoint, topology: Topology | None = None, **options) -> Loader:
    return Loader(
        checkpoint=checkpoint,
        config=ModelConfig.from_dir(checkpoint.directory),
        topology=topology or Topology(num_nodes=1, ranks_per_node=1),
        dtype=torch.bfloat16,
        **{"rank": 0, "keep_float8": True, **options},
    )


def load(directory, device, *, quantization=None, kernels: bool = False) -> CudaTransformer:
    config, groups = ModelConfig.from_dir(directory), solo_groups()
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    if kernels:
        return CudaTransformer.load(
            directory, config, groups, placement, CommsConfig(),
            quantization=quantization, device=device,
        )  # fmt: skip
    with DeviceCheckpoint(directory, device) as checkpoint:
        return CudaTransformer.build(
            loader_of(checkpoint, keep_float8=quantization != "bfloat16"), groups, placement,
            CommsConfig(), quantization=quantization, device=device, ops=PlainOps(),
        )  # fmt: skip


def logits_of(model, cache) -> torch.Tensor:
    """Of a prompt in two parts."""
    parts = [[(IDS[:6], 0, [1, 2], range(6))], [(IDS[6:], 6, [1, 2], range(3))]]
    return torch.cat([model.forward(make_batch(part, 16), cache).cpu() for part in parts])


def assert_is(found: torch.Tensor, scale: torch.Tensor, tensors, *names: str) -> None:
    """The same bytes and scales as the file has, below each other."""
    wanted = torch.cat([tensors[name].view(torch.uint8) for name in names])
    assert torch.equal(found.view(torch.uint8).cpu(), wanted)
    assert torch.equal(scale.cpu(), torch.cat([tensors[f"{name}_scale_inv"] for name in names]))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_scales_are_those_of_the_file(directories, kind, device):
    model = load(directories[kind], device)
    tensors = load_file(directories[kind] / "model.safetensors")
    for idx, layer in enumerate(model.layers):
        name, attention = f"model.layers.{idx}.self_attn", layer.attention
        first = (
            ("q_a_proj", "kv_a_proj_with_mqa") if kind == "mla" else ("q_proj", "k_proj", "v_proj")
        )
        fused = attention.w_down if kind == "mla" else attention.w_qkv
        assert_is(fused.w_OI, fused.scale_PQ, tensors, *(f"{name}.{p}.weight" for p in first))
        out = attention.w_out
        assert_is(out.w_OI, out.scale_PQ, tensors, f"{name}.o_proj.weight")
        if kind == "mla":
            up = f"{name}.kv_b_proj.weight"
            w_uk_NMC = attention.w_uk_NCM.transpose(1, 2)
            whole = torch.cat([w_uk_NMC, attention.w_uv_NVC], 1).flatten(0, 1)
            numbers = dequantized(tensors[up], tensors[f"{up}_scale_inv"])
            assert torch.equal(whole.cpu(), numbers.to(torch.bfloat16))
    dense = model.layers[0].mlp
    name = "model.layers.0.mlp"
    gate_up = [f"{name}.{p}_proj.weight" for p in ("gate", "up")]
    assert_is(dense.w13.w_OI, dense.w13.scale_PQ, tensors, *gate_up)
    assert_is(dense.w2.w_OI, dense.w2.scale_PQ, tensors, f"{name}.down_proj.weight")
    pool = model.moe_layers[0].slots.experts
    for expert in range(EXPERTS):
        name = f"model.layers.1.mlp.experts.{expert}"
        gate_up = [f"{name}.{p}_proj.weight" for p in ("gate", "up")]
        assert_is(pool.w13_BNH[expert], pool.w13_scale[expert], tensors, *gate_up)
        assert_is(pool.w2_BHI[expert], pool.w2_scale[expert], tensors, f"{name}.down_proj.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_computes_with_the_numbers_that_they_stand_for(directories, kind):
    scaled, numbers = load_solo(directories[kind]), load_solo(directories[f"{kind}-fp32"])
    found = logits_of(scaled, new_cache(scaled, 3, 16))
    assert torch.equal(found, logits_of(numbers, new_cache(numbers, 3, 16)))
    assert found.std() > 0.1


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize(
    ("quantization", "bound"), [(None, 0.15), ("fp8", 0.15), ("bfloat16", 0.03)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(directories, kind, quantization, bound, kernels, device):
    """Of fp32: with rows in FP8 too, or in bfloat16 throughout."""
    if kernels and device.type == "cpu":
        pytest.skip("the kernels need a GPU (see test_model_interpreted)")
    exact = load_solo(directories[f"{kind}-fp32"])
    model = load(directories[kind], device, quantization=quantization, kernels=kernels)
    expected = logits_of(exact, new_cache(exact, 3, 16))
    found = logits_of(model, model.new_cache(3, 16))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < bound, error
    is_float8 = quantization != "bfloat16"
    assert model.moe_layers[0].slots.experts.is_float8 == is_float8
    assert (model.layers[0].attention.w_out.scale_PQ is not None) == is_float8


def test_readers_of_host_and_device_read_the_same(directories, device, monkeypatch):
    """Every tensor, and parts of it; the buffers of the device's reader are far smaller than a tensor."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(staging, "_PIECE", 96)
    preadv = os.preadv  # which may give less than is asked for
    few = lambda file, into, start: preadv(file, [into[0][:80]], start)  # noqa: E731
    monkeypatch.setattr(staging.os, "preadv", few)
    directory = directories["mla"]
    host = Checkpoint(directory)
    with DeviceCheckpoint(directory, device) as there:
        for name, tensor in load_file(directory / "model.safetensors").items():
            if name.endswith("_scale_inv"):
                continue
            shape = tuple(tensor.shape)
            parts = [{}, {"rows": slice(3, shape[0] // 2)}]
            if len(shape) == 2:
                parts.append({"rows": slice(1, 4), "columns": slice(5, shape[1] - 1)})
            for part in parts:
                for keep in (False, True):
                    a, b = (
                        c.read(name, shape, torch.bfloat16, **part, keep_float8=keep)
                        for c in (host, there)
                    )
                    assert b.device.type == device.type
                    assert type(a) is type(b)
                    assert torch.equal(plain(a), plain(b).cpu())
        together = {UP: (EXPERT, HIDDEN), "model.norm.weight": (HIDDEN,), OUT: (HIDDEN, 128)}
        there.expect(list(together))
        for name, shape in together.items():
            a, b = (c.read(name, shape, torch.float32) for c in (host, there))
            assert torch.equal(a, b.cpu())
    assert there.names_read == host.names_read


def test_stacked_experts_are_read_one_at_a_time(tmp_path, device):
    """As transformers 5 may write them: gate above up, all experts in one tensor."""
    size = 2 * EXPERT
    w_EOI = torch.randn(EXPERTS, size, HIDDEN, generator=torch.Generator().manual_seed(1))
    stack, scales = quantize_blocks(w_EOI)
    save_file(
        {"gate_up_proj": stack, "gate_up_proj_scale_inv": scales}, tmp_path / "model.safetensors"
    )
    with DeviceCheckpoint(tmp_path, device) as there:
        for checkpoint in (there, Checkpoint(tmp_path)):
            shape = (EXPERTS, size, HIDDEN)
            kept = checkpoint.read_item("gate_up_proj", 2, shape, torch.float32, keep_float8=True)
            assert torch.equal(kept.view(torch.uint8).cpu(), stack[2].view(torch.uint8))
            assert torch.equal(kept.scale_PQ.cpu(), scales[2])
            upper, lower = halves(kept)
            numbers = checkpoint.read_item("gate_up_proj", 2, shape, torch.float32)
            assert torch.equal(torch.cat([plain(upper), plain(lower)]), numbers)


def test_a_file_that_shrinks_is_named(directories, tmp_path, device):
    shutil.copytree(directories["gqa"], tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    with DeviceCheckpoint(tmp_path / "copy", device) as checkpoint:
        checkpoint.read("model.norm.weight", (HIDDEN,), torch.bfloat16)
        os.truncate(file, 100)
        name = "model.layers.0.input_layernorm.weight"
        with pytest.raises(CheckpointError, match=f"{name}': cannot be read: the file") as error:
            checkpoint.read(name, (HIDDEN,), torch.bfloat16)
    assert str(file) in str(error.value)


def test_a_tensor_that_the_index_lists_and_the_file_lacks_is_named(directories, tmp_path, device):
    shutil.copytree(directories["gqa"], tmp_path / "copy")
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
def test_damage_is_named(directories, tmp_path, name, change, problem, device):
    file = damaged(directories["mla"], tmp_path / "copy", name, change)
    where = name if change else UP
    for loading in (lambda: load(tmp_path / "copy", device), lambda: load_solo(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match=problem) as error:
            loading()
        assert str(file) in str(error.value)
        assert repr(where) in str(error.value)


def test_parts_whose_blocks_do_not_line_up_are_quantised_again(tmp_path, caplog):
    """64 rows of queries above the latent's: their whole has blocks of both."""
    directory = write(tmp_path / "odd", "mla", q_lora_rank=64)
    with caplog.at_level(logging.WARNING):
        w_down = loader_of(Checkpoint(directory)).attention(0).w_down
    assert "q_a_proj.weight" in caplog.text
    assert "quantised again" in caplog.text
    numbers = loader_of(Checkpoint(directory), keep_float8=False).attention(0).w_down.float()
    assert isinstance(w_down, BlockScaled)
    assert (plain(w_down) - numbers).norm() / numbers.norm() < 0.04


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_a_tensor_parallel_rank(directories, rank, caplog):
    """Of 64 columns and rows, so amid a block; and of 192 rows, of which the second begins amid one."""
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=2)
    checkpoint = Checkpoint(directories["mla"])
    with caplog.at_level(logging.WARNING):
        found = loader_of(checkpoint, topology, rank=rank)
        kept = [found.attention(0).w_out_HN, found.dense_mlp(0).w13, found.dense_mlp(0).w2]
    wanted = loader_of(checkpoint, topology, rank=rank, keep_float8=False)
    numbers = [wanted.attention(0).w_out_HN, wanted.dense_mlp(0).w13, wanted.dense_mlp(0).w2]
    for part, whole in zip(kept, numbers, strict=True):
        assert isinstance(part, BlockScaled)
        assert (plain(part) - whole.float()).norm() / whole.float().norm() < 0.04
    assert ("o_proj.weight: this part begins amid a block" in caplog.text) == (rank == 1)


def test_experts_move_with_their_scales(directories, device):
    """As a migration does it: bytes of a slot to a peer's memory, or from the checkpoint; then a slot."""
    model = load(directories["mla"], device)
    slots = model.moe_layers[0].slots
    into = slots.new_weights()
    assert into.num_bytes == 3 * HIDDEN * EXPERT + 4 * (2 * 2 + 2)
    into.data[:] = slots[2].data
    assert into.fingerprint() == slots[2].fingerprint() != slots[1].fingerprint()
    again = slots.new_weights()
    loader_of(Checkpoint(directories["mla"])).fill(again, 0, 2)
    assert bytes(again.data) == bytes(into.data)
    before = slots.matrices(2)
    slots[0] = into
    for a, b in zip(slots.matrices(0), before, strict=True):
        assert torch.equal(a, b)
    assert slots[0].fingerprint() == into.fingerprint()


def test_quantised_as_they_are_loaded_they_are_the_same_from_everywhere(directories, device):
    """quantization fp8 of another checkpoint: a migration may fetch from a GPU or read and quantise."""
    directory = directories["mla-fp32"]
    slots = load(directory, device, quantization="fp8").moe_layers[0].slots
    alone = slots.new_weights()
    loader_of(Checkpoint(directory)).fill(alone, 0, 3)
    assert alone.fingerprint() == slots[3].fingerprint()


def test_a_gpu_without_float8_has_dense_matrices_in_bfloat16(directories, monkeypatch):
    monkeypatch.setattr(weights, "multiplies_float8", lambda device: False)
    model = load(directories["mla"], CPU)
    assert model.layers[0].attention.w_out.w_OI.dtype == torch.bfloat16
    assert model.moe_layers[0].slots.experts.is_float8


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


def test_an_expert_in_float8_on_the_host():
    expert = ExpertWeights(HIDDEN, EXPERT, FLOAT8)
    expert.fill(torch.ones(EXPERT, HIDDEN), torch.ones(EXPERT, HIDDEN), torch.ones(HIDDEN, EXPERT))
    assert torch.allclose(plain(expert.w13), torch.ones(()))
    with pytest.raises(ValueError, match="must be"):
        expert.fill(torch.ones(1, HIDDEN), torch.ones(EXPERT, HIDDEN), torch.ones(HIDDEN, EXPERT))
    with pytest.raises(ValueError, match=r"intermediate\(64\) in multiples of 128"):
        ExpertWeights(HIDDEN, 64, FLOAT8)
