"""The four training domains of mosaic, each as a list of documents cut into train, valid and test.

Held-out text is cut out as contiguous regions (prose) or whole files (Python) or by the numbers of
the problem (arithmetic), before the tokenizer or anything else sees the text. Nothing of `valid`
or `test` is ever trained on; `valid` chooses settings, `test` is only reported.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from deploy.models.arithmetic import arithmetic_documents

DOMAINS = ("english", "chinese", "python", "arithmetic")
SPLITS = ("train", "valid", "test")
PROSE_PATTERNS = {"english": ("english*.txt", "shakespeare*.txt"), "chinese": ("chinese*.txt",)}

REGION_CHARS = {"english": 12_000, "chinese": 4_000}
ARITHMETIC_CHARS = {"train": 7_000_000, "valid": 60_000, "test": 120_000}
# Every 40 regions hold two for test and one for valid: 5 % and 2.5 % of the text.
PERIOD, TEST_TURNS, VALID_TURNS = 40, (9, 29), (19,)

# Tests, vendored or generated files, and tables of numbers: not source that reads as Python.
SKIPPED_PARTS = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "ensurepip",
    "site-packages", "__pycache__", "_pydecimal.py", "__phello__", "_sysconfigdata",
}  # fmt: skip
MAX_PYTHON_FILE_BYTES = 200_000


def build_corpus(corpus_dir: Path, seed: int) -> dict[str, dict[str, list[str]]]:
    """All documents by split and domain.

    Raises FileNotFoundError naming the pattern when `corpus_dir` lacks the prose of a domain.
    """
    corpus: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for domain in DOMAINS:
        if domain == "arithmetic":
            parts = {
                split: arithmetic_documents(split, ARITHMETIC_CHARS[split], seed)
                for split in SPLITS
            }
        elif domain == "python":
            parts = _split_python()
        else:
            parts = _split_prose(corpus_dir, domain)
        for split in SPLITS:
            corpus[split][domain] = parts[split]
    return corpus


def _split_prose(corpus_dir: Path, domain: str) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for pattern in PROSE_PATTERNS[domain]:
        paths = sorted(corpus_dir.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"no {domain} text: {corpus_dir} has no file {pattern}")
        for path in paths:
            text = _clean(path.read_text(encoding="utf-8"))
            run: list[str] = []  # neighbouring training regions join into one document
            for idx, region in enumerate(_regions(text, REGION_CHARS[domain])):
                split = _split_of_turn(idx % PERIOD)
                if split == "train":
                    run.append(region)
                    continue
                parts[split].append(region)
                if run:
                    parts["train"].append("".join(run))
                    run = []
            if run:
                parts["train"].append("".join(run))
    return parts


def _split_python() -> dict[str, list[str]]:
    """The standard library of the running interpreter, split by a hash of each file's path."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(_is_skipped(part) for part in relative.parts):
            continue
        if path.stat().st_size > MAX_PYTHON_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        split = _split_of_turn(int.from_bytes(digest[:4]) % PERIOD)
        if text.strip():
            parts[split].append(text.expandtabs(8).rstrip() + "\n")
    return parts


def _is_skipped(part: str) -> bool:
    return part in SKIPPED_PARTS or part.startswith(("test_", "_sysconfigdata", "config-"))


def _split_of_turn(turn: int) -> str:
    return "test" if turn in TEST_TURNS else "valid" if turn in VALID_TURNS else "train"


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\ufeff", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _regions(text: str, min_chars: int) -> Iterator[str]:
    """Cuts `text` at line ends into contiguous regions of at least `min_chars`."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + min_chars)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def write_documents(path: Path, documents: list[str]) -> None:
    """One JSON string a line, so that documents may hold any text."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def read_documents(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
