from pathlib import Path

import pytest

from simulations.report.build import write_report
from tests.simulations.report.html_page import Element, parsed
from tests.simulations.report.results import all_results


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one result of each kind."""
    return write_report(all_results(), tmp_path_factory.mktemp("reports") / "report").parent


@pytest.fixture(scope="session")
def page(directory: Path) -> Element:
    return parsed(directory / "report.html")
