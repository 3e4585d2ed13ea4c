"""Every call through a client that knows nothing but the server's own description of itself."""

import base64

import grpc
import pytest

from cluster.server.proto.expertmesh.v1 import control_pb2, inference_pb2
from tests.server.reflection_client import ReflectionClient
from tests.server.serving import VOCAB_SIZE, serve
from tests.server.stub_leader import NUM_CHOSEN, NUM_LAYERS, completion

INFERENCE, CONTROL = "expertmesh.v1.Inference", "expertmesh.v1.Control"
PROMPT = [5, 6, 7]
PRESET = "{short: {system: Be brief., sampling: {temperature: 0.2, top_p: 0.95}}}"


@pytest.fixture(scope="module")
def serving():
    with serve("chat.template=plain", f"chat.presets={PRESET}", num_replicas=2) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(serving):
    with ReflectionClient(serving.address) as client:
        yield client


def test_services_and_methods_are_those_of_the_proto_files(client):
    assert client.services() >= {INFERENCE, CONTROL, "grpc.health.v1.Health"}
    for service, module in ((INFERENCE, inference_pb2), (CONTROL, control_pb2)):
        expected = module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods
        assert client.methods(service) == [method.name for method in expected]


def test_generate_with_every_parameter(client, serving):
    answer = client.call(
        INFERENCE,
        "Generate",
        request_id="mine",
        model="tiny",
        text="the cat",
        sampling={
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "seed": "9",
            "max_tokens": 4,
            "stop": ["\n\n\n"],
            "stop_token_ids": [301],
            "ignore_eos": True,
            "min_tokens": 2,
            "frequency_penalty": 0.25,
            "presence_penalty": -0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"7": -3.5, "8": 2},
            "allowed_token_ids": [1, 2, 3],
            "bad_words": ["dog"],
            "include_stop_string": True,
            "skip_special_tokens": False,
        },
        priority=-3,
        data_parallel_rank=1,
        logprobs=2,
        prompt_logprobs=0,
        return_routed_experts=True,
        cache_salt="a",
        n=1,
    )
    prompt_ids = serving.tokenizer.encode("the cat").ids
    assert answer["token_ids"] == completion(prompt_ids, 9, VOCAB_SIZE, 4)
    (add,) = [m for m in serving.leaders[1].of_type("add") if m["request_id"] == "mine"]
    assert (add["priority"], add["cache_salt"], add["routed_experts"]) == (-3, "a", True)
    sampling = add["sampling"]
    assert sampling.pop("bad_words") == [
        serving.tokenizer.encode(word).ids for word in ("dog", " dog")
    ]
    assert sorted(sampling.pop("logit_bias")) == [[7, -3.5], [8, 2.0]]
    assert sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 9,
        "max_tokens": 4,
        "stop": ["\n\n\n"],
        "stop_token_ids": [301],
        "ignore_eos": True,
        "min_tokens": 2,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "allowed_token_ids": [1, 2, 3],
        "logprobs": 2,
        "prompt_logprobs": 0,
        "include_stop_string": True,
        "skip_special_tokens": False,
    }
    assert len(answer["logprobs"]) == 4
    assert len(answer["prompt_logprobs"]) == len(prompt_ids) - 1
    routed = b"".join(base64.b64decode(one["ids"]) for one in answer["routed_experts"])
    assert len(routed) == 2 * NUM_LAYERS * NUM_CHOSEN * (len(prompt_ids) + 3)


@pytest.mark.parametrize(
    ("sent", "kind", "text"),
    [
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"choices": {"texts": ["yes", "no"]}}, "choices", '["yes", "no"]'),
    ],
)
def test_constraints_reach_the_engine(client, serving, sent, kind, text):
    client.call(
        INFERENCE,
        "Generate",
        token_ids={"ids": PROMPT},
        request_id=kind,
        sampling={"max_tokens": 1, "constraint": sent},
        data_parallel_rank=0,
    )
    (add,) = [m for m in serving.leaders[0].of_type("add") if m["request_id"] == kind]
    assert add["sampling"]["constraint"] == {"kind": kind, "text": text}


def test_generate_stream(client):
    chunks = client.call(
        INFERENCE,
        "GenerateStream",
        token_ids={"ids": PROMPT},
        sampling={"seed": "3", "max_tokens": 9},
    )
    token_ids = [token_id for chunk in chunks for token_id in chunk.get("token_ids", ())]
    assert token_ids == completion(PROMPT, 3, VOCAB_SIZE, 9)
    assert chunks[-1]["finish"] == {"reason": "LENGTH"}
    assert chunks[-1]["usage"]["completion_tokens"] == 9


def test_messages(client, serving):
    messages = {
        "messages": [{"role": "user", "content": "the cat?"}],
        "preset": "short",
    }
    answer = client.call(
        INFERENCE,
        "Generate",
        messages=messages,
        sampling={"max_tokens": 2, "temperature": 0.75},
        request_id="chat",
        data_parallel_rank=0,
    )
    text = answer["prompt"]["text"]
    assert text == "Be brief.\n\nUser: the cat?\n\nAssistant:"
    (add,) = [m for m in serving.leaders[0].of_type("add") if m["request_id"] == "chat"]
    assert add["token_ids"] == serving.tokenizer.encode(text, add_special_tokens=False).ids
    # The request's own value counts, and the preset's where it has none.
    assert (add["sampling"]["temperature"], add["sampling"]["top_p"]) == (0.75, 0.95)
    tokenized = client.call(INFERENCE, "Tokenize", messages=messages)
    assert tokenized["token_ids"] == add["token_ids"]


def test_tokenize(client, serving):
    answer = client.call(INFERENCE, "Tokenize", text="the cat", add_special_tokens=False)
    assert answer["token_ids"] == serving.tokenizer.encode("the cat").ids


def test_facts(client):
    info = client.call(CONTROL, "GetServerInfo")
    assert info["ready"]
    assert {"math-tutor", "short"} <= set(info["presets"])
    assert client.call(CONTROL, "GetModelInfo")["vocab_size"] == VOCAB_SIZE
    assert client.call("grpc.health.v1.Health", "Check", service=INFERENCE) == {"status": "SERVING"}


def test_loads(client, serving):
    for leader in serving.leaders:
        leader.wait_for("add", 0)
    loads = client.call(CONTROL, "GetLoads")["replicas"]
    assert [load.get("replica", 0) for load in loads] == [0, 1]
    assert all(load["kv_blocks_total"] == 100 for load in loads)


def test_flush_cache(client, serving):
    assert client.call(CONTROL, "FlushCache") == {"num_replicas": 2}
    for leader in serving.leaders:
        assert leader.wait_for("flush_cache") == [{"type": "flush_cache"}]


def test_abort(client):
    assert client.call(CONTROL, "Abort", request_id="nobody") == {}


@pytest.mark.parametrize(
    "method",
    ["GetExpertPlacement", "GetBalance", "Rebalance", "DumpExpertStats", "TraceSteps"],
)
def test_without_ranks_nothing_is_told_of_them(client, method):
    with pytest.raises(grpc.RpcError, match="no ranks") as caught:
        client.call(CONTROL, method)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_drain():
    with serve() as serving, ReflectionClient(serving.address) as client:
        assert client.call(CONTROL, "Drain", timeout_s=1) == {}
        with pytest.raises(grpc.RpcError, match="draining"):
            client.call(INFERENCE, "Generate", text="the cat")
