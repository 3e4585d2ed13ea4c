"""What a completion has to look like, as the request says it; checked as far as that is cheap.

Whether a grammar compiles is found out in `guided.py`. Free of torch: the front end imports it too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

from cluster.engine import checks

ConstraintKind = Literal["json_schema", "regex", "grammar", "choices"]
MAX_CONSTRAINT_CHARS: Final = 65_536
MAX_CHOICES: Final = 1024
MAX_NESTING: Final = 64
"""Of brackets in JSON schemas, regular expressions and grammars."""


@dataclass(frozen=True)
class Constraint:
    """Raises ValueError when `text` is too long, too deep or not the JSON that `kind` asks for."""

    kind: ConstraintKind
    text: str
    """json_schema: JSON; "{}" is any JSON. choices: a JSON list of texts. grammar: EBNF (GBNF)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            known = ", ".join(get_args(ConstraintKind))
            raise ValueError(f"constraint.kind must be one of {known}, got {self.kind!r:.100}")
        checks.text(f"constraint.{self.kind}", self.text, MAX_CONSTRAINT_CHARS)
        # As it could be, not as it is: brackets in texts count too.
        if (depth := _nesting(self.text)) > MAX_NESTING and self.kind != "choices":
            raise ValueError(
                f"constraint.{self.kind} must be nested at most {MAX_NESTING} deep, got {depth}"
            )
        if self.kind == "json_schema" and not isinstance(self._json(), dict | bool):
            raise ValueError(f"constraint.json_schema must be an object, got {self.text!r:.100}")
        if self.kind == "choices":
            self.choices()

    def choices(self) -> tuple[str, ...]:
        """The texts of a constraint of choices; ValueError when they are none."""
        texts = checks.items("constraint.choices", self._json(), MAX_CHOICES)
        if not texts:
            raise ValueError("constraint.choices must have a text at least, got none")
        for idx, text in enumerate(texts):
            checks.text(f"constraint.choices[{idx}]", text, MAX_CONSTRAINT_CHARS)
        return texts

    @classmethod
    def of(cls, value: Any) -> Self:
        """From a Constraint or from what `asdict` makes of one."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or set(value) != {"kind", "text"}:
            raise ValueError(f"constraint must be a map of kind and text, got {value!r:.100}")
        return cls(value["kind"], value["text"])

    def _json(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"constraint.{self.kind} must be JSON: {error}, got {self.text!r:.100}"
            ) from None


def _nesting(text: str) -> int:
    """Most brackets of any kind that are open at once."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest
