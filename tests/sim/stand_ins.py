"""What stands in for threading, queue, concurrent.futures and time in the product's modules.

Only for the time of one run, and by identity: every name of a product module that is bound to the
standard library's own object is bound to ours, every default argument `clock=time.monotonic` to the
virtual clock. Whatever blocks gives the turn back to the loop.
"""

from __future__ import annotations

import concurrent.futures
import queue
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from tests.sim.clockwork import Killed, SimThread, VirtualLoop

ROOMS = ("cluster", "gpu_worker", "ndp_worker", "expert_store")


class StandIns:
    """The stand-ins of one run, all on one virtual loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.threading = types.SimpleNamespace(
            Thread=self.thread,
            Lock=self.lock,
            RLock=self.lock,
            Condition=self.condition,
            Event=self.event,
            get_ident=threading.get_ident,
            local=threading.local,
        )
        self.queue = types.SimpleNamespace(
            SimpleQueue=self.simple_queue, Queue=self.simple_queue, Empty=queue.Empty
        )
        self.futures = types.SimpleNamespace(
            **{
                **vars(concurrent.futures),
                "ThreadPoolExecutor": self.executor,
                "wait": self.wait,
                "Future": self.future,
            }
        )
        self.time = types.SimpleNamespace(
            monotonic=loop.time,
            perf_counter=loop.time,
            time=loop.time,
            time_ns=lambda: int(loop.time() * 1e9),
            sleep=loop.sleep,
        )
        self.by_id: dict[int, Any] = {
            id(threading): self.threading,
            id(threading.Thread): self.thread,
            id(threading.Lock): self.lock,
            id(threading.RLock): self.lock,
            id(threading.Condition): self.condition,
            id(threading.Event): self.event,
            id(queue): self.queue,
            id(queue.SimpleQueue): self.simple_queue,
            id(concurrent.futures): self.futures,
            id(concurrent.futures.ThreadPoolExecutor): self.executor,
            id(concurrent.futures.wait): self.wait,
            id(concurrent.futures.Future): self.future,
            id(time): self.time,
            id(time.monotonic): loop.time,
        }

    def thread(self, *args: Any, **options: Any) -> SimThread:
        return SimThread(*args, loop=self._loop, **options)

    def lock(self) -> SimLock:
        return SimLock(self._loop)

    def condition(self, lock: Any = None) -> SimCondition:
        return SimCondition(self._loop)

    def event(self) -> SimEvent:
        return SimEvent(self._loop)

    def simple_queue(self, maxsize: int = 0) -> SimQueue:
        return SimQueue(self._loop)

    def executor(self, max_workers: int = 1, thread_name_prefix: str = "", **_: Any) -> SimExecutor:
        return SimExecutor(self._loop, max_workers, thread_name_prefix)

    def future(self) -> SimFuture:
        return SimFuture(self._loop)

    def wait(
        self,
        fs: Iterable[Future[Any]],
        timeout: float | None = None,
        return_when: str = "ALL_COMPLETED",
    ) -> Any:
        futures = list(fs)
        wait_for(self._loop, futures, timeout, first=return_when != "ALL_COMPLETED")
        done = {future for future in futures if future.done()}
        return types.SimpleNamespace(done=done, not_done=set(futures) - done)

    @contextmanager
    def installed(self, more: dict[int, Any]) -> Iterator[None]:
        """In every module of the product, with `more` stand-ins by the id of what they replace."""
        stand_ins = {**self.by_id, **more}
        undo: list[Callable[[], None]] = []
        try:
            for name in sorted(_loaded_modules()):
                _replace_names(sys.modules[name], stand_ins, undo)
                _replace_defaults(sys.modules[name], stand_ins, undo)
            loaded = _loaded_modules()
            yield
            late = sorted(_loaded_modules() - loaded)
            assert not late, f"{late} were loaded in a run, with real threads: import them before"
        finally:
            for step in reversed(undo):
                step()


def _loaded_modules() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in ROOMS}


def _replace_names(module: Any, stand_ins: dict[int, Any], undo: list[Callable[[], None]]) -> None:
    for name, value in list(vars(module).items()):
        if id(value) in stand_ins and not name.startswith("__"):
            undo.append(lambda name=name, value=value: setattr(module, name, value))  # type: ignore[misc]
            setattr(module, name, stand_ins[id(value)])


def _replace_defaults(
    module: Any, stand_ins: dict[int, Any], undo: list[Callable[[], None]]
) -> None:
    functions = [f for f in vars(module).values() if isinstance(f, types.FunctionType)]
    for owner in vars(module).values():
        if isinstance(owner, type) and owner.__module__ == module.__name__:
            functions += [f for f in vars(owner).values() if isinstance(f, types.FunctionType)]
    for function in functions:
        before = function.__kwdefaults__
        if before and any(id(value) in stand_ins for value in before.values()):
            undo.append(lambda f=function, b=before: setattr(f, "__kwdefaults__", b))  # type: ignore[misc]
            function.__kwdefaults__ = {
                name: stand_ins.get(id(value), value) for name, value in before.items()
            }


class SimLock:
    """Lock and RLock in one: whoever holds it may take it again."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._owner: Any = None
        self._depth = 0
        self._waiting: deque[SimThread] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = self._loop.current or self._loop
        while self._owner is not None and self._owner is not me:
            if not blocking:
                return False
            self._waiting.append(self._loop.thread)
            self._loop.thread.park()
        self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            waiting, self._waiting = self._waiting, deque()
            for thread in waiting:
                thread.wake()

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


class SimCondition(SimLock):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop)
        self._sleepers: list[SimThread] = []

    def wait(self, timeout: float | None = None) -> bool:
        thread, depth = self._loop.thread, self._depth
        self._sleepers.append(thread)
        self._depth = 1
        self.release()
        try:
            woken = thread.park(timeout)
        finally:
            if thread in self._sleepers:
                self._sleepers.remove(thread)
            self._regain(depth)
        return woken

    def notify(self, n: int = 1) -> None:
        for thread in self._sleepers[:n]:
            self._sleepers.remove(thread)
            thread.wake()

    def notify_all(self) -> None:
        self.notify(len(self._sleepers))

    def _regain(self, depth: int) -> None:
        try:
            self.acquire()
        except Killed:
            self._owner = self._loop.current
        self._depth = depth


class SimEvent:
    def __init__(self, loop: VirtualLoop) -> None:
        self._condition = SimCondition(loop)
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._condition.notify_all()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            with self._condition:
                self._condition.wait(timeout)
        return self._is_set


class SimQueue:
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._takers: deque[SimThread] = deque()

    def put(self, item: Any, *_: Any, **__: Any) -> None:
        self._items.append(item)
        if self._takers:
            self._takers.popleft().wake()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        while not self._items:
            if not block:
                raise queue.Empty
            thread = self._loop.thread
            self._takers.append(thread)
            if not thread.park(timeout) and not self._items:
                self._takers.remove(thread)
                raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class SimFuture(Future[Any]):
    """A Future whose waiting gives the turn back."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def result(self, timeout: float | None = None) -> Any:
        self._until_done(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._until_done(timeout)
        return super().exception(0)

    def _until_done(self, timeout: float | None) -> None:
        if not self.done() and timeout != 0:
            wait_for(self._loop, [self], timeout, first=False)


def wait_for(
    loop: VirtualLoop, futures: list[Future[Any]], timeout: float | None, *, first: bool
) -> None:
    """Until one is done, or all, or the time is over."""
    left = {id(future) for future in futures if not future.done()}
    if not left or (first and len(left) < len(futures)):
        return
    thread = loop.thread

    def done(future: Future[Any]) -> None:
        left.discard(id(future))
        if first or not left:
            thread.wake()

    for future in futures:
        if not future.done():
            future.add_done_callback(done)
    end_s = None if timeout is None else loop.time() + timeout
    while left and not (first and len(left) < len(futures)):
        if not thread.park(None if end_s is None else end_s - loop.time()):
            return


class SimExecutor:
    """A ThreadPoolExecutor of simulated threads, started as they are needed."""

    def __init__(self, loop: VirtualLoop, max_workers: int, name: str) -> None:
        self._loop = loop
        self._max_workers = max_workers
        self._name = name
        self._tasks: deque[tuple[SimFuture, Callable[..., Any], Any, Any]] = deque()
        self._threads: list[SimThread] = []
        self._is_shut = False

    def __enter__(self) -> SimExecutor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown(wait=True)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> SimFuture:
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = SimFuture(self._loop)
        self._tasks.append((future, fn, args, kwargs))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) < self._max_workers:
            thread = SimThread(target=self._work, name=self._name, loop=self._loop)
            self._threads.append(thread)
            thread.start()
        return future

    def map(self, fn: Callable[..., Any], *iterables: Any) -> Iterator[Any]:
        futures = [self.submit(fn, *args) for args in zip(*iterables, strict=False)]
        return iter([future.result() for future in futures])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_shut = True
        if cancel_futures:
            for future, *_ in self._tasks:
                future.cancel()
            self._tasks.clear()
        if wait:
            for thread in list(self._threads):
                thread.join()

    def _work(self) -> None:
        while self._tasks:
            future, fn, args, kwargs = self._tasks.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = fn(*args, **kwargs)
            except Killed:
                raise
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)
