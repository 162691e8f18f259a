"""The application under load, beside a bare loop of the same engine.

    python evaluation/load.py throughput --model wide     # saturation against the bare loop; a single request's time
    python evaluation/load.py soak --minutes 10           # 1.5 times capacity: answers, times, memory
    python evaluation/load.py kill                        # a replica killed under load

Each starts its own server (`serve run`, its own port and Ray cluster) and ends it. The bare loop runs in a process of
its own, before the server: `Engine.run` on the same batch, nothing else. `wide` is a UNet with random weights whose
batches take 200 ms and more on a CPU core; `embedded` is the committed model.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import aiohttp
import tyro
from pydantic import Field

from evaluation.serving import Server, running, settings_of
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import run_job

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a noto penguin on a yellow background"


class Load(Strict):
    """What is served, and what is asked of it."""

    model: Literal["embedded", "wide"] = "wide"
    """The committed model, or a wide UNet with random weights."""
    width: int = Field(default=192, ge=16, multiple_of=16)
    """wide: channels of the UNet's first level."""
    steps: int = Field(default=1, ge=1, le=8)
    """Sampling steps of every request."""
    max_batch: int = Field(default=8, ge=1)
    """Images of a batch."""
    images: int = Field(default=1, ge=1)
    """Images of a request."""
    seconds: float = Field(default=30.0, gt=0)
    """How long each part is measured, after a warm-up."""
    out: Path = Path("runs/load.json")
    """The JSON file that is written."""


class Throughput(Load):
    """Images per second at saturation, and the time of a single request, beside the bare loop's."""

    clients: int = Field(default=32, ge=1)
    """Requests kept in flight."""


class Soak(Load):
    """Requests at a fixed rate above capacity: none lost, none wrong, memory flat."""

    minutes: float = Field(default=10.0, gt=0)
    """How long."""
    factor: float = Field(default=1.5, gt=0)
    """Arrivals, as a multiple of the capacity measured just before."""
    queued: int = Field(default=32, ge=0)
    """limits.queued of the server."""


class Kill(Load):
    """One of two replicas killed under load."""

    clients: int = Field(default=16, ge=1)
    """Requests kept in flight."""
    after: float = Field(default=60.0, gt=0)
    """Seconds of load after the kill."""


@dataclass
class Tally:
    """Answers as they came: (when, status, seconds, images)."""

    answers: list[tuple[float, int, float, int]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def statuses(self) -> dict[int, int]:
        """How many of each."""
        return dict(Counter(status for _, status, _, _ in self.answers))

    def rate(self, begin: float, end: float) -> float:
        """Images per second of the answers between two times."""
        return sum(n for when, status, _, n in self.answers if status == 200 and begin <= when < end) / (end - begin)

    def times(self) -> dict[str, float]:
        """Percentiles of the seconds of what was answered with images."""
        good = sorted(seconds for _, status, seconds, _ in self.answers if status == 200)
        return {f"p{p}": good[min(len(good) - 1, int(p / 100 * len(good)))] for p in (50, 95, 99)} if good else {}


async def ask(session: aiohttp.ClientSession, server: Server, load: Load, seed: int, tally: Tally) -> int:
    """One request; its status (0 where there was no answer)."""
    body = {"prompt": PROMPT, "seed": seed, "n": load.images, "num_inference_steps": load.steps}
    begun = time.monotonic()
    try:
        async with session.post(f"{server.url}/v1/images/generations", json=body) as answer:
            content, status = await answer.json(), answer.status
            if status == 200:
                assert [image["seed"] for image in content["data"]] == [seed + i for i in range(load.images)]
            elif status != 429:
                tally.errors[content["error"]["message"]] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        tally.errors[type(error).__name__] += 1
        status = 0
    now = time.monotonic()
    tally.answers.append((now, status, now - begun, load.images))
    return status


def client() -> aiohttp.ClientSession:
    """As many connections as are asked for."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))


async def keep_busy(
    server: Server, load: Load, clients: int, tally: Tally, until: float, meanwhile: Awaitable[Any] | None = None
) -> None:
    """`clients` requests in flight until a time; each client sends its next one as soon as it is answered."""

    async def one(session: aiohttp.ClientSession, first: int) -> None:
        seed = first
        while time.monotonic() < until:
            if await ask(session, server, load, seed, tally) != 200:
                await asyncio.sleep(0.2)
            seed += load.images

    async with client() as session:
        jobs: list[Awaitable[Any]] = [one(session, 1_000_000 * i) for i in range(clients)]
        await asyncio.gather(*jobs, *([meanwhile] if meanwhile else []))


async def one_by_one(server: Server, load: Load, seconds: float) -> list[float]:
    """Seconds of single requests, one after the other."""
    tally = Tally()
    async with client() as session:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(tally.answers) < 5:
            assert await ask(session, server, load, len(tally.answers), tally) == 200, tally.errors
    return [seconds for _, _, seconds, _ in tally.answers][2:]


# ------------------------------------------------------------------------------------------ the bare loop
class Bare(Strict):
    """`Engine.run` in a loop, in this process; what `throughput` starts. Prints one line of JSON."""

    args: str
    """Settings of the application, as JSON."""
    steps: int
    """Sampling steps."""
    batch: int
    """Images of a batch."""
    seconds: float
    """How long each of the two parts takes."""


def bare(config: Bare) -> None:
    """Images per second in batches of `batch`, and seconds of one image alone."""
    from serve.discovery import read_catalog
    from serve.engine import Engine
    from serve.settings import NO_LORA, Settings
    from serve.work import BatchKey, Shot

    settings = Settings.model_validate(json.loads(config.args))
    catalog = read_catalog(settings.model)
    engine = Engine(settings.model, catalog)
    name = catalog.choose(config.steps)
    lora = None if name == NO_LORA else engine.load_lora(name)
    width, height = map(int, catalog.sizes[0].split("x"))
    key = BatchKey(width, height, config.steps, 0.0, name, 1.0, False)

    def seconds_of(batch: int) -> list[float]:
        taken: list[float] = []
        end = time.monotonic() + config.seconds
        while time.monotonic() < end or len(taken) < 5:
            begun = time.monotonic()
            engine.run(key, [Shot(PROMPT, len(taken) * batch + i) for i in range(batch)], lora)
            taken.append(time.monotonic() - begun)
        return taken[2:]

    single, full = seconds_of(1), seconds_of(config.batch)
    print(
        json.dumps(
            {
                "single_s": statistics.median(single),
                "batch_s": statistics.median(full),
                "images_per_s": config.batch * len(full) / sum(full),
            }
        )
    )


def run_bare(load: Load, args: dict[str, Any]) -> dict[str, float]:
    """`bare` in a process of its own.

    Raises:
        ValueError: it failed; the line is its last.
    """
    command = [
        sys.executable, __file__, "bare", "--args", json.dumps(args), "--steps", str(load.steps),
        "--batch", str(load.max_batch), "--seconds", str(load.seconds / 2),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise ValueError(f"the bare loop failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------ the measurements
def throughput(load: Throughput, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saturation and single requests, beside the bare loop."""
    alone = run_bare(load, args)
    tally = Tally()
    with running(args, folder) as server:
        single = statistics.median(asyncio.run(one_by_one(server, load, load.seconds / 2)))
        begun = time.monotonic() + min(10.0, load.seconds / 2)
        asyncio.run(keep_busy(server, load, load.clients, tally, begun + load.seconds))
        served = tally.rate(begun, begun + load.seconds)
    return {
        "bare": alone,
        "images_per_s": served,
        "share_of_bare": served / alone["images_per_s"],
        "single_s": single,
        "single_added_ms": 1000 * (single - alone["single_s"]),
        "statuses": tally.statuses(),
        **tally.times(),
    }


async def _soak(load: Soak, server: Server) -> dict[str, Any]:
    """Capacity first, then arrivals at `factor` times it; memory every two seconds."""
    warm, begun = Tally(), time.monotonic()
    await keep_busy(server, load, load.queued, warm, begun + 20)
    capacity = warm.rate(begun + 5, begun + 20) / load.images
    rate, tally, memory = capacity * load.factor, Tally(), []
    begun = time.monotonic()
    end = begun + 60 * load.minutes
    async with client() as session:
        pending: set[asyncio.Task[int]] = set()
        count, watched = 0, begun
        while (now := time.monotonic()) < end:
            task = asyncio.create_task(ask(session, server, load, count * load.images, tally))
            pending.add(task)
            task.add_done_callback(pending.discard)
            count += 1
            if now >= watched:
                memory.append((now - begun, await asyncio.to_thread(server.memory)))
                watched += 2
            await asyncio.sleep(max(0.0, begun + count / rate - time.monotonic()))
        await asyncio.gather(*pending)
    return {
        "capacity_requests_per_s": capacity, "sent": count, "answered": len(tally.answers),
        "statuses": tally.statuses(), "errors": dict(tally.errors), **tally.times(), "growth": growth(memory),
    }  # fmt: skip


def growth(memory: list[tuple[float, dict[str, int]]]) -> dict[str, float]:
    """Memory of the last fifth over that of the fifth after the first, minus one, in all and by process kind."""
    fifth = max(1, len(memory) // 5)
    early, late = memory[fifth : 2 * fifth] or memory[:1], memory[-fifth:]
    mean = lambda rows, kind: statistics.mean(
        sum(row.values()) if kind == "all" else row.get(kind, 0) for _, row in rows
    )
    kinds = ["all", *sorted({kind for _, row in memory for kind in row})]
    return {kind: mean(late, kind) / max(1.0, mean(early, kind)) - 1 for kind in kinds}


def soak(load: Soak, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """See `_soak`."""
    with running(args, folder) as server:
        return asyncio.run(_soak(load, server))


def kill(load: Kill, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Failed requests, and how long it took to the rate of before."""
    tally, killed = Tally(), 0.0

    async def shoot(server: Server) -> None:
        nonlocal killed
        await asyncio.sleep(load.seconds)
        os.kill(server.replicas("Denoiser")[0], signal.SIGKILL)
        killed = time.monotonic()

    with running(args, folder) as server:
        begun = time.monotonic()
        asyncio.run(keep_busy(server, load, load.clients, tally, begun + load.seconds + load.after, shoot(server)))
    before = tally.rate(begun + load.seconds / 2, killed)
    window = 5.0
    starts = [killed + i * 0.5 for i in range(int(2 * (load.after - window)))]
    back = next((start - killed for start in starts if tally.rate(start, start + window) >= 0.95 * before), None)
    return {
        "images_per_s_before": before,
        "least_after": min(tally.rate(start, start + window) for start in starts),
        "back_to_95_percent_after_s": back,
        "statuses": tally.statuses(),
        "errors": dict(tally.errors),
        **tally.times(),
    }


MEASURES: dict[type[Load], Callable[..., dict[str, Any]]] = {Throughput: throughput, Soak: soak, Kill: kill}
Command = (
    Annotated[Throughput, tyro.conf.subcommand("throughput")]
    | Annotated[Soak, tyro.conf.subcommand("soak")]
    | Annotated[Kill, tyro.conf.subcommand("kill")]
    | Annotated[Bare, tyro.conf.subcommand("bare")]
)


def main() -> None:
    """Measure, print, write the JSON file."""
    config = tyro.cli(Command, description=__doc__)
    if isinstance(config, Bare):
        bare(config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clients = getattr(config, "clients", 0)
        queued = config.queued if isinstance(config, Soak) else clients
        replicas = 2 if isinstance(config, Kill) else 1
        args = settings_of(config.model, folder, config.width, config.max_batch, queued, replicas)
        result = MEASURES[type(config)](config, args, folder)
    machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    report = {"measure": type(config).__name__.lower(), "settings": config.model_dump(mode="json")} | machine | result
    print(json.dumps(report, indent=1))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_job(main)
