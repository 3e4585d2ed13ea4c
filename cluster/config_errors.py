"""What is wrong with a configuration, in one line for each option: its name, its value, what is allowed."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cluster.config_section import Section, section_of


def unknown_keys(section: type[Section], tree: Mapping[str, Any]) -> list[str]:
    """A line for each key that is no option, with the one that was meant."""
    return [_describe_unknown(section, key) for key in _unknown(section, tree)]


def describe(section: type[Section], error: Any) -> str:
    """One line for one of pydantic's errors: field, value, reason, allowed values."""
    path = [str(part) for part in error["loc"]]
    for name in path:
        inner = section_of(section, name)
        if inner is None:
            break
        section = inner
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{'.'.join(path)}: this option is required"
    if error["type"] == "value_error":
        return f"{'.'.join(path)}: {reason}" if path else str(reason)
    field = next((section.model_fields[p] for p in path if p in section.model_fields), None)
    name = ".".join(p for p in path if p.isidentifier() and p not in ("int", "float", "str"))
    if error["type"] == "literal_error":
        return f"{name} = {error['input']!r:.100}: allowed are {error['ctx']['expected']}"
    allowed = f" (allowed: {allowed_values(field)})" if field else ""
    return f"{name} = {error['input']!r:.100}: {reason}{allowed}"


def allowed_values(field: FieldInfo) -> str:
    """The values that a field takes, in words: `'a' or 'b'`, `int, >= 1, <= 8, or null`."""
    options: list[str] = []
    annotation: Any = field.annotation
    bounds = list(field.metadata)
    if get_origin(annotation) is dict:
        return "a map"
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type):
            options.append("null" if kind is type(None) else kind.__name__)
        elif get_origin(kind) is Literal:
            options.extend(map(repr, get_args(kind)))
        elif hasattr(kind, "__metadata__"):
            options.append(get_args(kind)[0].__name__)
            bounds.extend(m for info in kind.__metadata__ for m in getattr(info, "metadata", ()))
        else:
            options.append(repr(kind))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
    limits = [f"{s} {getattr(b, n)}" for b in bounds for n, s in signs.items() if hasattr(b, n)]
    return ", ".join([" or ".join(options), *limits])


def _unknown(section: type[Section], tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        inner = section_of(section, name)
        if name not in section.model_fields:
            yield prefix + name
        elif inner and isinstance(value, Mapping):
            yield from _unknown(inner, value, f"{prefix}{name}.")


def _known(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        inner = section_of(section, name)
        if inner:
            yield from _known(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _describe_unknown(section: type[Section], key: str) -> str:
    """Prefer an option of the same last name (`max_num_seqs`), then the nearest spelling."""
    known = [*section.model_fields, *_known(section)]
    leaf = key.rpartition(".")[2]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    near_leaf = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], 1, 0.75)
    nearest = (
        same_leaf
        or difflib.get_close_matches(key, known, 1, 0.75)
        or [k for k in known if near_leaf and k.rpartition(".")[2] == near_leaf[0]]
        or difflib.get_close_matches(key, known, 1, 0.0)
    )
    return f"unknown key {key!r}: did you mean {nearest[0]!r}?"
