"""Checkpoints in FP8: on the device byte by byte as in the file, and the same numbers on a CPU."""

import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.model.checkpoint import Checkpoint
from cluster.model.cuda import staging, weights
from cluster.model.cuda.checkpoint import DeviceCheckpoint
from comms.topology import Topology
from experts.float8 import FLOAT8, BlockScaled, dequantized, halves, plain, quantize_blocks
from experts.weights import ExpertWeights
from tests.gpu.float8_checkpoints import EXPERT, EXPERTS, HIDDEN, KINDS, load, loader_of, write
from tests.model.solo import load_solo, make_batch, new_cache

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
IDS = [5, 9, 33, 70, 2, 8, 90, 41, 17]


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
def test_bytes_and_scales_are_those_of_the_file(checkpoints, kind, device):
    model = load(checkpoints[kind], device)
    tensors = load_file(checkpoints[kind] / "model.safetensors")
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
def test_a_cpu_computes_with_the_numbers_that_they_stand_for(checkpoints, kind):
    scaled, numbers = load_solo(checkpoints[kind]), load_solo(checkpoints[f"{kind}-fp32"])
    found = logits_of(scaled, new_cache(scaled, 3, 16))
    assert torch.equal(found, logits_of(numbers, new_cache(numbers, 3, 16)))
    assert found.std() > 0.1


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize(
    ("quantization", "bound"), [(None, 0.15), ("fp8", 0.15), ("bfloat16", 0.03)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(checkpoints, kind, quantization, bound, kernels, device):
    """Of fp32: with rows in FP8 too, or in bfloat16 throughout."""
    if kernels and device.type == "cpu":
        pytest.skip("the kernels need a GPU (see test_model_interpreted)")
    exact = load_solo(checkpoints[f"{kind}-fp32"])
    model = load(checkpoints[kind], device, quantization=quantization, kernels=kernels)
    expected = logits_of(exact, new_cache(exact, 3, 16))
    found = logits_of(model, model.new_cache(3, 16))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < bound, error
    is_float8 = quantization != "bfloat16"
    assert model.moe_layers[0].slots.experts.is_float8 == is_float8
    assert (model.layers[0].attention.w_out.scale_PQ is not None) == is_float8


def test_readers_of_host_and_device_read_the_same(checkpoints, device, monkeypatch):
    """Every tensor, and parts of it; the buffers of the device's reader are far smaller than a tensor."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(staging, "_PIECE", 96)
    preadv = os.preadv  # which may give less than is asked for
    few = lambda file, into, start: preadv(file, [into[0][:80]], start)  # noqa: E731
    monkeypatch.setattr(staging.os, "preadv", few)
    directory = checkpoints["mla"]
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
def test_shards_of_a_tensor_parallel_rank(checkpoints, rank, caplog):
    """Of 64 columns and rows, so amid a block; and of 192 rows, of which the second begins amid one."""
    topology = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=2)
    checkpoint = Checkpoint(checkpoints["mla"])
    with caplog.at_level(logging.WARNING):
        found = loader_of(checkpoint, topology, rank=rank)
        kept = [found.attention(0).w_out_HN, found.dense_mlp(0).w13, found.dense_mlp(0).w2]
    wanted = loader_of(checkpoint, topology, rank=rank, keep_float8=False)
    numbers = [wanted.attention(0).w_out_HN, wanted.dense_mlp(0).w13, wanted.dense_mlp(0).w2]
    for part, whole in zip(kept, numbers, strict=True):
        assert isinstance(part, BlockScaled)
        assert (plain(part) - whole.float()).norm() / whole.float().norm() < 0.04
    assert ("o_proj.weight: this part begins amid a block" in caplog.text) == (rank == 1)


def test_experts_move_with_their_scales(checkpoints, device):
    """As a migration does it: bytes of a slot to a peer's memory, or from the checkpoint; then a slot."""
    model = load(checkpoints["mla"], device)
    slots = model.moe_layers[0].slots
    into = slots.new_weights()
    assert into.num_bytes == 3 * HIDDEN * EXPERT + 4 * (2 * 2 + 2)
    into.data[:] = slots[2].data
    assert into.fingerprint() == slots[2].fingerprint() != slots[1].fingerprint()
    again = slots.new_weights()
    loader_of(Checkpoint(checkpoints["mla"])).fill(again, 0, 2)
    assert bytes(again.data) == bytes(into.data)
    before = slots.matrices(2)
    slots[0] = into
    for a, b in zip(slots.matrices(0), before, strict=True):
        assert torch.equal(a, b)
    assert slots[0].fingerprint() == into.fingerprint()


def test_quantised_as_they_are_loaded_they_are_the_same_from_everywhere(checkpoints, device):
    """quantization fp8 of another checkpoint: a migration may fetch from a GPU or read and quantise."""
    directory = checkpoints["mla-fp32"]
    slots = load(directory, device, quantization="fp8").moe_layers[0].slots
    alone = slots.new_weights()
    loader_of(Checkpoint(directory)).fill(alone, 0, 3)
    assert alone.fingerprint() == slots[3].fingerprint()


def test_a_gpu_without_float8_has_dense_matrices_in_bfloat16(checkpoints, monkeypatch):
    monkeypatch.setattr(weights, "multiplies_float8", lambda device: False)
    model = load(checkpoints["mla"], CPU)
    assert model.layers[0].attention.w_out.w_OI.dtype == torch.bfloat16
    assert model.moe_layers[0].slots.experts.is_float8


def test_an_expert_in_float8_on_the_host():
    expert = ExpertWeights(HIDDEN, EXPERT, FLOAT8)
    expert.fill(torch.ones(EXPERT, HIDDEN), torch.ones(EXPERT, HIDDEN), torch.ones(HIDDEN, EXPERT))
    assert torch.allclose(plain(expert.w13), torch.ones(()))
    with pytest.raises(ValueError, match="must be"):
        expert.fill(torch.ones(1, HIDDEN), torch.ones(EXPERT, HIDDEN), torch.ones(HIDDEN, EXPERT))
    with pytest.raises(ValueError, match=r"intermediate\(64\) in multiples of 128"):
        ExpertWeights(HIDDEN, 64, FLOAT8)
