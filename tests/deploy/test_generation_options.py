"""What requests can ask for, on a real cluster: the oracle is transformers with the same checkpoint.

The cluster computes in BF16 and transformers here in FP32, hence the tolerances.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from uuid import uuid4

import jsonschema
import numpy as np
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from cluster.server.client import Client, ClientError
from cluster.server.errors import Code
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from deploy.settings import BUNDLED_MODELS

PROMPT = "It was a bright cold morning, and"
MEAN_TOLERANCE, LARGEST_DIFFERENCE = 0.05, 0.5
"""Of log probabilities, in nats."""
BLOCK = 32
"""Of the cache, as the demo's configuration has it."""


@pytest.fixture(scope="module")
def client(served: object, request: pytest.FixtureRequest) -> Iterator[Client]:
    endpoint = served.wait_for(r"serving mosaic on (\S+)", 1)[1]  # type: ignore[attr-defined]
    with Client(endpoint, timeout_s=120) as client:
        yield client


class Oracle:
    """What transformers makes of a sequence: log probabilities and the experts of every token."""

    def __init__(self, token_ids: list[int]) -> None:
        model = DeepseekV3ForCausalLM.from_pretrained(BUNDLED_MODELS["mosaic"], dtype=torch.float32)
        chosen: list[torch.Tensor] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(
                    lambda _, __, out: chosen.append(
                        next(part for part in out if not part.is_floating_point())
                    )
                )
        with torch.inference_mode():
            logits = model.eval()(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        self.logprobs = logits.log_softmax(-1)
        self.experts_TLK = torch.stack(chosen, dim=1).numpy()


class Answered:
    """One greedy answer with everything that there is to tell about it."""

    def __init__(self, client: Client) -> None:
        self.response = client.generate(
            PROMPT,
            temperature=0.0,
            max_tokens=24,
            logprobs=3,
            prompt_logprobs=2,
            return_routed_experts=True,
        )
        self.prompt_ids = client.tokenize(PROMPT)
        self.token_ids = [*self.prompt_ids, *self.response.token_ids]

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.token_ids)


@pytest.fixture(scope="module")
def answered(client: Client) -> Answered:
    return Answered(client)


def test_log_probabilities_are_those_of_transformers(answered: Answered) -> None:
    first = len(answered.prompt_ids)
    told = [*answered.response.prompt_logprobs, *answered.response.logprobs]
    assert [one.token_id for one in told] == answered.token_ids[1:]
    assert len(answered.response.prompt_logprobs) == first - 1
    differences = []
    for position, one in enumerate(told):
        row = answered.oracle.logprobs[position]
        differences.append(abs(row[one.token_id].item() - one.logprob))
        for token_id, logprob in zip(one.top_ids, one.top_logprobs, strict=True):
            differences.append(abs(row[token_id].item() - logprob))
    assert np.mean(differences) < MEAN_TOLERANCE
    assert max(differences) < LARGEST_DIFFERENCE


def test_ranks_and_alternatives_agree_with_each_other(answered: Answered) -> None:
    for told, num_top in ((answered.response.prompt_logprobs, 2), (answered.response.logprobs, 3)):
        for one in told:
            assert len(one.top_ids) == num_top
            assert all(high >= low for high, low in pairwise(one.top_logprobs))
            if one.rank <= num_top:
                assert one.top_ids[one.rank - 1] == one.token_id
                assert one.top_logprobs[one.rank - 1] == one.logprob
            else:
                assert one.token_id not in one.top_ids
    # Greedy tokens are the likeliest ones.
    assert {one.rank for one in answered.response.logprobs} == {1}


def test_routed_experts_are_those_of_transformers(answered: Answered) -> None:
    """All of them, but where two scores are so close that BF16 takes the other one."""
    rows = []
    for one in answered.response.routed_experts:
        shape = (-1, one.num_layers, one.experts_per_token)
        assert one.start == sum(len(row) for row in rows)
        rows.append(np.frombuffer(one.ids, "<u2").reshape(shape))
    told_TLK, true_TLK = np.concatenate(rows), answered.oracle.experts_TLK[:-1]
    assert told_TLK.shape == true_TLK.shape
    same = np.mean(np.sort(told_TLK, axis=-1) == np.sort(true_TLK, axis=-1))
    assert same > 0.95


def test_choices_are_what_they_would_be_alone(client: Client) -> None:
    options = {"temperature": 0.9, "max_tokens": 12}
    together = client.generate(PROMPT, n=3, seed=5, **options)
    choices = [together, *together.more_choices]
    for idx, choice in enumerate(choices):
        alone = client.generate(PROMPT, seed=5 + idx, **options)
        assert list(choice.token_ids) == list(alone.token_ids)
    assert len({choice.text for choice in choices}) == 3
    assert together.usage.completion_tokens == sum(len(choice.token_ids) for choice in choices)


def test_a_repeated_prompt_is_found_in_the_cache_and_changes_no_token(client: Client) -> None:
    prompt_ids = client.tokenize(PROMPT + " nobody had ever seen it so quiet. " * 8)
    options = {"seed": 3, "max_tokens": 6, "data_parallel_rank": 0, "cache_salt": uuid4().hex}
    first, second = (client.generate(prompt_ids, **options) for _ in range(2))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == (len(prompt_ids) - 1) // BLOCK * BLOCK > 0
    assert list(first.token_ids) == list(second.token_ids)
    other = client.generate(prompt_ids, **(options | {"cache_salt": "another"}))
    assert other.usage.cached_tokens == 0
    (load, _) = client.loads().replicas
    assert load.prefix_hits >= second.usage.cached_tokens
    assert load.kv_blocks_cached > 0
    client.flush_cache()
    flushed = client.generate(prompt_ids, **options)
    assert flushed.usage.cached_tokens == 0
    assert list(flushed.token_ids) == list(first.token_ids)


def test_rules_for_tokens_are_kept(client: Client) -> None:
    plain = client.generate(PROMPT, temperature=0.0, max_tokens=12)
    word = plain.text.split()[1]
    without = client.generate(PROMPT, temperature=0.0, max_tokens=12, bad_words=[word])
    assert word not in without.text.split()
    allowed = client.tokenize(" a b c d e")
    among = client.generate(PROMPT, max_tokens=8, allowed_token_ids=allowed, logit_bias={})
    assert set(among.token_ids) <= set(allowed)
    forced = client.generate(PROMPT, max_tokens=3, logit_bias={allowed[0]: 100.0}, min_tokens=3)
    assert list(forced.token_ids) == [allowed[0]] * 3
    # A token of the completion loses 2 for each time it is there: no word comes over and over.
    fresh = client.generate(
        "la la la la la la", temperature=0.0, max_tokens=16, frequency_penalty=2.0,
        presence_penalty=2.0, repetition_penalty=2.0,
    )  # fmt: skip
    assert max(list(fresh.token_ids).count(token_id) for token_id in fresh.token_ids) <= 3


def test_constraints_are_kept(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.generate("A person as JSON: ", json_schema=schema, seed=1, max_tokens=120)
    if answer.finish.reason == pb.FinishInfo.STOP:
        jsonschema.validate(json.loads(answer.text), schema)
    else:  # a long number: still the beginning of what the schema allows
        assert re.match(r'\s*\{\s*"name"\s*:', answer.text)
    date = client.generate("Today is ", regex=r"\d{4}-\d{2}-\d{2}", max_tokens=32)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.text)
    choice = client.generate("Yes or no? ", choices=["yes", "no"], n=2, max_tokens=16)
    assert {choice.text, choice.more_choices[0].text} <= {"yes", "no"}
    with pytest.raises(ClientError, match="regex") as caught:
        client.generate("Today is ", regex="(unclosed")
    assert caught.value.code == Code.INVALID_ARGUMENT


def test_priority_and_expired_deadlines(client: Client) -> None:
    assert client.generate(PROMPT, max_tokens=1, priority=-7).token_ids
    with pytest.raises(ClientError) as caught:
        client.generate(PROMPT, max_tokens=500, ignore_eos=True, timeout_s=0.2)
    assert caught.value.code == Code.DEADLINE_EXCEEDED
