"""Whose turn it is on the device: images of one key run together, the oldest image's key first.

Why not `@serve.batch` alone: it closes a batch when its waiting time is over even while the device is busy, so at
saturation images that arrive a few milliseconds apart become a queue of batches of one. Here a batch is made up when
its turn comes, of all that is there by then; `@serve.batch` stands before it, for what an idle device should wait for.
Batches run one at a time, so a LoRA is never switched under another batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.work import BatchKey, Shot

R = TypeVar("R")


@dataclass(eq=False)
class Ticket(Generic[R]):
    """One image waiting for its turn; its future is cancelled when nobody waits for it any more."""

    key: BatchKey
    shot: Shot
    future: asyncio.Future[R]
    on_preview: Callable[[int, object], None] | None = None
    entered: float = field(default_factory=time.perf_counter)

    @property
    def wanted(self) -> bool:
        """Somebody still waits."""
        return not self.future.done()


Run = Callable[[BatchKey, Sequence[Ticket[R]]], Awaitable[Sequence[R]]]


class Turns(Generic[R]):
    """A queue of tickets and the one worker that empties it."""

    def __init__(self, run: Run[R], max_batch: int):
        self._run, self.max_batch = run, max_batch
        self._waiting: OrderedDict[BatchKey, deque[Ticket[R]]] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Images that wait."""
        return sum(ticket.wanted for tickets in self._waiting.values() for ticket in tickets)

    def enter(self, tickets: Sequence[Ticket[R]]) -> None:
        """Queue `tickets`; each one's future gets its result."""
        for ticket in tickets:
            self._waiting.setdefault(ticket.key, deque()).append(ticket)
        if self._waiting and (self._worker is None or self._worker.done()):
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while batch := self._next():
            try:
                results = await self._run(batch[0].key, batch)
                for ticket, result in zip(batch, results, strict=True):
                    if ticket.wanted:
                        ticket.future.set_result(result)
            except Exception as error:
                for ticket in batch:
                    if ticket.wanted:
                        ticket.future.set_exception(error)

    def _next(self) -> list[Ticket[R]]:
        """The next batch; empty when nobody waits."""
        for key in list(self._waiting):
            self._waiting[key] = deque(ticket for ticket in self._waiting[key] if ticket.wanted)
            if not self._waiting[key]:
                del self._waiting[key]
        if not self._waiting:
            return []
        key = min(self._waiting, key=lambda k: self._waiting[k][0].entered)
        queue = self._waiting[key]
        return [queue.popleft() for _ in range(min(self.max_batch, len(queue)))]
