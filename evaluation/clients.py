"""Clients that load the application: requests, what came of each, and requests kept in flight."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from evaluation.serving import Server

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        when: its end, by the monotonic clock.
        status: of HTTP; None where none came.
        images: that came whole; 0 for every failure, also one after a status of 200.
        batch: images of the batch that it was in.
        retry_after: whether the answer said when to come back.
    """

    when: float
    status: int | None
    seconds: float
    images: int
    batch: int = 0
    retry_after: bool = False


@dataclass
class Tally:
    """Every request's answer, and the texts of what went wrong."""

    answers: list[Answer] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0

    def good(self, begin: float = 0.0, end: float = float("inf")) -> list[Answer]:
        """Those with images that ended between two times, the earliest first."""
        return sorted((a for a in self.answers if a.images and begin <= a.when < end), key=lambda a: a.when)

    def rate(self, begin: float, end: float) -> float:
        """Images per second between two times."""
        return sum(a.images for a in self.good(begin, end)) / (end - begin)

    def rate_of_batches(self, begin: float, end: float, batch_s: float) -> float:
        """As `rate`, from the end of one batch to the end of another.

        Images come in lumps, one a batch; a lump that falls on this or that side of a window's edge is an error of
        `max_batch` images. Where batches are too short to be told apart the window holds enough of them.
        """
        rows = self.good(begin, end)
        ends = [i for i in range(len(rows) - 1) if rows[i + 1].when - rows[i].when > 0.3 * batch_s]
        if batch_s < 0.05 or len(ends) < 2:
            return self.rate(begin, end)
        first, last = ends[0], ends[-1]
        return sum(a.images for a in rows[first + 1 : last + 1]) / (rows[last].when - rows[first].when)

    def batch_size(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """Mean over the answers of the images in their batch."""
        sizes = [a.batch for a in self.good(begin, end) if a.batch]
        return sum(sizes) / len(sizes) if sizes else 0.0

    def times(self) -> dict[str, float]:
        """Percentiles of the seconds of what was answered with images."""
        good = sorted(a.seconds for a in self.answers if a.images)
        return {f"p{p}": good[min(len(good) - 1, int(p / 100 * len(good)))] for p in (50, 95, 99)} if good else {}

    def report(self) -> dict[str, Any]:
        """Counts by kind; every request is in exactly one of `answered` and `unanswered`."""
        statuses = Counter(a.status for a in self.answers if a.status is not None)
        failed = [a for a in self.answers if not a.images]
        return {
            "requests": len(self.answers),
            "answered": sum(statuses.values()),
            "unanswered": sum(a.status is None for a in self.answers),
            "statuses": {str(status): statuses[status] for status in sorted(statuses)},
            "failures_with_retry_after": dict(Counter(str(a.status) for a in failed if a.retry_after)),
            "broken_after_200": sum(a.status == 200 for a in failed),
            "errors": dict(self.errors),
            "most_in_flight": self.most_in_flight,
            **self.times(),
        }


def client() -> aiohttp.ClientSession:
    """As many connections as are asked for."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))


async def ask(session: aiohttp.ClientSession, server: Server, body: Body, tally: Tally) -> Answer:
    """One request; whatever happens to it is in `tally`."""
    begun = time.monotonic()
    status, images, batch, retry_after = None, 0, 0, False
    tally.in_flight += 1
    tally.most_in_flight = max(tally.most_in_flight, tally.in_flight)
    try:
        async with session.post(f"{server.url}/v1/images/generations", json=body) as answer:
            status, retry_after = answer.status, "Retry-After" in answer.headers
            if status == 200:
                images, batch = await (_events if body.get("stream") else _whole)(session, answer, body)
            elif status != 429:
                tally.errors[f"{status}: {_message(await answer.text())}"] += 1
    except Exception as error:  # a request that is lost without a trace would make the figures better
        tally.errors[f"{status or 'no status'}: {type(error).__name__}: {error}"[:300]] += 1
    finally:
        tally.in_flight -= 1
        now = time.monotonic()
        tally.answers.append(Answer(now, status, now - begun, images, batch, retry_after))
    return tally.answers[-1]


def _message(text: str) -> str:
    """Of OpenAI's envelope; else the text itself, as a proxy may write one."""
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"no envelope: {text[:200]}"


def _seeds(body: Body) -> list[int]:
    return [body["seed"] + i for i in range(body.get("n", 1))]


async def _whole(session: aiohttp.ClientSession, answer: aiohttp.ClientResponse, body: Body) -> tuple[int, int]:
    """Images and batch size of a JSON answer; images behind URLs are fetched. Raises ValueError for a wrong one."""
    content = await answer.json()
    found = [image["seed"] for image in content["data"]]
    if found != _seeds(body):
        raise ValueError(f"seeds {found} in place of {_seeds(body)}")
    for image in content["data"]:
        if body.get("response_format") == "url":
            async with session.get(image["url"]) as file:
                if file.status != 200 or len(await file.read()) < 100:
                    raise ValueError(f"an image's URL answers {file.status}")
        elif not image["b64_json"]:
            raise ValueError("an image is empty")
    return len(found), content["batch_size"]


async def _events(session: aiohttp.ClientSession, answer: aiohttp.ClientResponse, body: Body) -> tuple[int, int]:
    """As `_whole`, of server-sent events."""
    seeds, batch, previews = [], 0, 0
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(f"in the stream: {event['error']['message']}")
        if event["type"].endswith("completed"):
            seeds.append(event["seed"])
            batch = max(batch, event["batch_size"])
        else:
            previews += 1
    wanted = body.get("n", 1) * min(body.get("partial_images", 0), body["num_inference_steps"] - 1)
    if sorted(seeds) != _seeds(body) or previews != wanted:
        raise ValueError(f"seeds {seeds}, {previews} previews, in place of {_seeds(body)}, {wanted}")
    return len(seeds), batch


async def keep_busy(
    server: Server, body: Callable[[int], Body], clients: int, tally: Tally, until: Callable[[], bool],
    meanwhile: Awaitable[Any] | None = None,
) -> None:  # fmt: skip
    """`clients` requests in flight until `until()`; each client sends its next one as soon as it is answered."""
    count = 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal count
        while not until():
            count += 1
            if not (await ask(session, server, body(count), tally)).images:
                await asyncio.sleep(0.2)

    async with client() as session:
        jobs: list[Awaitable[Any]] = [one(session) for _ in range(clients)]
        await asyncio.gather(*jobs, *([meanwhile] if meanwhile else []))


async def one_by_one(server: Server, body: Callable[[int], Body], seconds: float) -> list[float]:
    """Seconds of single requests, one after the other.

    Raises:
        ValueError: one failed.
    """
    tally, end = Tally(), time.monotonic() + seconds
    async with client() as session:
        while time.monotonic() < end or len(tally.answers) < 5:
            if not (await ask(session, server, body(len(tally.answers)), tally)).images:
                raise ValueError(f"a single request failed: {tally.report()}")
    return [a.seconds for a in tally.answers][2:]
