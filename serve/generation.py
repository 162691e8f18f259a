"""`POST /v1/images/generations`, from the body to the answer: one JSON, or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from serve import pictures
from serve.api import Asked, GenerationResponse, ImageObject, LoRAChoice, Usage, fill_in, parse_body
from serve.calls import Calls
from serve.catalog import Catalog
from serve.errors import ApiError
from serve.links import Links
from serve.metrics import IngressMetrics
from serve.safety import Guard
from serve.settings import Settings
from serve.work import Picture, Preview

logger = logging.getLogger("ray.serve")


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
        """What the client gets.

        Raises:
            ApiError: for everything that is not a success.
        """
        watch = _Watch(self)
        try:
            body = await read_body(request, self.settings.limits.body_bytes)
            asked = watch.asked = fill_in(parse_body(body), self.settings, self.catalog)
            await self.guard.check_prompt(asked.prompt)
            if asked.stream:
                return await self._stream(asked, watch)
            found = await self.calls.pictures(asked.work())
            await self.guard.check_images([picture.pixels for picture in found], watch)
            response = await self._response(asked, found, request, watch)
        except BaseException as error:
            watch.close(error)
            raise
        watch.close()
        return response

    async def _response(self, asked: Asked, found: Sequence[Picture], request: Request, watch: _Watch) -> Response:
        files = await asyncio.gather(*(asyncio.to_thread(self._file, asked, picture) for picture in found))
        watch.lap("encode")
        data = []
        for picture, file in zip(found, files, strict=True):
            seed = asked.seed + picture.index
            if asked.url:
                name = await asyncio.to_thread(self.links.put, file, asked.output_format)
                root = self.settings.ingress.public_url or str(request.base_url)
                data.append(ImageObject(url=f"{root.rstrip('/')}/images/{name}", seed=seed))
            else:
                data.append(ImageObject(b64_json=base64.b64encode(file).decode(), seed=seed))
        watch.took(found)
        answer = GenerationResponse(
            created=int(time.time()), data=data, output_format=asked.output_format, timings=watch.timings(),
            batch_size=max(picture.batch_size for picture in found), usage=_usage(asked, found[0]),
            warnings=list(found[0].warnings), **self._echo(asked),
        )  # fmt: skip
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    async def _stream(self, asked: Asked, watch: _Watch) -> Response:
        """Server-sent events; what goes wrong before the first one is an answer of its own."""
        events = self.calls.events(asked.work())
        first = await anext(events)

        async def lines() -> AsyncIterator[str]:
            try:
                yield await self._event(asked, first, watch)
                async for event in events:
                    yield await self._event(asked, event, watch)
            except ApiError as error:
                watch.close(error)
                yield _sse("error", error.envelope())
            except BaseException as error:
                watch.close(error)
                raise
            else:
                watch.close()
            finally:
                await events.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _event(self, asked: Asked, event: Preview | Picture, watch: _Watch) -> str:
        await self.guard.check_images([event.pixels], watch)
        file = await asyncio.to_thread(self._file, asked, event)
        content = {
            "b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), "background": "opaque",
            "output_format": asked.output_format, "quality": "high", "index": event.index,
            "seed": asked.seed + event.index, **self._echo(asked, plain=True),
        }  # fmt: skip
        if isinstance(event, Preview):
            place = asked.show_after().index(event.step)
            content |= {"partial_image_index": place, "step": event.step}
            return _sse("image_generation.partial_image", content)
        watch.lap("encode")
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
            "scheduler": "TCDScheduler", "software": "hypersd_ray", **self._echo(asked, plain=True),
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
        """Seconds by stage and in all."""
        return {k: round(v, 5) for k, v in (self.seconds | {"total": time.perf_counter() - self._begun}).items()}

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
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
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
