"""JSON schemas such as xgrammar keeps completely; what it would let a completion break is refused.

Found by trying: keywords that it passes over, those that it passes over beside others, and lengths of
strings, in which it allows control characters (rewritten as patterns). Annotations and unknown keywords
mean nothing to a validator either. `oneOf` is taken as `anyOf`, and an object has no properties but
those that the schema speaks of.
"""

import json
from collections.abc import Mapping
from typing import Any

_IGNORED = {
    *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
_OF_TYPE = {
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties"),
    },
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_TYPED = set().union(*_OF_TYPE.values())
_ALONE = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_EXCLUSIVE = [
    {"pattern", "format", "minLength"},
    {"pattern", "format", "maxLength"},
    {"properties", "patternProperties", "propertyNames"},
    {"patternProperties", "additionalProperties"},
    {"propertyNames", "additionalProperties"},
]
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties", "propertyNames"}
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "number": int | float,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def enforceable(text: str) -> str:
    """The same schema for xgrammar; ValueError with the place and the keyword that cannot be kept."""
    schema = json.loads(text)
    _prepare(schema, "#")
    return json.dumps(schema)


def _prepare(schema: Any, at: str) -> None:
    """Check a schema and those inside it, and rewrite them in place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _refusal(at, f"must be an object, got {schema!r:.60}")
    found = {key for key, value in schema.items() if key in _IGNORED and value is not False}
    if found:
        raise _refusal(at, f"{min(found)} cannot be enforced")
    alone, typed = _ALONE & schema.keys(), _TYPED & schema.keys()
    if len(alone) > 1 or (alone and typed):
        pair = sorted(alone | typed)[:2]
        raise _refusal(at, f"{pair[0]} cannot be enforced together with {pair[1]}")
    for exclusive in _EXCLUSIVE:
        if len(both := sorted(exclusive & schema.keys())) > 1:
            raise _refusal(at, f"{both[0]} cannot be enforced together with {both[1]}")
    _check_types(schema, typed, at)
    if typed & {"minLength", "maxLength"}:
        fewest, most = schema.pop("minLength", 0), schema.pop("maxLength", "")
        schema["pattern"] = f"^.{{{fewest},{most}}}$"
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            for name, inner in value.items():
                _prepare(inner, f"{at}/{key}/{name}")
        elif key in _LISTS and isinstance(value, list):
            for idx, inner in enumerate(value):
                _prepare(inner, f"{at}/{key}/{idx}")
        elif key in _SINGLE:
            _prepare(value, f"{at}/{key}")


def _check_types(schema: dict[str, Any], typed: set[str], at: str) -> None:
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    ref = schema.get("$ref", "#")
    if not isinstance(ref, str) or not ref.startswith("#"):
        raise _refusal(at, f"$ref must begin with #, got {ref!r:.60}")
    if len(schema.get("allOf", ())) > 1:
        raise _refusal(at, "allOf of more than one cannot be enforced")
    if not kinds and typed:
        implied = "object" if "properties" in typed else "array" if "items" in typed else None
        if implied is None or typed - _OF_TYPE[implied]:
            raise _refusal(at, f"{min(typed)} cannot be enforced without a type")
    if "multipleOf" in typed and not (
        kinds == ["integer"] and isinstance(schema["multipleOf"], int)
    ):
        raise _refusal(at, "multipleOf cannot be enforced but with integers")
    for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]:
        if kinds and not any(_is_of(value, kind) for kind in kinds):
            raise _refusal(at, f"{value!r:.60} is not of type {kinds}")


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, object))


def _refusal(at: str, what: str) -> ValueError:
    return ValueError(f"constraint.json_schema: at {at:.100} {what}")
