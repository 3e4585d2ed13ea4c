"""Constraints are found good or bad before an engine sees them, whatever they do to the compiler."""

import asyncio
import json
import re
from pathlib import Path

import psutil
import pytest

from cluster.engine.constraint import Constraint
from cluster.server.constraint_check import ConstraintCheck
from cluster.server.errors import Code, RequestError

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "mosaic"
V, EOS = 6144, 0


@pytest.fixture(scope="module")
def check():
    checked = ConstraintCheck(MODEL, V, [EOS])
    yield checked
    checked.close()


def outcome(check: ConstraintCheck, kind: str, text: str) -> str | None:
    """None, or why it is refused."""
    try:
        asyncio.run(check.check(Constraint(kind, text)))
    except RequestError as error:
        return f"{error.code} {error}"
    return None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type": "object", "properties": {"a": {"type": "string"}}}'),
        ("json_schema", "{}"),
        ("regex", "[a-z]+(-[0-9]{3})?"),
        ("grammar", 'root ::= "(" root? ")"'),
        ("choices", '["yes", "no"]'),
    ],
)
def test_good_ones_pass(check, kind, text):
    assert outcome(check, kind, text) is None


def nested(depth: int) -> str:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return json.dumps(schema)


DOUBLING = "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(", "not valid: .*not closed"),
        ("grammar", "root ::=", "not valid"),
        ("json_schema", '{"$ref": "#"}', "can be met by no completion"),
        ("json_schema", '{"not": {}}', "not cannot be enforced"),
        ("regex", "(((a{1,1000}){1,1000}){1,1000}){1,1000}", "too long|too large|takes longer"),
        ("grammar", f'root ::= r0\n{DOUBLING}\nr40 ::= "" | "a"', "too long|takes longer"),
        ("grammar", 'root ::= x x x x x x\nx ::= "" | "a" x | x "a" | x x', "too long|longer"),
    ],
)
def test_bad_and_hostile_ones_are_refused_and_the_next_is_answered(check, kind, text, message):
    refused = outcome(check, kind, text)
    assert refused is not None
    assert refused.startswith(Code.INVALID_ARGUMENT)
    assert re.search(message, refused), refused
    assert outcome(check, "regex", "a+") is None


def test_the_deepest_that_may_be_sent_does_no_harm(check):
    assert outcome(check, "json_schema", nested(30)) is None
    assert outcome(check, "regex", "(" * 64 + "a" + ")" * 64) is None
    long = "|".join("ab" * 20 for _ in range(1500))
    assert outcome(check, "regex", long) is None


def test_a_process_that_ends_is_started_again(check):
    assert outcome(check, "regex", "first") is None
    for child in psutil.Process().children():
        if any("constraint_worker" in argument for argument in child.cmdline()):
            child.kill()
    assert "too large or too deep" in outcome(check, "regex", "second")
    assert outcome(check, "regex", "third") is None


def test_what_was_tried_is_not_tried_again(check):
    assert outcome(check, "regex", "once") is None
    refused = outcome(check, "regex", "(once")
    check.close()
    assert outcome(check, "regex", "once") is None
    assert outcome(check, "regex", "(once") == refused
    assert check._process.ended


def test_models_without_a_tokenizer_have_no_constraints(tmp_path):
    for directory, eos in ((tmp_path, [EOS]), (MODEL, [])):
        with pytest.raises(RequestError, match="a constraint needs") as caught:
            asyncio.run(ConstraintCheck(directory, V, eos).check(Constraint("regex", "a")))
        assert caught.value.code is Code.FAILED_PRECONDITION
