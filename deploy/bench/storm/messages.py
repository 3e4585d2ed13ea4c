"""Requests as an adversary, or a broken program, would make them: right in most parts, wrong in some."""

import math
import random
from typing import Any

from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb

_NUMBERS = (0.0, 1.0, -1.0, 0.5, 1e-9, 1e9, 1e308, -1e308, math.inf, -math.inf, math.nan)
_COUNTS = (0, 1, 2, 5, -1, 64, 1000, 2**31 - 1, -(2**31))
_IDS = (0, 1, 2, 7, 500, 8191, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
_TEXTS = (
    "",
    "a",
    "Once upon a time",
    "\x00",
    "�",
    "é" * 50,
    " " * 3000,
    "{{ 7 * 7 }}",
    "\n\nUser:",
)
_GUIDED = ("", "{", "[a-z]+", "(a|b", '{"type": "object"}', '{"$ref": "#"}', 'root ::= "x"')


def valid_request(chance: random.Random, vocab_size: int) -> pb.GenerateRequest:
    """Token ids or text, of a length and with a limit that a small model serves in some steps."""
    sampling = pb.SamplingParams(max_tokens=chance.randint(1, 48))
    if chance.random() < 0.5:
        sampling.temperature = 0.0
    request = pb.GenerateRequest(sampling=sampling)
    if chance.random() < 0.5:
        ids = [chance.randrange(vocab_size) for _ in range(chance.randint(1, 40))]
        request.token_ids.ids.extend(ids)
    else:
        request.text = "It was a bright cold morning, and " * chance.randint(1, 4)
    if chance.random() < 0.1:
        request.n = chance.randint(1, 3)
    if chance.random() < 0.1:
        request.logprobs = chance.randint(0, 5)
    return request


def malformed_request(chance: random.Random, vocab_size: int) -> pb.GenerateRequest:
    """A valid one with some fields set to extreme values; it may happen to remain valid."""
    request = valid_request(chance, vocab_size)
    for spoil in chance.choices(_SPOILERS, k=chance.randint(1, 3)):
        spoil(request, chance)
    return request


def garbage(chance: random.Random, vocab_size: int) -> bytes:
    """The bytes of a request, cut, extended or changed; or just bytes."""
    data = bytearray(malformed_request(chance, vocab_size).SerializeToString())
    match chance.randrange(4):
        case 0:
            return chance.randbytes(chance.randint(0, 300))
        case 1:
            return bytes(data[: chance.randrange(len(data) + 1)])
        case 2:
            return bytes(data) + chance.randbytes(chance.randint(1, 50))
        case _:
            for _ in range(chance.randint(1, 8)):
                if data:
                    data[chance.randrange(len(data))] = chance.randrange(256)
            return bytes(data)


def _number(request: pb.GenerateRequest, chance: random.Random) -> None:
    names = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty",
             "repetition_penalty")  # fmt: skip
    setattr(request.sampling, chance.choice(names), chance.choice(_NUMBERS))


def _count(request: pb.GenerateRequest, chance: random.Random) -> None:
    setattr(
        request.sampling,
        chance.choice(("top_k", "max_tokens", "min_tokens")),
        chance.choice(_COUNTS),
    )


def _ids(request: pb.GenerateRequest, chance: random.Random) -> None:
    ids = [chance.choice(_IDS) for _ in range(chance.choice((0, 1, 3, 200)))]
    match chance.randrange(3):
        case 0:
            request.sampling.stop_token_ids.extend(ids)
        case 1:
            request.sampling.allowed_token_ids.extend(ids)
        case _:
            for token_id in ids:
                request.sampling.logit_bias[token_id] = chance.choice(_NUMBERS)


def _prompt(request: pb.GenerateRequest, chance: random.Random) -> None:
    match chance.randrange(4):
        case 0:
            request.ClearField("prompt")
        case 1:
            request.text = chance.choice(_TEXTS)
        case 2:
            count = chance.choice((0, 1, 50, 20_000))
            request.token_ids.CopyFrom(pb.TokenIds(ids=[chance.choice(_IDS)] * count))
        case _:
            roles = ("user", "system", "assistant", "", "root", "\x00")
            request.messages.CopyFrom(
                pb.ChatMessages(
                    messages=[
                        pb.ChatMessage(role=chance.choice(roles), content=chance.choice(_TEXTS))
                        for _ in range(chance.choice((0, 1, 3)))
                    ],
                    preset=chance.choice((None, None, "math-tutor", "no such task")),
                )
            )


def _texts(request: pb.GenerateRequest, chance: random.Random) -> None:
    texts = [chance.choice(_TEXTS) for _ in range(chance.choice((1, 2, 300)))]
    chance.choice((request.sampling.stop, request.sampling.bad_words)).extend(texts)


def _extent(request: pb.GenerateRequest, chance: random.Random) -> None:
    name = chance.choice(("n", "logprobs", "prompt_logprobs", "data_parallel_rank", "priority"))
    limit = 2**31 - 1 if name == "priority" else 2**32 - 1
    setattr(request, name, min(limit, chance.choice((0, 1, 2, 17, 10**6, 2**32 - 1))))


def _names(request: pb.GenerateRequest, chance: random.Random) -> None:
    name = chance.choice(("model", "request_id", "cache_salt"))
    setattr(request, name, chance.choice((*_TEXTS, "same", "x" * 10_000)))


def _constraint(request: pb.GenerateRequest, chance: random.Random) -> None:
    kind = chance.choice(("json_schema", "regex", "grammar", "choices"))
    if kind == "choices":
        texts = [chance.choice(_TEXTS) for _ in range(chance.choice((0, 1, 3)))]
        request.sampling.constraint.choices.CopyFrom(pb.Choices(texts=texts))
    else:
        setattr(request.sampling.constraint, kind, chance.choice(_GUIDED))


_SPOILERS: tuple[Any, ...] = (
    _number, _count, _ids, _prompt, _texts, _extent, _names, _constraint
)  # fmt: skip
