"""A report: one HTML page that needs nothing else, and PNG, CSV and JSON beside it.

Importing this costs nothing; matplotlib is loaded when a report is written.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simulations.report.errors import ReportError

PAGE = "report.html"
LIST_OF_FILES = "files.txt"


def check_report(directory: Path) -> None:
    """Before the work: raise ReportError where no report could be written to `directory`."""
    if find_spec("matplotlib") is None:
        raise ReportError("reports need matplotlib: pip install 'expertmesh[report]'")
    existing = next(
        parent for parent in (directory, *directory.absolute().parents) if parent.exists()
    )
    if not existing.is_dir():
        raise ReportError(f"{existing}: is not a directory: choose another for the report")


def write_report(results: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Write the report of these results into `directory`; returns the path of its page.

    The same results give the same bytes. Everything is made beside the directory first, so that a
    report that fails leaves what was there; files of an earlier report that this one lacks are
    removed, others stay. Raises ReportError for results or directories that cannot be used.
    """
    check_report(directory)
    files = _files(results)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=directory.absolute().parent, prefix=".report-"
        ) as unfinished:
            for name, content in files.items():
                (Path(unfinished) / name).write_bytes(content)
            _put(Path(unfinished), directory)
    except OSError as error:
        raise ReportError(f"{directory}: {error.strerror or error}") from None
    return directory / PAGE


def _files(results: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Every file of the report by its name."""
    from simulations.report.page import chapters_of, page_of
    from simulations.report.reading import plain, read_result

    if not results:
        raise ReportError("a report needs at least one result")
    raw = plain(results)
    chapters = chapters_of([read_result(result) for result in raw])
    files = {f"{p.name}.png": p.png for chapter in chapters for p in chapter.pictures()}
    for chapter in chapters:
        for data in chapter.data_files():
            files[f"{data.name}.csv"] = data.csv().encode("utf-8", "replace")
    files["results.json"] = (json.dumps(raw, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    files[PAGE] = page_of(chapters).encode("utf-8", "replace")
    files[LIST_OF_FILES] = "".join(f"{name}\n" for name in sorted([*files, LIST_OF_FILES])).encode()
    return files


def _put(finished: Path, directory: Path) -> None:
    """Move everything to its place: at once where there is nothing yet, else file by file."""
    if not directory.exists():
        shutil.copymode(directory.absolute().parent, finished)
        finished.rename(directory)
        finished.mkdir()  # which is about to be cleaned up
        return
    names = (finished / LIST_OF_FILES).read_text().split()
    earlier = directory / LIST_OF_FILES
    stale = set(earlier.read_text().split()) - set(names) if earlier.is_file() else set()
    for name in sorted(names, key=lambda name: name == PAGE):  # the page last: it shows the others
        (finished / name).replace(directory / name)
    for name in stale:
        if Path(name).name == name and (directory / name).is_file():
            (directory / name).unlink()
