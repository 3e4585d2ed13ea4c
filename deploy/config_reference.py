"""Writes docs/configuration.md, the reference of all options, from the configuration's own classes.

`python -m deploy.config_reference` rewrites it, `--check` fails if it is out of date.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import PresetConfig, ServeConfig
from cluster.config_errors import allowed_values
from cluster.config_section import Section, section_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEAD = """# Configuration

Every option of a cluster. Written by `make docs` from `cluster/config.py`; change it there.

A configuration is a YAML file of these sections, and any option can be set after it, on the command line
or in the arguments of a job, by its dotted name:

```
expertmesh serve --config FILE scheduler.max_num_seqs=64 server.port=50051
expertmesh serve --config FILE --print-config        # every option with the value in force
```

A key that is not known is an error that names the nearest one; so is a value that is not allowed. `null` is
how YAML writes None. Names follow what vLLM's users know, sorted into sections.
"""


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([_HEAD, *_section(ServeConfig, "")])


def undescribed() -> list[str]:
    """Options that say nothing about themselves."""
    return [
        f"{section.__name__}.{name}"
        for section in _sections(ServeConfig)
        for name, field in section.model_fields.items()
        if not field.description and section_of(section, name) is None
    ]


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for name in section.model_fields:
        inner = section_of(section, name)
        if inner:
            yield from _sections(inner)
    if section is ServeConfig:
        yield PresetConfig  # the value of a map, so no section of its own


def _section(section: type[Section], path: str) -> Iterator[str]:
    """Heading, what the section is, its options as a table, then the sections inside it."""
    yield f"## {path or 'The model, and the cluster as a whole'}\n"
    yield _one_line(inspect.getdoc(section)) + "\n"
    yield "| option | default | allowed | meaning |\n| --- | --- | --- | --- |"
    for name, field in section.model_fields.items():
        if section_of(section, name) is None:
            default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
            cells = (f"`{name}`", default, allowed_values(field), _one_line(field.description))
            yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    yield ""
    for name in section.model_fields:
        inner = section_of(section, name)
        if inner:
            yield from _section(inner, f"{path}.{name}" if path else name)
    if path == "chat":
        yield from _section(PresetConfig, "chat.presets.NAME")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    if missing := undescribed():
        print(f"without a docstring: {', '.join(missing)}", file=sys.stderr)
        return 1
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print(f"out of date, run `make docs`: {PAGE.name}", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
