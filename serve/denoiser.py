"""The deployment that holds the model: collects images, gives them their turn on the device, hot-swaps LoRAs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

import numpy as np
import torch
import transformers
from ray import serve as ray_serve

from serve.catalog import Catalog
from serve.engine import Abandoned, Engine
from serve.lora_switch import HotLoRA
from serve.metrics import DenoiserMetrics
from serve.settings import NO_LORA, Settings
from serve.turns import Ticket, Turns
from serve.work import BatchKey, DeviceLost, Picture, Preview, Refused, Shot, Work

logger = logging.getLogger("ray.serve")


class Denoiser:
    """One replica: one engine, one batch at a time."""

    async def __init__(self, settings: Settings, catalog: Catalog):  # type: ignore[misc]  # Serve awaits it
        transformers.utils.logging.disable_progress_bar()  # bars of a replica end up in other people's consoles
        self.settings, self.catalog = settings, catalog
        self.engine = Engine(settings.model, catalog)
        self.metrics = DenoiserMetrics()
        self.turns: Turns[Picture] = Turns(self._run, settings.denoiser.max_batch)
        self.broken = ""

        # Functions, not methods: only here are the sizes known, and both decorators keep their state on what they wrap.
        async def collect(tickets: list[Ticket[Picture]]) -> list[None]:
            self.turns.enter(tickets)
            self.metrics.waiting.set(len(self.turns))
            return [None] * len(tickets)

        async def load(name: str) -> HotLoRA:
            return await asyncio.to_thread(self.engine.load_lora, name)

        wait = settings.denoiser.batch_wait_ms / 1000
        self._collect = ray_serve.batch(max_batch_size=settings.denoiser.max_batch, batch_wait_timeout_s=wait)(collect)
        self._hot_lora = ray_serve.multiplexed(max_num_models_per_replica=settings.denoiser.hot_loras)(load)
        if settings.denoiser.warm_up:
            await self._warm_up()

    async def _warm_up(self) -> None:
        """Loads the LoRAs there is room for, and runs each once; the smallest and the greatest batch too.

        So a LoRA that does not fit is found before a request finds it, and every replica has the same LoRAs: Serve
        sends a LoRA's requests to the replicas that have it, and would leave the others idle.
        """
        default = self.catalog.choose(self.settings.model.default_steps)
        others = [name for name in self.catalog.lora_names if name != default]
        names = [*others[: self.settings.denoiser.hot_loras - 1], default]
        width, height = map(int, self.catalog.sizes[0].split("x"))
        for name in names:
            lora = None if name == NO_LORA else await self._hot_lora(name)
            key = BatchKey(width, height, 1, 0.0, name, 1.0, guided=False)
            for size in {1, self.settings.denoiser.max_batch} if name == default else {1}:
                self.engine.run(key, [Shot("warm-up", seed) for seed in range(size)], lora)

    def _unless_broken(self) -> None:
        if self.broken:
            raise DeviceLost(self.broken)

    def check_health(self) -> None:
        """Raises when the device has gone wrong, so that Serve starts another replica."""
        if self.broken:
            raise RuntimeError(self.broken)

    async def generate(self, work: Work) -> list[Picture] | Refused:
        """All images of a request. Raises DeviceLost, which another replica may make good."""
        self._unless_broken()
        tokens = self._tokens(work)
        if isinstance(tokens, Refused):
            return tokens
        tickets = self._tickets(work)
        try:
            await self._enter(tickets)
            pictures = await asyncio.gather(*(ticket.future for ticket in tickets))
        finally:
            self._leave(tickets)
        return [self._numbered(i, picture, tokens) for i, picture in enumerate(pictures)]

    async def stream(self, work: Work) -> AsyncIterator[Preview | Picture | Refused]:
        """A request's previews as they come, and its images. Raises DeviceLost."""
        self._unless_broken()
        tokens = self._tokens(work)
        if isinstance(tokens, Refused):
            yield tokens
            return
        events: asyncio.Queue[Preview | Picture | BaseException] = asyncio.Queue()
        tickets = self._tickets(work)

        def shown(i: int, step: int, pixels: np.ndarray) -> None:
            events.put_nowait(Preview(i, step, pixels))

        def made(i: int, future: asyncio.Future[Picture]) -> None:
            events.put_nowait(self._outcome(i, future, tokens))

        for i, ticket in enumerate(tickets):
            ticket.on_preview = partial(shown, i)
            ticket.future.add_done_callback(partial(made, i))
        try:
            await self._enter(tickets)
            left = len(tickets)
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, Picture)
                yield event
        finally:
            self._leave(tickets)

    def _outcome(self, index: int, future: asyncio.Future[Picture], tokens: int) -> Picture | BaseException:
        if future.cancelled():
            return asyncio.CancelledError()
        return future.exception() or self._numbered(index, future.result(), tokens)

    def _tokens(self, work: Work) -> int | Refused:
        """Tokens of the prompt; a refusal where a prompt is longer than what the text encoder reads."""
        limit, shot = self.engine.token_limit, work.shots[0]
        counts = {"prompt": self.engine.count_tokens(shot.prompt)}
        if shot.negative_prompt:
            counts["negative_prompt"] = self.engine.count_tokens(shot.negative_prompt)
        for param, count in counts.items():
            if count > limit and self.settings.limits.long_prompts == "refuse":
                return Refused(
                    param,
                    f"{param}: {count} tokens, the text encoder reads {limit}; shorten it (or the server may set "
                    "limits.long_prompts=cut)",
                    "prompt_too_long",
                )
        return counts["prompt"]

    def _tickets(self, work: Work) -> list[Ticket[Picture]]:
        loop = asyncio.get_running_loop()
        return [Ticket(work.key, shot, loop.create_future()) for shot in work.shots]

    async def _enter(self, tickets: Sequence[Ticket[Picture]]) -> None:
        await asyncio.gather(*(self._collect(ticket) for ticket in tickets))

    def _leave(self, tickets: Sequence[Ticket[Picture]]) -> None:
        """Nobody waits for what is not done yet."""
        for ticket in tickets:
            ticket.future.cancel()
        # asked afterwards: where the request itself was cancelled, `gather` has cancelled them before
        gone = sum(ticket.future.cancelled() for ticket in tickets)
        if gone:
            self.metrics.abandoned.inc(gone)
        self.metrics.waiting.set(len(self.turns))

    def _numbered(self, index: int, picture: Picture, tokens: int) -> Picture:
        limit = self.engine.token_limit
        cut = (f"the prompt has {tokens} tokens, only the first {limit} were read",) if tokens > limit else ()
        return Picture(index, picture.pixels, picture.batch_size, tokens, picture.seconds, cut)

    async def _run(self, key: BatchKey, tickets: Sequence[Ticket[Picture]]) -> list[Picture]:
        """A batch, on a thread of its own so that the replica goes on answering."""
        begun, loop = time.perf_counter(), asyncio.get_running_loop()
        lora = None if key.lora == NO_LORA else await self._hot_lora(key.lora)
        before = self.engine.switch.current

        def on_preview(place: int, step: int, pixels: np.ndarray) -> None:
            if (show := tickets[place].on_preview) is not None:
                loop.call_soon_threadsafe(show, step, pixels)

        def wanted() -> bool:
            return any(ticket.wanted for ticket in tickets)

        shots = [ticket.shot for ticket in tickets]
        try:
            result = await asyncio.to_thread(self.engine.run, key, shots, lora, on_preview, wanted)
        except Abandoned:
            return [Picture(0, np.empty(0), 0, 0)] * len(tickets)  # nobody is there to get it
        except torch.AcceleratorError as error:
            # The context is lost: every call after this one fails too, until Serve has started another replica.
            self.broken = f"the device failed: {(str(error).splitlines() or ['?'])[0]}"
            raise DeviceLost(self.broken) from None
        finally:
            self._count(key, tickets, time.perf_counter() - begun, before is not self.engine.switch.current)
        return [Picture(0, pixels, len(tickets), 0, result.seconds) for pixels in result.pictures]

    def _count(self, key: BatchKey, tickets: Sequence[Ticket[Picture]], seconds: float, switched: bool) -> None:
        tags = {"lora": key.lora, "steps": str(key.steps)}
        self.metrics.batch.observe(len(tickets), tags)
        self.metrics.busy.inc(seconds, tags)
        self.metrics.waiting.set(len(self.turns))
        if switched:
            self.metrics.switches.inc(1, {"lora": key.lora})
