"""Ray's handles between simulated processes: `handle.method.remote(...)`, awaited or iterated.

A call on a process that is being restarted raises ActorUnavailableError, on one that is gone for
good ActorDiedError, as Ray does; one over a cut link waits until it is whole again.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from tests.sim.clockwork import PROCESS, Killed, Process, VirtualLoop
from tests.sim.network import Network

CALL_S = 0.001
LOST_S = 0.05
"""Until a caller hears of a lost actor."""
POLL_S = 0.02
UNREACHABLE_S = 20.0
"""Ray gives a call over a link that stays cut up."""


class SimActor:
    """A handle. `body` is the object behind it while its process lives."""

    def __init__(self, network: Network, name: str, *, is_served: bool = False) -> None:
        self._network = network
        self.sim_is_served = is_served  # behind Serve's router, which waits for a replica
        self.sim_was_up = False
        self.sim_name = name
        self.sim_process: Process | None = None
        self.sim_body: Any = None
        self.sim_is_final = False
        self.sim_calls: list[SimResponse] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return SimMethod(self, name)

    def options(self, **_: Any) -> SimActor:
        return self

    def sim_lost(self) -> None:
        """The process has died: whoever waits for it is told."""
        for call in list(self.sim_calls):
            call.lose(self.sim_error())

    def sim_error(self) -> Exception:
        if self.sim_is_final:
            return ActorDiedError()
        return ActorUnavailableError(f"{self.sim_name} is being restarted", b"0" * 16)


class SimMethod:
    """`handle.method`."""

    def __init__(self, actor: SimActor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *args: Any, **kwargs: Any) -> SimResponse:
        return SimResponse(self._actor, self._name, args, kwargs)


class SimResponse:
    """One call on an actor: a task in its process, its events on the way back."""

    def __init__(
        self, actor: SimActor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._actor = actor
        self._loop: VirtualLoop = actor._network.loop
        self._caller = PROCESS.get()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._is_over = False
        self._task: asyncio.Task[Any] | None = None
        self._last_s = 0.0
        self._coming: deque[Callable[[], None]] = deque()  # in order
        self.is_stream = False
        actor.sim_calls.append(self)
        self._later(self._begin, name, args, kwargs)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            kind, value = await self._events.get()
            if kind == "item":
                yield value
            elif kind == "error":
                raise value
            else:
                return

    def cancel(self) -> None:
        if not self._is_over:
            self._later(self._cancel_task)

    def lose(self, error: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._loop.call_later(LOST_S, self._events.put_nowait, ("error", error))
            if self in self._actor.sim_calls:
                self._actor.sim_calls.remove(self)

    async def _result(self) -> Any:
        kind, value = await self._events.get()
        if kind == "error":
            raise value
        return value

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._is_over = True

    def _later(self, act: Callable[..., None], *args: Any) -> None:
        """In order, a call's time from now, once the link is open."""
        at_s = max(self._loop.time() + CALL_S, self._last_s)
        self._last_s = at_s
        give_up_s = at_s + UNREACHABLE_S
        self._coming.append(partial(act, *args))

        def come() -> None:
            process = self._actor.sim_process
            here = self._caller.host if self._caller else None
            if process is None or here is None or self._actor._network.is_open(here, process.host):
                self._coming.popleft()()
            elif self._loop.time() < give_up_s:
                self._loop.call_later(0.2, come)
            else:
                self.lose(ActorUnavailableError(f"{self._actor.sim_name}: no link", b"0" * 16))

        self._loop.call_at(at_s, come)

    def _begin(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        process, body = self._actor.sim_process, self._actor.sim_body
        if self._is_over:
            return
        waits = self._actor.sim_is_served or not self._actor.sim_was_up
        if body is None and waits and not self._actor.sim_is_final:
            self._loop.call_later(POLL_S, self._begin, name, args, kwargs)
            return
        if process is None or process.is_dead or body is None:
            self.lose(self._actor.sim_error())
            return
        method = getattr(body, name)
        self._task = self._loop.spawn(process, self._run(process, method, args, kwargs), name)

    async def _run(
        self,
        process: Process,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        try:
            result = method(*args, **kwargs)
            if inspect.isasyncgen(result):
                try:
                    async for item in result:
                        self._send(process, "item", item)
                finally:
                    if not process.is_dead:
                        await result.aclose()
                self._send(process, "end", None)
            else:
                value = await result if isinstance(result, Awaitable) else result
                self._send(process, "value", value)
        except (asyncio.CancelledError, Killed):
            if not process.is_dead:
                self._is_over = True
        except Exception as error:  # noqa: BLE001 - raised again at the caller
            self._send(process, "error", RayTaskError(method.__name__, str(error), error))

    def _send(self, process: Process, kind: str, value: Any) -> None:
        if process.is_dead or self._is_over:
            return

        def arrive() -> None:
            if self._is_over:
                return
            self._events.put_nowait((kind, value))
            if kind != "item":
                self._is_over = True
                if self in self._actor.sim_calls:
                    self._actor.sim_calls.remove(self)

        self._later(arrive)
