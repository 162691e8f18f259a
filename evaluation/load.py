"""The application under load, beside a bare loop of the same engine.

    python evaluation/load.py throughput --model wide     # saturation against the bare loop; a single request's time
    python evaluation/load.py soak --minutes 10           # 1.5 times capacity: answers, times, queue, memory
    python evaluation/load.py kill                        # a replica killed under load

Each starts its own server (`serve run`, its own port and Ray cluster) and ends it. The bare loop is `Engine.run` on the
same batch in a process of its own, with the same number of threads as the replica; rounds of bare and served alternate.
`wide` is a UNet with random weights whose batches take 200 ms and more on a CPU core; `embedded` is the committed model.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import tyro
from pydantic import Field

from evaluation.bareloop import PROMPT, Bare, bare, run_bare
from evaluation.clients import Body, Tally, ask, client, keep_busy, one_by_one
from evaluation.output import save_report
from evaluation.serving import MEMORY, Server, running, settings_of
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job

LONG_BATCH = 0.2
"""Seconds of a batch from which the served share of the bare loop's rate is judged."""


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
    threads: int = Field(default=1, ge=1)
    """OMP_NUM_THREADS of the bare loop and of every process of the server."""
    seconds: float = Field(default=30.0, gt=0)
    """How long each part is measured, after a warm-up."""
    out: Path = Path("runs/load.json")
    """The JSON file that is written."""

    def body(self, i: int) -> Body:
        """Request `i`."""
        return {"prompt": PROMPT, "seed": i * self.images, "n": self.images, "num_inference_steps": self.steps}


class Throughput(Load):
    """Images per second at saturation, and the time of a single request, beside the bare loop's."""

    clients: int = Field(default=32, ge=1)
    """Requests kept in flight."""
    rounds: int = Field(default=3, ge=1)
    """Rounds of the bare loop and the server in turn; the median of their ratios counts."""
    restart: bool = False
    """A server of its own for each round, none while the bare loop runs; else one server, idle meanwhile."""


class Soak(Load):
    """Requests at a fixed rate above capacity: none lost, none wrong, queue bounded, memory flat."""

    model: Literal["embedded", "wide"] = "embedded"
    """The committed model, or a wide UNet with random weights."""
    mix: bool = True
    """Every LoRA and none, 1 to 8 steps, streams with previews, URLs, file formats, in turn; else `steps` alone."""
    minutes: float = Field(default=10.0, gt=0)
    """How long."""
    factor: float = Field(default=1.5, gt=0)
    """Arrivals, as a multiple of the capacity measured just before."""
    queued: int = Field(default=32, ge=0)
    """limits.queued of the server."""
    hot_loras: int = Field(default=2, ge=1)
    """denoiser.hot_loras of the server; fewer than there are, so that some are read anew all the time."""

    def mixed(self, loras: list[str]) -> Callable[[int], Body]:
        """The requests: each combination of LoRA, steps and way of answering in turn."""
        if not self.mix:
            return self.body
        ways: list[Body] = [
            {}, {"stream": True, "partial_images": 2}, {"response_format": "url"}, {"n": 2, "output_format": "webp"},
        ]  # fmt: skip
        turns = list(itertools.product(ways, (1, 2, 4, 8), [*loras, "none"]))
        # a stride without a common divisor visits all of them, and neighbours differ in everything
        stride = next(s for s in itertools.count(7) if math.gcd(s, len(turns)) == 1)

        def body(i: int) -> Body:
            way, steps, lora = turns[i * stride % len(turns)]
            return {"prompt": PROMPT, "seed": 8 * i, "num_inference_steps": steps, "lora": lora} | way

        return body


class Kill(Load):
    """One of two replicas killed under load."""

    clients: int = Field(default=16, ge=1)
    """Requests kept in flight."""
    after: float = Field(default=90.0, gt=0)
    """Seconds of load after the kill."""
    window: float = Field(default=10.0, gt=0)
    """Seconds over which a rate is taken after the kill."""


# ------------------------------------------------------------------------------------------------- throughput
def throughput(load: Throughput, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saturation and single requests, beside the bare loop, in alternating rounds."""
    rounds = [_round(load, alone, server) for alone, server in _rounds(load, args, folder)]
    middle = lambda name: statistics.median(one[name] for one in rounds)
    batch_s = statistics.median(one["bare"]["batch_s"] for one in rounds)
    result = {name: middle(name) for name in ("share_of_bare", "images_per_s", "mean_batch_size", "single_added_ms")}
    result |= {"bare_batch_s": batch_s, "long_batches": batch_s >= LONG_BATCH}
    if load.model == "wide" and batch_s < LONG_BATCH:
        result["note"] = (
            f"NOT WHAT IS ASKED FOR: a batch of the wide model takes {batch_s:.3f} s, less than {LONG_BATCH} s; "
            "raise --width"
        )
    return result | {"rounds": rounds}


def _rounds(load: Throughput, args: dict[str, Any], folder: Path) -> Iterator[tuple[dict[str, Any], Server]]:
    """The bare loop's figures, then a server, `load.rounds` times."""

    def alone() -> dict[str, Any]:
        return run_bare(Path(__file__).resolve(), args, load.steps, load.max_batch, load.seconds / 2, load.threads)

    if load.restart:
        for _ in range(load.rounds):
            figures = alone()
            with running(args, folder, load.threads) as server:
                yield figures, server
    else:
        with running(args, folder, load.threads) as server:
            for _ in range(load.rounds):
                yield alone(), server


def _round(load: Throughput, alone: dict[str, Any], server: Server) -> dict[str, Any]:
    single = statistics.median(asyncio.run(one_by_one(server, load.body, load.seconds / 2)))
    tally, batch_s = Tally(), alone["batch_s"]
    begin = time.monotonic() + max(3 * batch_s, min(10.0, load.seconds / 2))
    end = begin + max(load.seconds, 20 * batch_s)
    asyncio.run(keep_busy(server, load.body, load.clients, tally, lambda: time.monotonic() >= end))
    served = tally.rate_of_batches(begin, end, batch_s)
    return {
        "bare": alone,
        "images_per_s": served,
        "share_of_bare": served / alone["images_per_s"],
        "mean_batch_size": tally.batch_size(begin, end),
        "single_s": single,
        "single_added_ms": 1000 * (single - alone["single_s"]),
        "replica_threads": server.environment("Denoiser", "OMP_NUM_THREADS"),
        **tally.report(),
    }


# ------------------------------------------------------------------------------------------------------- soak
def soak(load: Soak, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """See `_soak`."""
    with running(args, folder, load.threads) as server:
        return asyncio.run(_soak(load, server))


async def _soak(load: Soak, server: Server) -> dict[str, Any]:
    """Capacity first, then arrivals at `factor` times it; memory and queues now and then."""
    async with client() as session, session.get(f"{server.url}/v1/models") as answer:
        names = [model.get("lora") for model in (await answer.json())["data"]]
    body = load.mixed([name for name in names if name and name != "none"])
    warm, begun = Tally(), time.monotonic()
    await keep_busy(server, body, load.queued or 1, warm, lambda: time.monotonic() >= begun + 30)
    capacity = len(warm.good(begun + 10, begun + 30)) / 20
    if not capacity:
        raise ValueError(f"nothing was answered while capacity was measured: {warm.report()}")
    rate, tally, watch = capacity * load.factor, Tally(), _Watch(server)
    begun, processes = time.monotonic(), server.processes()
    end, count = begun + 60 * load.minutes, 0
    watching = asyncio.create_task(watch.until(end))
    async with client() as session, asyncio.TaskGroup() as group:
        while time.monotonic() < end:
            group.create_task(ask(session, server, body(count), tally))
            count += 1
            await asyncio.sleep(max(0.0, begun + count / rate - time.monotonic()))
    await watching
    after = server.processes()
    return {
        "capacity_requests_per_s": capacity, "sent": count, **tally.report(), "queues_most": watch.queues,
        "restarted": {kind: after.get(kind) != pids for kind, pids in processes.items()},
        "processes": {"start": processes, "end": after},
        "memory_counted": MEMORY, "growth": growth(watch.memory),
        "megabytes": {name: {k: round(v / 2**20, 1) for k, v in row.items()}
                      for name, row in (("start", watch.memory[0]), ("end", watch.memory[-1]))},
        "megabytes_each_minute": [round(sum(row.values()) / 2**20) for row in watch.memory[:: round(60 / WATCH_S)]],
        "errors_of_the_watch": watch.errors,
    }  # fmt: skip


WATCH_S = 2


class _Watch:
    """Memory and queue lengths of a server, every WATCH_S seconds."""

    def __init__(self, server: Server):
        self.server = server
        self.memory: list[dict[str, int]] = []
        self.queues: dict[str, float] = {}
        self.errors: list[str] = []

    async def until(self, end: float) -> None:
        """Look until a time; what cannot be read is noted, and ends nothing."""
        while time.monotonic() < end:
            self.memory.append(await asyncio.to_thread(self.server.memory))
            try:
                for name, value in (await asyncio.to_thread(self.server.gauges)).items():
                    self.queues[name] = max(value, self.queues.get(name, 0.0))
            except (OSError, ValueError) as error:
                self.errors = [*self.errors[-4:], f"{type(error).__name__}: {error}"]
            await asyncio.sleep(WATCH_S)


def growth(memory: list[dict[str, int]]) -> dict[str, float]:
    """Memory of the last fifth over that of the fifth after the first, minus one, in all and by process kind."""
    fifth = max(1, len(memory) // 5)
    early, late = memory[fifth : 2 * fifth] or memory[:1], memory[-fifth:]
    mean = lambda rows, kind: statistics.mean(sum(row.values()) if kind == "all" else row.get(kind, 0) for row in rows)
    kinds = ["all", *sorted({kind for row in memory for kind in row})]
    return {kind: mean(late, kind) / max(1.0, mean(early, kind)) - 1 for kind in kinds}


# ------------------------------------------------------------------------------------------------------- kill
def kill(load: Kill, args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Failed requests, how long the new replica took to start, and how long the rate of before took to come back."""
    with running(args, folder, load.threads) as server:
        return asyncio.run(_kill(load, server))


async def _kill(load: Kill, server: Server) -> dict[str, Any]:
    await server.until_running(2, 600)
    tally, began = Tally(), time.monotonic()
    killed, start_s, flying, done = 0.0, None, 0, False

    async def shoot() -> None:
        nonlocal killed, start_s, flying, done
        await asyncio.sleep(load.seconds)
        old = server.replicas("Denoiser")
        flying, killed = tally.in_flight, time.monotonic()
        os.kill(old[0], signal.SIGKILL)
        try:
            start_s = await server.until_running(2, load.after, beside=old)
        except ValueError:
            start_s = None
        await asyncio.sleep(max(0.0, killed + load.after - time.monotonic()))
        done = True

    await keep_busy(server, load.body, load.clients, tally, lambda: done, shoot())
    before = tally.rate(began + load.seconds / 2, killed)
    rates = [(at, tally.rate(killed + at, killed + at + load.window)) for at in _starts(load.after - load.window)]
    return {
        "images_per_s_before": before,
        "least_after": min(rate for _, rate in rates),
        "replica_started_after_s": start_s,
        "back_to_95_percent_after_s": back(rates, 0.95 * before),
        "in_flight_at_the_kill_on_both_replicas": flying,
        "failed_within_5_s_of_the_kill": sum(not a.images and 0 <= a.when - killed < 5 for a in tally.answers),
        **tally.report(),
    }


def _starts(seconds: float) -> list[float]:
    return [0.5 * i for i in range(max(1, int(2 * seconds)))]


def back(rates: list[tuple[float, float]], wanted: float) -> float | None:
    """Seconds to the first window, from the slowest one on, after which the mean rate is `wanted`; None where it never is."""
    slowest = min(range(len(rates)), key=lambda i: rates[i][1])
    for i in range(slowest, len(rates)):
        at, rate = rates[i]
        if rate >= wanted and statistics.mean(later for _, later in rates[i:]) >= wanted:
            return at
    return None


# ------------------------------------------------------------------------------------------------------- main
MEASURES: dict[type[Load], Callable[..., dict[str, Any]]] = {Throughput: throughput, Soak: soak, Kill: kill}
Command = (
    Annotated[Throughput, tyro.conf.subcommand("throughput")]
    | Annotated[Soak, tyro.conf.subcommand("soak")]
    | Annotated[Kill, tyro.conf.subcommand("kill")]
    | Annotated[Bare, tyro.conf.subcommand("bare")]
)


def main() -> None:
    """Measure, print, write the JSON file."""
    config: Command = read_options(Command, sys.argv[1:], __doc__ or "")
    if isinstance(config, Bare):
        bare(config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        queued = config.queued if isinstance(config, Soak) else getattr(config, "clients", 0)
        replicas = 2 if isinstance(config, Kill) else 1
        args = settings_of(config.model, folder, config.width, config.max_batch, queued, replicas)
        if isinstance(config, Soak):
            args["denoiser"]["hot_loras"] = config.hot_loras
        result = MEASURES[type(config)](config, args, folder)
    machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    report = {"measure": type(config).__name__.lower(), "settings": config.model_dump(mode="json")} | machine | result
    print(json.dumps(report, indent=1))
    save_report(config.out, report)


if __name__ == "__main__":
    run_job(main)
