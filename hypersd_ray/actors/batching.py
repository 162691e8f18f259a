"""Calls of many workers joined into batches on an event loop. Knows neither Ray nor torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hypersd_ray.actors.messages import Answer, join

Run = Callable[[np.ndarray, list[Any], bool], Answer]
"""(images (B, 3, H, W), told, with gradient) -> answer; called in a thread, one call at a time."""


@dataclass
class Counts:
    """What has been done so far."""

    calls: int = 0
    batches: int = 0
    images: int = 0


@dataclass
class _Call:
    images: np.ndarray
    told: list[Any]
    gradient: bool
    answer: asyncio.Future = field(repr=False)

    @property
    def kind(self) -> Hashable:
        """Only calls of one kind can share a batch."""
        return self.images.shape[1:], str(self.images.dtype), self.gradient


class MicroBatcher:
    """Joins calls that come within `wait_s` of each other, up to `max_batch` samples; cuts longer ones.

    Args:
        run: the model.
        max_batch: samples computed at once, which bounds its memory.
        wait_s: how long the first call of a batch waits for others.
    """

    def __init__(self, run: Run, max_batch: int, wait_s: float):
        self.run, self.max_batch, self.wait_s = run, max_batch, wait_s
        self.counts = Counts()
        self.queue: asyncio.Queue[_Call] = asyncio.Queue()
        self.server: asyncio.Task | None = None

    async def submit(self, images: np.ndarray, told: list[Any], gradient: bool) -> Answer:
        """The answer to one call; raises what the model raises on it."""
        if self.server is None or self.server.done():
            self.server = asyncio.create_task(self._serve())
        call = _Call(images, told, gradient, asyncio.get_running_loop().create_future())
        self.counts.calls += 1
        await self.queue.put(call)
        return await call.answer

    async def _serve(self) -> None:
        while True:
            calls = await self._collect()
            groups: dict[Hashable, list[_Call]] = {}
            for call in calls:
                groups.setdefault(call.kind, []).append(call)
            for group in groups.values():
                await self._answer(group)

    async def _collect(self) -> list[_Call]:
        calls = [await self.queue.get()]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.wait_s
        while sum(len(c.images) for c in calls) < self.max_batch:
            try:
                calls.append(await asyncio.wait_for(self.queue.get(), max(0.0, deadline - loop.time())))
            except TimeoutError:
                break
        return calls

    async def _answer(self, group: list[_Call]) -> None:
        try:
            answer = await self._compute(group)
        except Exception as error:
            if len(group) == 1:
                if not group[0].answer.done():  # its caller may have been cancelled
                    group[0].answer.set_exception(error)
                return
            for call in group:  # one bad call must not fail the others
                await self._answer([call])
            return
        start = 0
        for call in group:
            if not call.answer.done():
                call.answer.set_result(answer.part(start, start + len(call.images)))
            start += len(call.images)

    async def _compute(self, group: list[_Call]) -> Answer:
        images = group[0].images if len(group) == 1 else np.concatenate([c.images for c in group])
        told = [entry for call in group for entry in call.told]
        answers = []
        for start in range(0, len(images), self.max_batch):
            end = start + self.max_batch
            answers.append(await asyncio.to_thread(self.run, images[start:end], told[start:end], group[0].gradient))
            self.counts.batches += 1
        self.counts.images += len(images)
        return join(answers)
