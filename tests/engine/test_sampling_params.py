"""Every wrong sampling parameter is refused with its name, its value and what is allowed."""

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.sampling_params import MAX_SEED, SamplingParams


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


@given(params)
def test_every_valid_object_survives_the_wire(params):
    wire = msgpack.unpackb(msgpack.packb(params.to_dict()))
    assert SamplingParams.from_dict(wire) == params


def test_vocabulary_and_server_caps():
    params = SamplingParams(stop=("abc", "d"), stop_token_ids=(1, 9))
    params.check_vocabulary(10)
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
