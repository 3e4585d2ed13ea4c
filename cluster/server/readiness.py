"""Whether requests are welcome, as a value that many can wait on."""

import asyncio


class Readiness:
    """A boolean with change notification, for one event loop."""

    def __init__(self) -> None:
        self._ready = False
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        return self._ready

    def set(self, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def change(self) -> None:
        """Return after the next change; the caller looks at `ready` again."""
        await self._changed.wait()
