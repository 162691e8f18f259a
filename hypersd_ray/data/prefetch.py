"""Run an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetch(Generic[T]):
    """An iterator whose next `depth` items are made in a background thread.

    At most `depth` items wait or are being made, beside the one that the consumer holds. An exception in the source
    reaches the consumer after the items before it. `waited_s` is the time the consumer has spent waiting.
    """

    def __init__(self, source: Iterator[T], depth: int, name: str) -> None:
        self.waited_s = 0.0
        self._source = source
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._free.acquire()
                if self._stopped.is_set():
                    break
                try:
                    item = next(self._source)
                except StopIteration:
                    break
                self._ready.put(item)
        except BaseException as error:  # whatever it is, the consumer raises it
            self._error = error
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
            self._ready.put(_END)

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        """The next item. Raises what the source raised, StopIteration at its end or after `close`."""
        started = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if item is _END:
            self._ready.put(_END)  # for whoever asks again
            if self._error is not None and not self._stopped.is_set():
                raise self._error
            raise StopIteration
        self._free.release()
        return item

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread after the item it is making, and wake a waiting consumer. May be called twice."""
        self._stopped.set()
        self._free.release()
        self._ready.put(_END)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
