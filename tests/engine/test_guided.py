"""Whatever the model wants to say, a guided completion is what its constraint describes."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.engine import guided
from cluster.engine.constraint import Constraint
from cluster.engine.guided import GuideCompiler
from cluster.engine.sampler import FAILED, Sampler
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.sequence import Sequence

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "mosaic"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
V, EOS = 6144, 0


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(V, [EOS], MODEL)


def sequence(kind: str, text: str, **params) -> Sequence:
    made = Sequence("any", [5, 6], SamplingParams(constraint=Constraint(kind, text), **params))
    made.stop_token_ids |= {EOS}
    return made


def ready(sampler: Sampler, row: Sequence) -> Sequence:
    sampler.add(row)
    row.sampler_state.compiled.exception(timeout=60)
    assert sampler.is_ready(row)
    return row


def _pool() -> torch.Tensor:
    logits_NV = np.random.default_rng(1).standard_normal((256, V)).astype(np.float32) * 3
    # What ends texts, lists and all is likelier, or completions would be long.
    logits_NV[:, [EOS, *map(TOKENIZER.token_to_id, '"]}')]] += 9
    return torch.from_numpy(logits_NV)


POOL = _pool()


def random_logits(seed: int, step: int, num_rows: int = 1) -> torch.Tensor:
    """Of no model: anything may be likely."""
    first = (seed * 31 + step * 7) % (len(POOL) - num_rows)
    return POOL[first : first + num_rows]


def completed(sampler: Sampler, row: Sequence, seed: int, most: int = 150) -> str:
    """The text of a completion that the model has no say in."""
    ready(sampler, row)
    for step in range(most):
        (one,) = sampler.sample(random_logits(seed, step), [row])
        assert one.token_id != FAILED, one.error
        if one.token_id == EOS:
            return TOKENIZER.decode(row.token_ids[2:], skip_special_tokens=False)
        row.token_ids.append(one.token_id)
    assume(False)  # did not end by chance
    return ""


names = st.text("abcXYZ é", min_size=1, max_size=4)
leaves = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string"},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]+x$"},
        {"type": "integer", "minimum": -5, "maximum": 17},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
        {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 60},
        {"type": ["integer", "null"]},
        {"enum": ["a", 1, None, {"b": [1.5]}]},
        {"const": 'quo"te'},
    ]
)


def _containers(inner):
    return (
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner)
        | st.builds(
            lambda first: {"type": "array", "prefixItems": first, "items": False},
            st.lists(inner, min_size=1, max_size=2),
        )
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(
            lambda properties, number, others: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:number],
                "additionalProperties": others,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
            st.just(False) | inner,
        )
    )


schemas = st.recursive(leaves, _containers, max_leaves=6)


@settings(max_examples=100, deadline=None)
@given(schemas, st.integers(0, 10_000))
def test_every_completion_of_a_schema_parses_and_validates(sampler, schema, seed):
    text = completed(sampler, sequence("json_schema", json.dumps(schema), seed=seed), seed)
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_a_recursive_schema_and_any_json(sampler, seed):
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    text = completed(sampler, sequence("json_schema", json.dumps(tree), seed=seed), seed)
    jsonschema.validate(json.loads(text), tree)
    json.loads(completed(sampler, sequence("json_schema", "{}", seed=seed), seed))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(
        ["[a-z]{2,8}@[a-z]+\\.(com|org)", "(yes|no|maybe)!?", "\\d{4}-\\d{2}-\\d{2}", "[^a-z ]{3}", "(ab?){1,5}c"]
    ),
    st.integers(0, 10_000),
)  # fmt: skip
def test_every_completion_of_a_regex_matches_all_of_it(sampler, pattern, seed):
    text = completed(sampler, sequence("regex", pattern, seed=seed), seed)
    assert re.fullmatch(pattern, text)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=9
    ),
    st.integers(0, 10_000),
)
def test_every_completion_of_choices_is_one_of_them(sampler, texts, seed):
    row = sequence("choices", json.dumps(texts), seed=seed)
    assert completed(sampler, row, seed) in texts


def test_a_grammar_of_balanced_brackets(sampler):
    grammar = 'root ::= "(" root* ")"'
    closing = {TOKENIZER.token_to_id(")"): 12.0}
    for seed in range(5):
        row = sequence("grammar", grammar, seed=seed, logit_bias=closing)
        text = completed(sampler, row, seed)
        assert not re.sub(r"[()]", "", text)
        while "()" in text:
            text = text.replace("()", "")
        assert text == ""


def test_a_sequence_goes_on_the_same_after_its_state_is_lost(sampler):
    """Preempted or moved: a new object with the same tokens samples the same ones."""
    wish = ("json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 6}')
    steady, tokens = ready(sampler, sequence(*wish, seed=3)), []
    for step in range(25):
        other = ready(sampler, sequence(*wish, seed=3))
        other.token_ids += tokens
        (one,) = sampler.sample(random_logits(3, step), [steady])
        assert sampler.sample(random_logits(3, step), [other]) == [one]
        if one.token_id == EOS:
            break
        tokens.append(one.token_id)
        steady.token_ids.append(one.token_id)
    assert len(tokens) > 3


def test_rows_beside_it_are_not_constrained(sampler):
    free = Sequence("free", [5, 6], SamplingParams(seed=1))
    row = ready(sampler, sequence("choices", '["x"]'))
    logits_NV = random_logits(4, 0, 2)
    first, second = sampler.sample(logits_NV, [free, row])
    assert sampler.sample(logits_NV[:1], [free]) == [first]
    assert TOKENIZER.id_to_token(second.token_id) == "x"


def test_what_wins():
    """min_tokens and bias yield to a constraint that is met; what excludes it fails the request."""
    sampler = Sampler(V, [EOS], MODEL)
    x = TOKENIZER.token_to_id("x")
    patient = sequence("choices", '["x"]', min_tokens=5, logit_bias={x: -100.0})
    assert completed(sampler, patient, 1) == "x"
    longer = sequence("regex", "x+", min_tokens=5)
    assert len(completed(sampler, longer, 1)) >= 5
    excluded = ready(sampler, sequence("choices", '["x"]', bad_words=[[x]]))
    (one,) = sampler.sample(random_logits(1, 0), [excluded])
    assert one.token_id == FAILED
    assert "no token is left" in one.error


def test_tokens_that_do_not_follow_the_constraint_end_it_with_an_error(sampler):
    """As after a mistake elsewhere: never a completion that only looks like one."""
    row = ready(sampler, sequence("choices", '["abc"]'))
    row.token_ids.append(TOKENIZER.token_to_id("z"))
    (one,) = sampler.sample(random_logits(1, 0), [row])
    assert one.token_id == FAILED


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(", "constraint.regex is not valid: .*parenthesis is not closed"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("grammar", "nothing", 'root rule with name "root" is not found'),
        (
            "json_schema",
            '{"type": "text"}',
            "constraint.json_schema is not valid: Unsupported type",
        ),
        ("json_schema", '{"$ref": "#/nowhere"}', "Cannot find field nowhere"),
        ("json_schema", "false", "cannot accept any value"),
    ],
)
def test_what_does_not_compile_is_refused_alone_with_the_reason(sampler, kind, text, message):
    row = sequence(kind, text)
    sampler.add(row)
    row.sampler_state.compiled.exception(timeout=60)
    with pytest.raises(ValueError, match=message):
        sampler.is_ready(row)


def test_models_that_can_have_no_constraints(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        GuideCompiler(tmp_path, V, [EOS])
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        GuideCompiler(None, V, [EOS])
    with pytest.raises(ValueError, match="end-of-sequence token"):
        GuideCompiler(MODEL, V, [])


def test_without_the_extra_the_request_is_refused_alone(monkeypatch):
    monkeypatch.setattr(guided, "find_spec", lambda name: None)
    sampler = Sampler(V, [EOS], MODEL)
    with pytest.raises(ValueError, match=r"pip install 'expertmesh\[guided\]'"):
        sampler.add(sequence("regex", "a"))
    sampler.add(Sequence("free", [5], SamplingParams()))


def test_special_tokens_are_no_text(tmp_path):
    """A tokenizer's marks would vanish from what the client reads."""
    marked = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    marked.add_special_tokens(["<|mark|>"])
    marked.save(str(tmp_path / "tokenizer.json"))
    sampler = Sampler(V + 1, [EOS], tmp_path)
    row = ready(sampler, sequence("regex", ".+"))
    logits_NV = torch.zeros(1, V + 1)
    logits_NV[0, V] = 50.0
    assert marked.token_to_id("<|mark|>") == V
    (one,) = sampler.sample(logits_NV, [row])
    assert one.token_id < V
