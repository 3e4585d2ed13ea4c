"""The live page of a real cluster in a real browser: it moves, it fits, and it shows what is so.

Skipped where there is no Chromium.
"""

import asyncio
import re
import urllib.request

import pytest

from cluster.server.client import AsyncClient
from tests.browser import CHROMIUM, browser_page

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the path")

TEXT = "document.getElementById('{}').textContent"
ROWS = "document.querySelectorAll('#{} td:first-child').length"
# Colours of the heat map, counted where its cells are.
COLOURS = """(() => {
  const canvas = document.getElementById("heat");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) found.add(`${pixels.slice(i, i + 3)}`);
  return found.size;
})()"""


@pytest.fixture
def http(served):
    return served.wait_for(r"(https?://127\.0\.0\.1:\d+)", 1)[1]


async def _busy(endpoint, until):
    """Requests one after the other, four at once, until the page has seen them."""

    async def one(client, number):
        while not until.is_set():
            await client.generate(f"Once upon a time {number}", max_tokens=24, ignore_eos=True)

    async with AsyncClient(endpoint) as client:
        await asyncio.gather(*(one(client, number) for number in range(4)))


async def _watch(page):
    await page.until("document.getElementById('state').textContent === 'ready'")
    assert await page.js(TEXT.format("model")) == "mosaic"
    assert "2 x 2 ranks" in await page.js(TEXT.format("layout"))
    await page.until(f"{ROWS.format('requests')} === 4 && {ROWS.format('ranks')} === 4")
    await page.until("Number(document.querySelector('.tile .value').textContent) > 0")
    await page.until(f"{COLOURS} > 8")
    samples = await page.js("history.length")
    await page.until(f"history.length > {samples} + 1")
    await page.until("document.querySelector('#throughput path.one') !== null")
    assert await page.js("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1280, 480])
def test_it_shows_a_working_cluster(endpoint, http, tmp_path, width):
    async def look():
        seen = asyncio.Event()
        load = asyncio.create_task(_busy(endpoint, seen))
        async with browser_page(tmp_path / "profile", width=width) as page:
            try:
                await page.open(f"{http}/live")
                await _watch(page)
            finally:
                seen.set()
                await load
            assert page.errors == []

    asyncio.run(look())


def test_the_page_brings_nothing_from_elsewhere(http):
    with urllib.request.urlopen(f"{http}/live", timeout=10) as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == [
        "data:,", "/live/live.css", "/live/live.js", "/metrics",
    ]  # fmt: skip
