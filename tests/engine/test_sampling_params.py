"""Every wrong sampling parameter is refused with its name, its value and what is allowed."""

import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.sampling_params import MAX_SEED, Constraint, SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", math.nan, "temperature must be at least 0 and at most 100, got nan"),
        ("temperature", math.inf, "temperature must be at least 0 and at most 100, got inf"),
        ("temperature", -0.5, "got -0.5"),
        ("temperature", 10**400, "at most 100, got 10"),
        ("temperature", "1", "temperature must be a number at least 0 and at most 100, got '1'"),
        ("temperature", True, "temperature must be a number"),
        ("temperature", None, "temperature must be a number"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
        ("top_p", 1.01, "top_p must be above 0 and at most 1, got 1.01"),
        ("top_p", math.nan, "got nan"),
        ("min_p", -1e-9, "min_p must be at least 0 and at most 1, got -1e-09"),
        ("min_p", math.nan, "got nan"),
        ("top_k", -1, "top_k must be from 0 to 2147483647; 0 keeps all tokens, got -1"),
        ("top_k", 2**31, "got 2147483648"),
        ("top_k", 1.0, "top_k must be an integer from 0 to 2147483647"),
        ("top_k", True, "got True"),
        ("seed", -1, "seed must be from 0 to 18446744073709551615, got -1"),
        ("seed", MAX_SEED + 1, "got 18446744073709551616"),
        ("max_tokens", 0, "max_tokens must be from 1 to 2147483647, got 0"),
        ("max_tokens", math.nan, "max_tokens must be an integer"),
        ("stop", "text", "stop must be a list, got 'text'"),
        ("stop", ("a", ""), r"stop\[1\] must have from 1 to 65536 characters, got 0"),
        ("stop", (b"a",), r"stop\[0\] must be a string, got b'a'"),
        ("stop", ("\ud800",), r"stop\[0\] must be valid Unicode"),
        ("stop", ("a",) * 257, "stop must have at most 256 entries, got 257"),
        ("stop", ("a" * 65537,), "got 65537"),
        ("stop_token_ids", (1, -1), r"stop_token_ids\[1\] must be from 0 to 2147483647, got -1"),
        ("stop_token_ids", (1.0,), r"stop_token_ids\[0\] must be an integer"),
        ("stop_token_ids", 5, "stop_token_ids must be a list, got 5"),
        ("stop_token_ids", [0] * 65537, "at most 65536 entries, got 65537"),
        ("ignore_eos", 1, "ignore_eos must be true or false, got 1"),
        ("include_stop_string", "yes", "include_stop_string must be true or false, got 'yes'"),
        ("skip_special_tokens", None, "skip_special_tokens must be true or false, got None"),
        ("min_tokens", -1, "min_tokens must be from 0 to 2147483647, got -1"),
        (
            "frequency_penalty",
            2.01,
            "frequency_penalty must be at least -2 and at most 2, got 2.01",
        ),
        ("presence_penalty", -math.inf, "at least -2 and at most 2, got -inf"),
        ("presence_penalty", math.nan, "got nan"),
        ("repetition_penalty", 0, "repetition_penalty must be above 0 and at most 100, got 0"),
        ("repetition_penalty", math.nan, "got nan"),
        ("logit_bias", {1: 100.5}, r"logit_bias\[1\] must be at least -100 and at most 100"),
        ("logit_bias", {1: math.nan}, "got nan"),
        ("logit_bias", {"1": 1.0}, "logit_bias: a token id must be an integer from 0 .* got '1'"),
        ("logit_bias", {-1: 1.0}, "got -1"),
        ("logit_bias", [[1, 2, 3]], r"logit_bias must have pairs of id and bias, got \[1, 2, 3\]"),
        ("logit_bias", 5, "logit_bias must be a map of token ids, got 5"),
        ("allowed_token_ids", [1, -2], r"allowed_token_ids\[1\] must be from 0 to .*, got -2"),
        ("allowed_token_ids", "12", "allowed_token_ids must be a list, got '12'"),
        ("bad_words", [[1], []], r"bad_words\[1\] must have a token at least, got none"),
        ("bad_words", ["text"], r"bad_words\[0\] must be a list, got 'text'"),
        ("bad_words", [[2**31]], r"bad_words\[0\]\[0\] must be from 0 to 2147483647"),
        ("logprobs", -1, "logprobs must be from 0 to 65536, got -1"),
        ("logprobs", True, "logprobs must be an integer"),
        ("prompt_logprobs", 1.0, "prompt_logprobs must be an integer"),
        ("constraint", "json", "constraint must be a map of kind and text, got 'json'"),
        ("constraint", {"kind": "xml", "text": "a"}, "constraint.kind must be one of json_schema"),
        ("constraint", {"kind": [], "text": "a"}, "constraint.kind must be one of json_schema"),
        ("constraint", {"kind": "regex", "text": ""}, "constraint.regex must have from 1 to 65536"),
        ("constraint", {"kind": "regex", "text": "(" * 65}, "at most 64 deep, got 65"),
        ("constraint", {"kind": "json_schema", "text": "{"}, "constraint.json_schema must be JSON"),
        ("constraint", {"kind": "json_schema", "text": "[]"}, "must be an object, got '\\[\\]'"),
        ("constraint", {"kind": "choices", "text": "[]"}, "must have a text at least"),
        ("constraint", {"kind": "choices", "text": "[1]"}, r"choices\[0\] must be a string, got 1"),
    ],
)
def test_wrong_values_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(name)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="unknown sampling parameter 'best_of'; known: temperature"
    ):
        SamplingParams.from_dict({"best_of": 2})


@pytest.mark.parametrize("kind", ["json_schema", "choices"])
def test_json_beyond_what_a_parser_can_take_is_refused(kind):
    for text in ("[" * 60_000, '{"a":' * 9_000, "1" * 5_000, "NaN"):
        with pytest.raises(ValueError, match=f"constraint.{kind} must be"):
            Constraint(kind, text)


def test_a_constraint_decides_where_the_completion_ends():
    with pytest.raises(ValueError, match="ignore_eos must be false with a constraint"):
        SamplingParams(ignore_eos=True, constraint=Constraint("regex", "a+"))


constraints = st.builds(Constraint, st.just("regex"), st.just("a+")) | st.builds(
    Constraint, st.just("choices"), st.just('["a", "b"]')
)
ids = st.integers(0, 2**31 - 1)
rare = st.fixed_dictionaries(
    {},
    optional={
        "min_tokens": st.integers(0, 2**31 - 1),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2) | st.integers(-2, 2),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "logit_bias": st.dictionaries(ids, st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(ids, max_size=4),
        "bad_words": st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3),
        "logprobs": st.integers(0, 20) | st.none(),
        "prompt_logprobs": st.integers(0, 20) | st.none(),
        "constraint": constraints | st.none(),
        "include_stop_string": st.booleans(),
        "skip_special_tokens": st.booleans(),
    },
)


@settings(deadline=None)
@given(rare)
def test_what_few_requests_set_survives_the_wire_and_costs_nothing_elsewhere(values):
    params = SamplingParams(**values)
    sent = params.to_dict()
    assert SamplingParams.from_dict(msgpack.unpackb(msgpack.packb(sent))) == params
    unset = [name for name in values if getattr(params, name) == getattr(SamplingParams(), name)]
    assert not set(unset) & set(sent)


params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100) | st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, MAX_SEED),
    max_tokens=st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=4),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    ignore_eos=st.booleans(),
)


@settings(deadline=None)
@given(params)
def test_every_valid_object_survives_the_wire(params):
    wire = msgpack.unpackb(msgpack.packb(params.to_dict()))
    assert SamplingParams.from_dict(wire) == params


def test_vocabulary_and_server_caps():
    params = SamplingParams(stop=("abc", "d"), stop_token_ids=(1, 9))
    params.check_vocabulary(10)
    for name, value in [
        ("logit_bias", {9: 1.0}),
        ("allowed_token_ids", (1, 9)),
        ("bad_words", ((1, 9),)),
    ]:
        several = SamplingParams(**{name: value})
        several.check_vocabulary(10)
        with pytest.raises(ValueError, match=f"^{name}.*must be from 0 to 8, got 9"):
            several.check_vocabulary(9)
    with pytest.raises(ValueError, match=r"stop_token_ids\[1\] must be from 0 to 8, got 9"):
        params.check_vocabulary(9)
    caps = {"max_stop_strings": 2, "max_stop_chars": 3, "max_stop_token_ids": 2}
    params.check_caps(**caps)
    for name, message in [
        ("max_stop_strings", "stop must have at most 1 entries, got 2"),
        ("max_stop_chars", r"stop\[0\] must have from 1 to 2 characters, got 3: 'abc'"),
        ("max_stop_token_ids", "stop_token_ids must have at most 1 entries, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            params.check_caps(**{**caps, name: caps[name] - 1})
    for name in ("logprobs", "prompt_logprobs"):
        SamplingParams(**{name: 5}).check_caps(**caps, max_logprobs=5)
        with pytest.raises(ValueError, match=f"{name} must be from 0 to 4, got 5"):
            SamplingParams(**{name: 5}).check_caps(**caps, max_logprobs=4)
