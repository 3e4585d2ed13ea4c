"""A real browser without a window, driven over the DevTools protocol."""

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 60


class Page:
    """One page; `errors` are what its scripts threw and its console complained of."""

    def __init__(self, socket):
        self.errors = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers = {}
        self._reader = asyncio.create_task(self._read())

    async def call(self, method, **parameters):
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)

    async def open(self, url):
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def js(self, expression):
        """The value of an expression, awaited if it is a promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression, timeout_s=30):
        """Its first value that is true; fails when there is none in time."""
        deadline = time.monotonic() + timeout_s
        while not (value := await self.js(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; errors: {self.errors}"
            await asyncio.sleep(0.1)
        return value

    async def _read(self):
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if not answer.done():
                    if "error" in said:
                        answer.set_exception(RuntimeError(said["error"]))
                    else:
                        answer.set_result(said["result"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.errors.append(said["params"]["exceptionDetails"])
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.errors.append(said["params"]["entry"]["text"])


@asynccontextmanager
async def browser_page(profile, width=1280, height=900):
    """A page of a browser that ends with the block. `profile`: an empty directory."""
    process = subprocess.Popen(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
            "--remote-debugging-port=0", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as session:
            port = await _port_of(Path(profile) / "DevToolsActivePort")
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [found for found in await answer.json() if found["type"] == "page"]
            url = pages[0]["webSocketDebuggerUrl"]
            async with session.ws_connect(url, max_msg_size=1 << 28) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


async def _port_of(file):
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(OSError, ValueError):
            return int(file.read_text().split("\n", 1)[0])
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.05)
