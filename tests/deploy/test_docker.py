"""The Dockerfiles without Docker: what they copy is there and enough, what they call exists.

The wheel is built as the images build it, from exactly what they copy.
"""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.settings import DEPLOY
from tests.deploy.processes import EXPERTMESH, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILES = [DEPLOY / "docker" / name for name in ("Dockerfile", "Dockerfile.gpu")]
Instruction = tuple[str, str]


def instructions(file: Path) -> Iterator[Instruction]:
    """(name, arguments) of each, with continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            yield name, arguments.strip()


@pytest.fixture(params=DOCKERFILES, ids=lambda file: file.name)
def dockerfile(request: pytest.FixtureRequest) -> list[Instruction]:
    return list(instructions(request.param))


def arguments_of(dockerfile: list[Instruction], name: str) -> list[str]:
    return [arguments for found, arguments in dockerfile if found == name]


def copied_from_context(dockerfile: list[Instruction]) -> list[str]:
    copies = [shlex.split(line) for line in arguments_of(dockerfile, "COPY")]
    return [source for words in copies if "--from" not in words[0] for source in words[:-1]]


def test_only_known_instructions(dockerfile: list[Instruction]) -> None:
    known = [
        "FROM",
        "ARG",
        "WORKDIR",
        "COPY",
        "RUN",
        "USER",
        "ENV",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "CMD",
    ]
    assert {name for name, _ in dockerfile} <= set(known)


def test_what_is_copied_is_there_and_let_through(dockerfile: list[Instruction]) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = copied_from_context(dockerfile)
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in let_through
    assert let_through == set(sources)  # nothing else is sent to the builder


def test_installed_are_our_versions_and_extras(dockerfile: list[Instruction]) -> None:
    (install,) = [run for run in arguments_of(dockerfile, "RUN") if "pip install" in run]
    assert "-c constraints.txt" in install
    extras = re.search(r"\.\[([\w,]+)\]", install)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_python_is_one_that_we_support_and_images_are_pinned(dockerfile: list[Instruction]) -> None:
    images = [line.split()[0] for line in arguments_of(dockerfile, "FROM")]
    versions = {re.fullmatch(r"python:(3\.\d+)-slim-\w+", image)[1] for image in images}
    assert versions == {PROJECT["project"]["requires-python"].removeprefix(">=")}


def test_it_does_not_run_as_root(dockerfile: list[Instruction]) -> None:
    assert arguments_of(dockerfile, "USER") == ["1000:1000"]
    names = [name for name, _ in dockerfile]
    assert "RUN" not in names[names.index("USER") :]


def test_commands_exist(dockerfile: list[Instruction]) -> None:
    (check,) = arguments_of(dockerfile, "HEALTHCHECK")
    (start,) = arguments_of(dockerfile, "CMD")
    for line in (check, start):
        words = re.findall(r'"([^"]+)"', line)
        assert words[0] == "expertmesh"
        command = [EXPERTMESH, words[1], "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_wheel_of_what_is_copied_is_complete(tmp_path: Path) -> None:
    """Every package and data file of the checkout is in it: configurations, model, page, protos."""
    source = tmp_path / "src"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in copied_from_context(list(instructions(DOCKERFILES[0]))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build],
        cwd=source, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(expected_in_wheel() - inside) == []


def expected_in_wheel() -> set[str]:
    """What git tracks of our packages, but for tests and what only development needs."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a checkout: there is nothing to compare with")
    roots = ("cluster/", "comms/", "deploy/", "experts/", "router/", "simulations/")
    aside = ("*.md", "cluster/server/proto/generate.py")
    return {
        name
        for name in listed.stdout.split()
        if name.startswith(roots)
        and (ROOT / name).exists()
        and not any(fnmatch.fnmatch(name, pattern) for pattern in aside)
    }
