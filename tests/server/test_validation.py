"""Nothing that an engine should not see gets past the gateway, whatever the bytes."""

import math

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.server.client import ClientError
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from tests.server.serving import MAX_MODEL_LEN, VOCAB_SIZE, serve

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def serving():
    with serve(
        "chat.template=plain",
        "server.max_stop_strings=2",
        "server.max_stop_chars=8",
        "server.max_stop_token_ids=3",
        num_replicas=2,
    ) as serving:
        yield serving


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"prompt": ""}, "text", "at least one character"),
        ({"prompt": []}, "prompt", "a token at least"),
        ({"prompt": [VOCAB_SIZE]}, f"token_ids[0] = {VOCAB_SIZE}", f"[0, {VOCAB_SIZE - 1}]"),
        ({"prompt": [1, 2**32 - 1]}, f"token_ids[1] = {2**32 - 1}", f"[0, {VOCAB_SIZE - 1}]"),
        ({"prompt": [1] * MAX_MODEL_LEN}, f"{MAX_MODEL_LEN} tokens", f"= {MAX_MODEL_LEN - 1}"),
        ({"prompt": "cat " * 500}, "tokens", f"= {MAX_MODEL_LEN - 1}"),
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"temperature": math.nan}, "temperature", "at least 0"),
        ({"temperature": math.inf}, "temperature", "at most 100"),
        ({"top_p": 0.0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"top_p": math.nan}, "top_p", "at most 1"),
        ({"min_p": -math.inf}, "min_p", "at least 0"),
        ({"min_p": 1.01}, "min_p", "at most 1"),
        ({"top_k": -1}, "top_k", "from 0"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": -7}, "max_tokens", "from 1"),
        ({"stop": ["a", "b", "c"]}, "stop", "at most 2"),
        ({"stop": [""]}, "stop[0]", "from 1 to"),
        ({"stop": ["ok", "too long."]}, "stop[1]", "from 1 to 8"),
        ({"stop_token_ids": [1, VOCAB_SIZE]}, "stop_token_ids[1]", f"to {VOCAB_SIZE - 1}"),
        ({"stop_token_ids": [1, 2, 3, 4]}, "stop_token_ids", "at most 3"),
        ({"min_tokens": -1}, "min_tokens", "from 0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "at most 2"),
        ({"presence_penalty": math.nan}, "presence_penalty", "at most 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", f"to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {1: 101.0}}, "logit_bias[1]", "at most 100"),
        ({"allowed_token_ids": [2**32 - 1]}, "allowed_token_ids[0]", "from 0 to"),
        ({"bad_words": [""]}, "bad_words[0]", "from 1 to 8"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"prompt_logprobs": 2**32 - 1}, "prompt_logprobs", "from 0 to"),
        ({"json_schema": "{"}, "constraint.json_schema", "must be JSON"),
        ({"choices": []}, "constraint.choices", "a text at least"),
        ({"regex": ""}, "constraint.regex", "from 1 to"),
        ({"n": 0}, "n = 0", "[1, server.max_choices = 16]"),
        ({"cache_salt": "x" * 257}, "cache_salt", "1 to 256"),
        ({"request_id": ""}, "request_id", "1 to 256"),
        ({"request_id": "x" * 257}, "request_id", "1 to 256"),
        ({"data_parallel_rank": 2}, "data_parallel_rank = 2", "[0, 1]"),
    ],
)
def test_refused_with_field_value_and_range(serving, options, field, allowed):
    seen = [len(leader.received) for leader in serving.leaders]
    for ask in (serving.client.generate, lambda **o: list(serving.client.generate_stream(**o))):
        with pytest.raises(ClientError) as caught:
            ask(**({"prompt": PROMPT} | options))
        assert caught.value.code == "INVALID_ARGUMENT"
        assert field in caught.value.message
        assert allowed in caught.value.message
    assert [len(leader.received) for leader in serving.leaders] == seen
    assert serving.num_in_flight() == 0


def test_no_prompt(serving):
    with grpc.insecure_channel(serving.address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(sampling=pb.SamplingParams(seed=1)), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "no prompt" in caught.value.details()


def test_unknown_model(serving):
    for ask in (
        lambda: serving.client.generate(PROMPT, model="gpt"),
        lambda: list(serving.client.generate_stream(PROMPT, model="gpt")),
    ):
        with pytest.raises(ClientError, match=r"'gpt' is not served here.*'tiny'") as caught:
            ask()
        assert caught.value.code == "NOT_FOUND"
    assert serving.client.generate(PROMPT, model="tiny", max_tokens=1).token_ids


def test_text_without_tokenizer():
    with serve(with_tokenizer=False) as serving:
        with pytest.raises(ClientError, match="no tokenizer: send token_ids") as caught:
            serving.client.generate("text")
        assert caught.value.code == "FAILED_PRECONDITION"
        assert serving.num_in_flight() == 0


def test_too_large_message():
    with serve("server.max_message_mib=1") as serving:
        with pytest.raises(ClientError) as caught:
            serving.client.generate("x" * (2 << 20))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert serving.client.generate(PROMPT, max_tokens=1).token_ids


REQUEST_FIELDS = list(pb.GenerateRequest.DESCRIPTOR.fields)
SAMPLING_FIELDS = list(pb.SamplingParams.DESCRIPTOR.fields)


def values_of(field):
    """Anything that a field of this kind can hold, and often what it should."""
    match field.type:
        case field.TYPE_DOUBLE:
            return st.floats() | st.floats(0, 2)
        case field.TYPE_BOOL:
            return st.booleans()
        case field.TYPE_STRING:
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
        case field.TYPE_MESSAGE:
            return messages_of(field.message_type)
        case _:
            low, high = {
                field.TYPE_INT32: (-(2**31), 2**31 - 1),
                field.TYPE_UINT32: (0, 2**32 - 1),
                field.TYPE_UINT64: (0, 2**64 - 1),
            }[field.type]
            return st.integers(low, high) | st.integers(0, 50) | st.integers(0, VOCAB_SIZE)


@st.composite
def messages_of(draw, descriptor):
    """Any message of this type, with any few of its fields."""
    message = GetMessageClass(descriptor)()
    for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=3)):
        write(message, field, draw)
    return message


def write(message, field, draw):
    target = getattr(message, field.name)
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        keys, values = (values_of(entry.fields_by_name[name]) for name in ("key", "value"))
        target.update(draw(st.dictionaries(keys, values, max_size=4)))
    elif field.is_repeated:
        target.extend(draw(st.lists(values_of(field), max_size=4)))
    elif entry is not None:
        target.CopyFrom(draw(values_of(field)))
    else:
        setattr(message, field.name, draw(values_of(field)))


@st.composite
def request_messages(draw):
    """A request like any other, of which a few fields, of sampling too, are set to anything."""
    message = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=draw(st.integers(1, 9))))
    if draw(st.booleans()):
        message.text = "the cat"
    else:
        message.token_ids.ids.extend(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1)))
    for field in draw(st.lists(st.sampled_from(REQUEST_FIELDS), max_size=2)):
        write(message, field, draw)
    for field in draw(st.lists(st.sampled_from(SAMPLING_FIELDS), max_size=2)):
        write(message.sampling, field, draw)
    return message


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def raw_call(serving):
    """Generate with bytes of our choice; returns (status code, response)."""
    with grpc.insecure_channel(serving.address) as channel:
        method = channel.unary_unary(
            "/expertmesh.v1.Inference/Generate",
            response_deserializer=pb.GenerateResponse.FromString,
        )

        def call(data):
            try:
                return grpc.StatusCode.OK, method(data, timeout=20)
            except grpc.RpcError as error:
                return error.code(), error

        yield call


@FUZZ
@given(message=request_messages())
def test_any_message_is_answered_or_refused_clearly(serving, raw_call, message):
    code, result = raw_call(message.SerializeToString())
    assert code in EXPECTED, result
    if code == grpc.StatusCode.OK:
        longest = max(len(choice.token_ids) for choice in (result, *result.more_choices))
        assert result.usage.prompt_tokens + longest <= MAX_MODEL_LEN
    for leader in serving.leaders:
        for add in leader.of_type("add"):
            assert all(0 <= token_id < VOCAB_SIZE for token_id in add["token_ids"])


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_leave_the_server_alive(serving, raw_call, data):
    """Bytes that are no message at all fail in gRPC's own parser, before our code."""
    code, _ = raw_call(data)
    try:
        pb.GenerateRequest.FromString(data)
        is_message = True
    except DecodeError:
        is_message = False
    assert code in EXPECTED or not is_message
    assert serving.num_in_flight() == 0
