"""From YAML and dotted overrides (`scheduler.max_num_seqs=8`) to a section that has been checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from cluster.config_errors import describe, unknown_keys
from cluster.config_section import ConfigError, Section, section_of

AnySection = TypeVar("AnySection", bound=Section)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a file; raises ConfigError naming the file."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of options, found {values!r:.100}")
    return values


def read_section(
    section: type[AnySection], values: Mapping[Any, Any], overrides: Sequence[str]
) -> AnySection:
    """Apply the overrides to nested values and check them; raises ConfigError."""
    tree = _copy_tree(section, values)
    for override in overrides:
        _apply_override(tree, override)
    if unknown := unknown_keys(section, tree):
        raise ConfigError("\n".join(unknown))
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(section, e) for e in error.errors())) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for idx, key in enumerate(keys):
            if key in keys[:idx]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _copy_tree(section: type[Section], values: Mapping[Any, Any]) -> dict[str, Any]:
    """A section left empty in YAML (`parallel:`) reads as None and means its defaults."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        if value is None and section_of(section, str(key)):
            continue
        tree[str(key)] = _copy_tree(section, value) if isinstance(value, Mapping) else value
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(
            f"override {override!r} is not of the form key=value or section.key=value"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
    tree[path[-1]] = value
