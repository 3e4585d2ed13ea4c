"""The bundled model: small, loadable by transformers alone, and better than an n-gram."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from deploy.models.prompts import DEMO_PROMPTS
from deploy.settings import BUNDLED_MODELS

MOSAIC = BUNDLED_MODELS["mosaic"]
MAX_BYTES = 24_000_000
HELD_OUT = Path(__file__).parents[1] / "data" / "mosaic_held_out.json"

# Bits per byte of the order-5 token n-gram, as the model card states them: the bound to beat.
BASELINE = {"english": 1.951, "chinese": 2.029, "python": 1.539, "arithmetic": 0.774}


@pytest.fixture(scope="module")
def model() -> Iterator[DeepseekV3ForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield DeepseekV3ForCausalLM.from_pretrained(MOSAIC, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MOSAIC / "tokenizer.json"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MOSAIC / "config.json").read_text())


def test_it_is_at_most_24_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in MOSAIC.iterdir()}
    assert sum(sizes.values()) <= MAX_BYTES, sizes


def test_it_has_the_shape_that_the_card_promises(config: dict[str, Any]) -> None:
    assert config["model_type"] == "deepseek_v3"
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (32, 4)
    assert (config["n_group"], config["topk_group"]) == (4, 2)
    assert (config["n_shared_experts"], config["first_k_dense_replace"]) == (1, 1)
    assert config["num_attention_heads"] % 4 == 0
    assert config["vocab_size"] % 4 == 0
    assert config["max_position_embeddings"] >= 2048


def test_transformers_finds_every_weight_and_no_other() -> None:
    _, info = DeepseekV3ForCausalLM.from_pretrained(
        MOSAIC, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_weights_are_finite_and_biases_exact_in_bf16(model: DeepseekV3ForCausalLM) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, tensor.to(torch.bfloat16).float()), name
    biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    assert len(biases) == 5
    assert all(bias.abs().max() > 0 for bias in biases)  # the balance rule did something


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    single = {tokenizer.id_to_token(idx) for idx in range(1, 257)}
    assert len(single) == 256
    assert all(len(token) == 1 for token in single)


@given(st.text(max_size=200))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(MOSAIC / "tokenizer.json"))
    if "<|endoftext|>" not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_tokenizer_agrees(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(MOSAIC)
    for text in ("Holmes said:\n\n  “你好” 1234 \t\x00 é😀", *(p.text for p in DEMO_PROMPTS)):
        assert theirs(text).input_ids == tokenizer.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == 0


@pytest.mark.parametrize("domain", BASELINE)
def test_it_beats_the_n_gram_on_held_out_text(
    domain: str, model: DeepseekV3ForCausalLM, tokenizer: Tokenizer
) -> None:
    text = json.loads(HELD_OUT.read_text(encoding="utf-8"))["domains"][domain]["text"]
    assert len(text.encode()) > 2000
    ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    nats = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert nats / math.log(2) / len(text.encode()) < BASELINE[domain]


def test_the_card_reports_a_win_on_every_domain_and_no_dead_expert() -> None:
    report = json.loads((MOSAIC / "evaluation.json").read_text(encoding="utf-8"))
    for domain, stated in BASELINE.items():
        baseline = min(report["baseline"][domain].values())
        assert baseline == pytest.approx(stated, abs=1e-3)
        assert report["test"][domain]["bits_per_byte"] < baseline
    for layer, load in report["load"].items():
        assert load["smallest_all"] > 0.1, layer
        assert load["imbalance_all"] < 2, layer
        assert max(load["imbalance"].values()) > 1.5, layer  # domains prefer different experts
