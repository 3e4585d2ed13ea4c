"""docs/api.md names everything that a client can send or call, and errors by their statuses."""

import re
from pathlib import Path

import pytest

from cluster.server.chat.presets import BUILT_IN
from cluster.server.http.errors import STATUS
from cluster.server.http.models import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from cluster.server.proto.expertmesh.v1 import control_pb2, inference_pb2

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
SHOWN = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", PROSE))))


@pytest.mark.parametrize("name", inference_pb2.DESCRIPTOR.message_types_by_name)
def test_fields_of_messages(name):
    if name not in ("Constraint", "Choices", "Choice"):  # shown as what they are part of
        fields = inference_pb2.DESCRIPTOR.message_types_by_name[name].fields_by_name
        assert set(fields) <= SHOWN


@pytest.mark.parametrize("proto", [inference_pb2, control_pb2])
def test_calls(proto):
    for service in proto.DESCRIPTOR.services_by_name.values():
        assert set(service.methods_by_name) <= SHOWN


@pytest.mark.parametrize("body", [CompletionBody, ChatCompletionBody, TokenizeBody, DetokenizeBody])
def test_fields_of_bodies(body):
    assert set(body.model_fields) <= SHOWN


def test_presets():
    for name in BUILT_IN:
        assert f"`{name}`" in PAGE


def test_statuses():
    for code, status in STATUS.items():
        if code.value not in ("OUT_OF_RANGE", "CANCELLED", "UNIMPLEMENTED"):  # never sent
            assert f"| {code} | {status} |" in PAGE
