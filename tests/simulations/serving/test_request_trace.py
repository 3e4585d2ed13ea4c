"""Traces of requests: three sets of names, and one clear error for anything else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.serving.arrivals import Arrival
from simulations.serving.request_trace import TraceError, read_trace

OURS = "arrival_s,prompt_tokens,output_tokens\n2.5,100,7\n1.0,4,0\n1.25,9,3\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,110,27\r\n"
    "2023-11-16 18:17:04.0781490,110,27"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:00.017335+00:00,2399,6\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": []}\n'
)


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_trace(path)

    return read_text


def test_our_columns_in_order_of_arrival_from_second_0(read):
    assert read(OURS) == [Arrival(0.0, 4, 1), Arrival(0.25, 9, 3), Arrival(1.5, 100, 7)]
    lines = '{"arrival_s": 3, "prompt_tokens": 5, "output_tokens": 6, "user": "x"}\n'
    assert read(lines) == [Arrival(0.0, 5, 6)]


def test_azure_columns(read):
    first, second, third = read(AZURE)
    assert first == Arrival(0.0, 4808, 10)
    assert second[0] == pytest.approx(0.052, abs=1e-6)
    assert third[0] == pytest.approx(0.098189, abs=1e-6)
    assert read(AZURE_2024)[1].time_s == pytest.approx(0.007405, abs=1e-6)


def test_mooncake_columns_are_milliseconds(read):
    assert read(MOONCAKE) == [Arrival(0.0, 6955, 52), Arrival(pytest.approx(3.053), 6472, 26)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no requests"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        ("a,b\n1,2\n", "line 2: columns a, b are none of"),
        (OURS + "3.0,1", "line 5: 2 cells under 3 columns"),
        (OURS + "-3.0,1,1\n", "line 5: arrival_s = '-3.0' is not a number of at least 0"),
        (OURS + "nan,1,1\n", "line 5: arrival_s"),
        (OURS + "1e99,1,1\n", "line 5: arrival_s = '1e99' is too late"),
        (OURS + "3.0,0,1\n", "line 5: prompt_tokens = '0' is no number of tokens from 1"),
        (OURS + "3.0,1.5,1\n", "line 5: prompt_tokens"),
        (OURS + "3.0,5,-1\n", "line 5: output_tokens"),
        (AZURE + "\nyesterday,1,1\n", "line 5: TIMESTAMP = 'yesterday' is no date and time"),
        (MOONCAKE[:100], "line 2: not JSON|line 1: not JSON"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3: input_length is missing"),
        (MOONCAKE + '{"timestamp": true, "input_length": 1, "output_length": 1}', "no number"),
        ('{"timestamp": 1' + "[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_what_is_no_trace_is_refused_naming_the_line(read, text, says):
    with pytest.raises(TraceError, match=says) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.none())
)
ROWS = st.dictionaries(
    st.sampled_from(["arrival_s", "prompt_tokens", "output_tokens", "timestamp", "input_length"]),
    VALUES,
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(ROWS, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        st.tuples(st.sampled_from([OURS, AZURE, MOONCAKE]), st.integers(0, 300), st.binary()).map(
            lambda t: t[0].encode()[: t[1]] + t[2]
        ),
    )
)
def test_any_bytes_are_a_trace_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    try:
        arrivals = read_trace(path)
    except TraceError:
        return
    assert arrivals[0].time_s == 0
    assert arrivals == sorted(arrivals, key=lambda arrival: arrival.time_s)
    assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 for a in arrivals)
