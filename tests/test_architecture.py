"""Rules of the house that a type checker cannot see: who may touch torch.distributed, ray, grpc and pickle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "comms", "deploy", "experts", "router", "simulations")


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in files if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def offenders(module: str, allowed: tuple[str, ...]) -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for path in source_files()
        if not str(path.relative_to(ROOT)).startswith(allowed)
        and any(name == module or name.startswith(f"{module}.") for name in imported_modules(path))
    ]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("torch.distributed", ("comms/",)),
        ("ray", ("cluster/", "deploy/")),
        ("grpc", ("cluster/", "deploy/")),
        # Pipes between a parent and the ranks it forked on this host: nothing comes from outside.
        ("pickle", ("comms/launch.py", "comms/rank_process.py")),
        (
            "transformers",
            ("deploy/verify.py", "deploy/bench/transformers_", "deploy/models/"),
        ),
    ],
)
def test_module_stays_where_it_belongs(module: str, allowed: tuple[str, ...]) -> None:
    assert offenders(module, allowed) == []


def test_the_rule_can_fail() -> None:
    """`comms` does use torch.distributed, so forbidding it there must name its files."""
    assert any(name.startswith("comms/") for name in offenders("torch.distributed", ("none",)))


def test_no_unsafe_deserialisation() -> None:
    """torch.load only where it says, in the call, that it reads tensors and plain containers."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only=True" not in map(ast.unparse, node.keywords)
    ]
    assert calls == []
