"""Virtual time: an event loop whose clock jumps, and threads of which exactly one runs at a time.

A simulated thread is a real one that is handed the turn and gives it back where it would block, so
that the order of everything follows from the virtual clock alone. Knows nothing of the cluster.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import torch

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""Whose code runs now."""
START_S = 1000.0
MAX_EVENTS = 2_000_000
TICK_S = 1e-6
"""The shortest wait: less would be lost in the clock's rounding, and time would stand still."""
HANDOVER_S = 120.0
"""Real seconds within which whoever has the turn gives it back: longer is a real blocking call."""


class Killed(BaseException):
    """Ends a thread whose process was killed; nothing of the product catches and keeps it."""


class Stuck(AssertionError):
    """Nothing can ever happen any more, or too much happens."""


class Process:
    """What dies as one: its threads and its tasks."""

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.is_dead = False
        self.threads: list[SimThread] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def __repr__(self) -> str:
        return self.name


class VirtualLoop(asyncio.BaseEventLoop):
    """An asyncio loop that never waits: when nobody can go on, the clock goes on to who is next."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self  # BaseEventLoop asks its selector to wait: that is where time passes
        self._now_s = START_S
        self._clock_resolution = 1e-9
        self.num_events = 0
        self.current: SimThread | None = None
        self.failures: list[BaseException] = []
        self.set_task_factory(_own_task)
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """The selector's wait, in virtual time."""
        self.num_events += 1
        if self.num_events > MAX_EVENTS:
            raise Stuck(f"{MAX_EVENTS} turns of the loop and no end at {self._now_s:.3f} s")
        if timeout is None:
            raise Stuck(f"nobody can ever go on, at {self._now_s - START_S:.3f} s")
        self._now_s += timeout
        return []

    def _process_events(self, events: list[Any]) -> None:
        """There are none: no sockets."""

    def _write_to_self(self) -> None:
        """Nothing to wake: who calls has the turn, so the loop is not waiting."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """On a simulated thread of its own."""
        future = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Killed:
                raise
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        SimThread(target=run, name="to_thread", loop=self).start()
        return future

    def spawn(
        self, process: Process | None, work: Coroutine[Any, Any, Any], name: str
    ) -> asyncio.Task[Any]:
        """A task that is part of a process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return context.run(self.create_task, work, name=name)

    def kill(self, process: Process) -> None:
        """End a process at once, whatever its threads wait for."""
        process.is_dead = True
        for task in process.tasks:
            task.cancel()
        for thread in list(process.threads):
            thread.kill()

    def sleep(self, seconds: float) -> None:
        """For threads."""
        self.thread.park(seconds)

    @property
    def thread(self) -> SimThread:
        """The simulated thread whose turn it is."""
        if self.current is None:
            raise Stuck("asyncio code blocks: it waits where only a thread may")
        return self.current

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, Killed):
            self.failures.append(error)


def _own_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(work, loop=loop, **options)
    process = PROCESS.get()
    if process is not None:
        if process.is_dead:
            task.cancel()
        process.tasks.append(task)
        if len(process.tasks) > 256:
            process.tasks = [each for each in process.tasks if not each.done()]
    return task


class SimThread:
    """`threading.Thread`, as far as the product uses it."""

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        name: str = "",
        daemon: bool = True,
        *,
        loop: VirtualLoop,
    ) -> None:
        self._loop = loop
        self._target, self._args, self._kwargs = target, args, kwargs or {}
        self.name = name
        self.process = current_process(loop)
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self.process)
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._real = threading.Thread(target=self._run, name=f"sim-{name}", daemon=True)
        self._is_started = self._is_over = self._is_killed = self._is_due = False
        self._joiners: list[SimThread] = []
        self._timer: asyncio.Handle | None = None
        self._parked = False
        self._woken = False

    def start(self) -> None:
        if self.process is not None:
            if self.process.is_dead:
                raise Killed
            self.process.threads.append(self)
        self._is_started = True
        self._loop.call_soon(self._first_turn)

    def is_alive(self) -> bool:
        return self._is_started and not self._is_over

    def join(self, timeout: float | None = None) -> None:
        if self.is_alive():
            self._joiners.append(self._loop.thread)
            while self.is_alive() and self._loop.thread.park(timeout):
                pass

    def park(self, timeout_s: float | None = None) -> bool:
        """Give the turn back until somebody wakes this thread; False when the time is over."""
        assert self._loop.current is self, f"{self.name} parks while it is not its turn"
        if self._is_killed:
            raise Killed
        self._parked, self._woken = True, False
        if timeout_s is not None:
            self._timer = self._loop.call_later(max(TICK_S, timeout_s), self._turn)
        self._back.release()
        self._go.acquire()
        self._parked = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_killed:
            raise Killed
        return self._woken

    def wake(self) -> None:
        """Let it go on; nothing happens when it does not wait."""
        if self._parked and not self._woken:
            self._woken = True
            self._loop.call_soon(self._turn)

    def kill(self) -> None:
        self._is_killed = True
        if self._parked:
            self._loop.call_soon(self._turn)

    def _first_turn(self) -> None:
        if self._is_killed:
            self._end()
            return
        self._real.start()
        self._hand_over()

    def _turn(self) -> None:
        if self._parked:
            self._hand_over()

    def _hand_over(self) -> None:
        before, self._loop.current = self._loop.current, self
        self._go.release()
        if not self._back.acquire(timeout=HANDOVER_S):
            raise Stuck(f"{self.name} of {self.process} blocks for real")
        self._loop.current = before
        if self._is_over and self.process is not None and self in self.process.threads:
            self.process.threads.remove(self)

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(1)
        try:
            self._context.run(self._target, *self._args, **self._kwargs)
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - the simulation fails with it
            if not self._is_killed:
                self._loop.failures.append(error)
        finally:
            self._end()
            self._back.release()

    def _end(self) -> None:
        self._is_over = True
        for thread in self._joiners:
            thread.wake()


def current_process(loop: VirtualLoop) -> Process | None:
    """Whose code runs now: the thread's, or the task's."""
    return loop.current.process if loop.current is not None else PROCESS.get()
