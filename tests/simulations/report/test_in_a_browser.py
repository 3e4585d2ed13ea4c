"""The page in a real browser, from disk: fits the window, shows two pictures of a choice, logs no error.

Skipped where there is no Chromium.
"""

import json
import re
import shutil
import subprocess

import pytest

from tests.simulations.report.html_page import parsed

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium on the path")
SAY = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("load", () => { document.body.dataset.said = JSON.stringify({
  width: innerWidth, needed: document.documentElement.scrollWidth, errors,
  tall: [...document.querySelectorAll("figure:not([hidden]) svg")]
    .map((svg) => svg.getBoundingClientRect().height),
}); });
</script>"""


def opened(directory, tmp_path, width):
    """The page after its scripts ran, and what it says of itself."""
    text = (directory / "report.html").read_text(encoding="utf-8").replace("<head>", "<head>" + SAY)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-said="([^"]*)"', ran.stdout)
    assert found
    return parsed(ran.stdout), json.loads(found[1].replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_fits_its_window(directory, tmp_path, width):
    page, said = opened(directory, tmp_path, width)
    assert said["errors"] == []
    assert said["needed"] <= said["width"] <= width
    assert all(height > 80 for height in said["tall"])
    (choice,) = page.all("div", class_="choice")
    assert len(choice.all("select")) == 2
    shown = [f for f in choice.all("figure") if "hidden" not in f.attributes]
    assert [f.one("h3").words() for f in shown] == ["no balancing", "ours"]
