"""One request's events on their way from the engine's thread to the event loop.

Holds at most one piece and one end: pieces that the reader has not taken yet are joined, so a slow
reader costs its own answer's text and nothing else.
"""

from __future__ import annotations

import asyncio
import threading

from gpu_worker.messages import Event, Failed, Finished, Piece


class Channel:
    """Written by any thread, read by one task of the loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._text = ""
        self._degraded = False
        self._end: Finished | Failed | None = None

    def put(self, event: Event) -> None:
        """Add an event; nothing may follow an end. Never blocks."""
        with self._lock:
            assert self._end is None, f"{event} after the end {self._end}"
            if isinstance(event, Piece):
                self._text += event.text
                self._degraded = self._degraded or event.degraded
            else:
                self._end = event
        if not self._loop.is_closed():  # else nobody is left to read
            self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> Event:
        """The next event: all text that has come, then the end."""
        while True:
            await self._ready.wait()
            with self._lock:
                text, self._text = self._text, ""
                if text:
                    return Piece(text, self._degraded)
                if self._end is not None:
                    return self._end
                self._ready.clear()
