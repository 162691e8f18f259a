"""`POST /v1/images/generations`, from the body to the answer: one JSON, or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve import pictures
from serve.api import Asked, GenerationResponse, ImageObject, LoRAChoice, Usage, fill_in, parse_body
from serve.calls import Calls
from serve.catalog import Catalog
from serve.errors import ApiError, too_late, unforeseen
from serve.links import Links
from serve.metrics import IngressMetrics
from serve.safety import Guard
from serve.settings import Settings
from serve.work import Picture, Preview

logger = logging.getLogger("ray.serve")
ON_DEVICE = ("text", "denoise", "preview", "decode")
"""Stages of a replica's batch."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body.

    Raises:
        ApiError: 413 above `limit` bytes, 415 when it is not JSON by its header.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"content-type: {kind[:64] or 'none'!r}, send application/json",
            "content-type",
            "unsupported_media_type",
        )
    too_large = ApiError(413, f"body: more than {limit} bytes (limits.body_bytes)", "body", "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


class Generation:
    """The endpoint."""

    def __init__(
        self, settings: Settings, catalog: Catalog, calls: Calls, guard: Guard, links: Links, metrics: IngressMetrics
    ):
        self.settings, self.catalog, self.calls, self.guard = settings, catalog, calls, guard
        self.links, self.metrics, self._in_flight = links, metrics, 0

    async def answer(self, request: Request) -> Response:
        """What the client gets, within `limits.seconds` from here on.

        Raises:
            ApiError: for everything that is not a success.
        """
        watch, seconds = _Watch(self), self.settings.limits.seconds
        until = asyncio.get_running_loop().time() + seconds
        try:
            try:
                async with asyncio.timeout_at(until) as limit:
                    response = await self._answer(request, watch, until)
            except TimeoutError as error:
                if limit.expired():
                    raise too_late(seconds) from error
                raise
        except BaseException as error:
            watch.close(error)
            raise
        if not isinstance(response, _Events):  # which is not over yet
            watch.close()
        return response

    async def _answer(self, request: Request, watch: _Watch, until: float) -> Response:
        given = parse_body(await read_body(request, self.settings.limits.body_bytes))
        if given.control_image is None:
            asked = fill_in(given, self.settings, self.catalog)
        else:  # an image is unpacked
            asked = await asyncio.to_thread(fill_in, given, self.settings, self.catalog)
        watch.asked = asked
        watch.lap("read")
        await self.guard.check_prompt(asked.prompt)
        watch.lap("check")
        if asked.stream:
            return await self._stream(asked, watch, until)
        found = await self.calls.pictures(asked.work())
        watch.lap("call")
        await self.guard.check_images([picture.pixels for picture in found], watch)
        return await self._response(asked, found, request, watch)

    async def _response(self, asked: Asked, found: Sequence[Picture], request: Request, watch: _Watch) -> Response:
        files = await asyncio.gather(*(asyncio.to_thread(self._file, asked, picture) for picture in found))
        data = []
        for picture, file in zip(found, files, strict=True):
            seed = asked.seed + picture.index
            if asked.url:
                name = await asyncio.to_thread(self.links.put, file, asked.output_format)
                root = self.settings.ingress.public_url or str(request.base_url)
                data.append(ImageObject(url=f"{root.rstrip('/')}/images/{name}", seed=seed))
            else:
                data.append(ImageObject(b64_json=base64.b64encode(file).decode(), seed=seed))
        watch.lap("encode")
        watch.took(found)
        answer = GenerationResponse(
            created=int(time.time()), data=data, output_format=asked.output_format, timings=watch.timings(),
            batch_size=max(picture.batch_size for picture in found), usage=_usage(asked, found[0]),
            warnings=list(found[0].warnings), **self._echo(asked),
        )  # fmt: skip
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    async def _stream(self, asked: Asked, watch: _Watch, until: float) -> Response:
        """Server-sent events; what goes wrong before the first one is an answer of its own."""
        events = self.calls.events(asked.work(), until)
        first = await anext(events)
        watch.lap("call")

        async def line(event: Preview | Picture) -> str:
            try:
                async with asyncio.timeout_at(until) as limit:
                    return await self._event(asked, event, watch)
            except TimeoutError as error:
                if limit.expired():
                    raise too_late(self.settings.limits.seconds) from error
                raise

        async def lines() -> AsyncGenerator[str, None]:
            try:
                yield await line(first)
                watch.mark()
                async for event in events:
                    watch.lap("call")
                    yield await line(event)
                    watch.mark()
            except ApiError as error:
                watch.close(error)
                yield _sse("error", error.envelope())
            except Exception as error:
                logger.exception("unforeseen, in a stream")
                watch.close(error)
                yield _sse("error", unforeseen().envelope())
            except BaseException as error:
                watch.close(error)
                raise
            else:
                watch.close()

        async def over() -> None:
            watch.close(asyncio.CancelledError())  # unless it is closed: `lines` may never have begun
            await events.aclose()

        return _Events(lines(), over)

    async def _event(self, asked: Asked, event: Preview | Picture, watch: _Watch) -> str:
        await self.guard.check_images([event.pixels], watch)
        file = await asyncio.to_thread(self._file, asked, event)
        content = {
            "b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), "background": "opaque",
            "output_format": asked.output_format, "quality": "auto", "index": event.index,
            "seed": asked.seed + event.index, **self._echo(asked, plain=True),
        }  # fmt: skip
        watch.lap("encode")
        if isinstance(event, Preview):
            place = asked.show_after().index(event.step)
            content |= {"partial_image_index": place, "step": event.step}
            return _sse("image_generation.partial_image", content)
        watch.took([event])
        content |= {
            "usage": _usage(asked, event).model_dump(), "timings": watch.timings(), "batch_size": event.batch_size,
            "warnings": list(event.warnings),
        }  # fmt: skip
        return _sse("image_generation.completed", content)

    def _echo(self, asked: Asked, plain: bool = False) -> dict[str, Any]:
        """What the answer repeats of the request, defaults filled in."""
        lora = LoRAChoice(name=asked.key.lora, scale=asked.key.lora_scale)
        return {
            "size": asked.size, "model": self.catalog.id, "num_inference_steps": asked.key.steps,
            "eta": asked.key.eta, "lora": lora.model_dump() if plain else lora, "guidance_scale": asked.guidance,
        }  # fmt: skip

    def _file(self, asked: Asked, picture: Preview | Picture) -> bytes:
        if isinstance(picture, Preview):
            return pictures.encode(picture.pixels, asked.output_format, asked.quality, None)
        parameters = {
            "prompt": asked.prompt, "negative_prompt": asked.negative_prompt, "seed": asked.seed + picture.index,
            "scheduler": self.catalog.sampler(asked.key.lora), "software": "hypersd_ray", **self._echo(asked, plain=True),
        }  # fmt: skip
        if asked.key.control:
            parameters |= {"control": asked.key.control, "control_scale": asked.control_scale}
        return pictures.encode(picture.pixels, asked.output_format, asked.quality, parameters)


def _usage(asked: Asked, picture: Picture) -> Usage:
    tokens = picture.prompt_tokens
    details = {"text_tokens": tokens, "image_tokens": 0}
    return Usage(input_tokens=tokens, total_tokens=tokens, input_tokens_details=details)


def _sse(event: str, content: dict[str, Any]) -> str:
    if event != "error":
        content = {"type": event} | content
    return f"event: {event}\ndata: {json.dumps(content)}\n\n"


class _Events(StreamingResponse):
    """Server-sent events, and what is to be done when they are over, however that comes."""

    def __init__(self, lines: AsyncGenerator[str, None], over: Callable[[], Awaitable[None]]):
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._lines, self._over = lines, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()
            await self._over()


class _Watch:
    """Time, metrics and the log line of one request."""

    def __init__(self, generation: Generation):
        self.generation = generation
        self.asked: Asked | None = None
        self.seconds: dict[str, float] = {}
        self.images = 0
        self._begun = self._last = time.perf_counter()
        self._open = True
        self._flight(+1)

    def lap(self, stage: str) -> None:
        """`stage` ends now; it began where the one before ended, or where `mark` was called."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def mark(self) -> None:
        """The next stage begins now."""
        self._last = time.perf_counter()

    def took(self, found: Sequence[Picture]) -> None:
        """The slowest image's time counts for each stage."""
        self.images += len(found)
        for picture in found:
            for stage, seconds in picture.seconds.items():
                self.seconds[stage] = max(self.seconds.get(stage, 0.0), seconds)

    def timings(self) -> dict[str, float]:
        """Seconds by stage and in all; `queue` is what a call to the model took beside the model's own stages."""
        seconds = dict(self.seconds)
        if (call := seconds.pop("call", None)) is not None:
            seconds = {"queue": max(0.0, call - sum(seconds.get(stage, 0.0) for stage in ON_DEVICE))} | seconds
        return {k: round(v, 5) for k, v in (seconds | {"total": time.perf_counter() - self._begun}).items()}

    def close(self, error: BaseException | None = None) -> None:
        """Count and log, once."""
        if not self._open:
            return
        self._open = False
        self._flight(-1)
        metrics, asked = self.generation.metrics, self.asked
        status, code = 200, "ok"
        if isinstance(error, ApiError):
            status, code = error.status, error.body.code or ""
        elif isinstance(error, asyncio.CancelledError | GeneratorExit | ClientDisconnect):
            status, code = 499, "client_gone"
            metrics.gone.inc()
        elif error is not None:
            status, code = 500, "internal"
        metrics.requests.inc(1, {"status": str(status), "code": code})
        timings = self.timings()
        fields: dict[str, Any] = {"status": status, "code": code, "seconds": timings}
        if asked is not None:
            tags = {"lora": asked.key.lora, "steps": str(asked.key.steps)}
            if error is None:
                metrics.images.inc(self.images, tags)
                for stage, seconds in timings.items():
                    metrics.seconds.observe(seconds, tags | {"stage": stage})
            user = hashlib.sha256(asked.user.encode()).hexdigest()[:16] if asked.user else None
            fields |= tags | {
                "n": asked.n,
                "size": asked.size,
                "seed": asked.seed,
                "stream": asked.stream,
                "user": user,
            }
        # Serve adds the request's id (X-Request-ID), the application and the replica
        logger.info("images %s %s", status, code, extra=fields)

    def _flight(self, change: int) -> None:
        self.generation._in_flight += change
        self.generation.metrics.in_flight.set(self.generation._in_flight)
