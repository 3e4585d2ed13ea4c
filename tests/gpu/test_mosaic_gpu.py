"""`mosaic` on a GPU: the CPU's tokens, and the same bits in every company."""

from dataclasses import replace

import pytest
import torch

from router.placement import Placement
from tests.gpu.greedy import BLOCKS, MOSAIC, Sequence, decode, load_on, prompts
from tests.model.solo import load_solo, make_batch, new_cache, solo_groups

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def model():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU (bash .ci/gpu runs these tests on a machine that has one)")
    return load_on(torch.device("cuda"))


def watched(at: int = 0, **options) -> Sequence:
    """The sequence whose bits must not change, in the blocks of place `at`."""
    return Sequence(ids=list(prompts()[0]), first=at * BLOCKS, wanted=NUM_TOKENS, **options)


def alone(model) -> Sequence:
    return decode(model, model.new_cache(BLOCKS, 16), [watched()])[0]


def others(number: int, at: int = 1, **options) -> list[Sequence]:
    """Of all domains and lengths, ending at different times."""
    texts = prompts()
    return [
        Sequence(
            ids=list(texts[i % 4]) * (1 + i % 5),
            first=(at + i) * BLOCKS,
            wanted=3 + 5 * (i % 9),
            **options,
        )
        for i in range(number)
    ]


def assert_same(found: Sequence, expected: Sequence) -> None:
    assert found.tokens == expected.tokens
    for step, (a, b) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert torch.equal(a, b), f"step {step}: {(a != b).sum()} logits differ"


def test_the_same_bits_in_any_company(model):
    """Alone; last of 17 that begin and end at other times; amid 40, in other blocks."""
    expected = alone(model)
    assert len(set(expected.tokens)) > 10, "a text, not one token again and again"
    kv = model.new_cache(41 * BLOCKS, 16)
    for number in (16, 40):
        company = others(number, at=0)
        mine = watched(at=number)
        decode(model, kv, [*company[: number // 2], mine, *company[number // 2 :]])
        assert_same(mine, expected)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_same_bits_however_a_prompt_is_cut(model, chunk):
    expected = alone(model)
    kv = model.new_cache(4 * BLOCKS, 16)
    mine = watched(chunk=chunk)
    decode(model, kv, [mine, *others(3, chunk=5)])
    assert_same(mine, expected)


def test_the_same_bits_with_and_without_graphs(model):
    expected = alone(model)
    assert len(model.graphs) > 0
    eager = replace(model, graphs=None)
    assert_same(alone(eager), expected)
    kv = model.new_cache(9 * BLOCKS, 16)
    mine = watched()
    decode(eager, kv, [mine, *others(8)])
    assert_same(mine, expected)


def test_ten_runs(model):
    runs = [alone(model) for _ in range(10)]
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_the_tokens_of_the_cpu(model):
    """Wherever the GPU would choose another token after the same ones, the CPU's own two best are as near
    as the roundings of bfloat16: its last one, of the logits, and what those before add up to."""
    torch.set_num_threads(1)  # as a rank does: its products are stable for that
    cpu, exact = load_solo(MOSAIC, torch.bfloat16), load_solo(MOSAIC, torch.float32)
    sequences = [
        Sequence(ids=list(ids), first=i * BLOCKS, wanted=NUM_TOKENS)
        for i, ids in enumerate(prompts())
    ]
    decode(cpu, new_cache(cpu, 4 * BLOCKS, 16, torch.bfloat16), sequences)
    differ, errors = 0, []
    for sequence in sequences:
        ids, start = sequence.ids[:-1], len(sequence.ids) - 1 - NUM_TOKENS
        batch = make_batch([(ids, 0, list(range(BLOCKS)), range(start, len(ids)))], 16)
        found = model.forward(batch, model.new_cache(BLOCKS, 16)).cpu()
        ideal = exact.forward(batch, new_cache(exact, BLOCKS, 16))
        own = torch.stack(sequence.logits)
        errors.append(
            torch.stack([(x - ideal).norm(dim=1) / ideal.norm(dim=1) for x in (found, own)])
        )
        for at, (chosen, token) in enumerate(
            zip(found.argmax(1).tolist(), sequence.tokens, strict=True)
        ):
            if chosen != token:
                differ += 1
                gap = float(own[at, token] - own[at, chosen])
                step = float(own[at, token].abs()) * 2**-7  # between neighbours in bfloat16
                noise = float((own[at] - ideal[at]).std())
                print(f"token {at}: gap {gap:.4f}; a step is {step:.4f}, errors {noise:.4f}")
                assert gap <= step + 4 * noise
    error, of_cpu = torch.cat(errors, dim=1).median(dim=1).values.tolist()
    print(f"{differ} of {4 * NUM_TOKENS} tokens differ; relative L2 of logits to fp32: ", end="")
    print(f"{error:.4f}, of the CPU's {of_cpu:.4f} (medians)")
    assert error < 1.3 * of_cpu
    assert differ <= 4 * NUM_TOKENS // 10


def test_experts_that_change_slots_change_no_bit(model):
    """Numbers in two tables, which captured graphs read too."""
    expected, index = alone(model), 1
    layer, config = model.moe_layers[index], model.config
    before, slots = layer.layer_placement, layer.slots
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    row = placement.physical_to_logical[index].copy()
    row[[2, 9]] = row[[9, 2]]
    slots[2], slots[9] = slots[9], slots[2]
    try:
        assert any(
            not torch.equal(a, b) for a, b in zip(alone(model).logits, expected.logits, strict=True)
        ), "the layer does not follow its buffers"
        layer.layer_placement = placement.with_layers({index: row}, 1).layer(index)
        assert_same(alone(model), expected)
    finally:
        slots[2], slots[9] = slots[9], slots[2]
        layer.layer_placement = before


def test_served_by_the_engine(model):
    """Runner, scheduler and sampler around it, without Ray: greedy tokens are those of plain decoding."""
    pytest.importorskip("zmq")
    from cluster import offline
    from cluster.config import ServeConfig
    from cluster.engine.sampling_params import SamplingParams

    config = ServeConfig.from_dict(
        {"model": str(MOSAIC), "device": "cuda", "scheduler": {"max_num_batched_tokens": 64}}
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    seeded = SamplingParams(temperature=0.8, seed=7, max_tokens=9, logprobs=2)
    frames = [offline.add_frame("greedy", prompts()[0], greedy)]
    frames += [offline.add_frame(f"other-{i}", prompts()[i % 4], seeded) for i in range(9)]
    tokens = offline.generate(solo_groups(), config, frames)
    assert tokens["greedy"] == alone(model).tokens
    assert all(0 < len(ids) <= 9 for name, ids in tokens.items() if name != "greedy")
