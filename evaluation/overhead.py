"""What Ray costs: the same training on the same workers with Ray (Data, Train, reports), and in plain torch.distributed.

    python evaluation/overhead.py     # 2 workers, 30 turns of 12 s for each side, a quarter of an hour; on an otherwise quiet machine

Both sides read the same encoded latents, build the same state, make the same step (`hypersd_ray/training`), write the same logs and
as many checkpoints to the same disk, on gloo and the CPU, one thread a worker. The plain side reads its rows before it begins, so
that it pays nothing for data, and tells nobody of its checkpoints.

A machine's speed drifts by more than Ray costs. Both sides are therefore alive all the time and take short turns: while one steps,
all of the other's processes are frozen (SIGSTOP). A turn's seconds by the steps made in it, from the times of the logs, are all in:
data, reports, logs, checkpoints and what Ray's own processes take from the cores. What is said is the median of the quotients of
neighbouring turns, with its 95% bootstrap interval. On two cores `--workers 1` leaves Ray one, where
`--workers 2` fills both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray.data  # noqa: F401  it tells pyarrow of the latents' type of column
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.bootstrap import Interval, percentiles
from evaluation.output import progress, save_report
from hypersd_ray.config.base import RunError, Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.sources import find_shards
from hypersd_ray.recipes import RECIPES
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds import KINDS
from hypersd_ray.trainer.kinds.base import Place
from hypersd_ray.trainer.local import free_port
from hypersd_ray.trainer.logs import Loggers
from hypersd_ray.training.checkpoint import save_checkpoint
from hypersd_ray.training.tscd import Batch

LOG_EVERY = 5
"""Steps between logs: a turn holds several."""
WARM = 20
"""Steps that a side makes before its first turn, so that no process is still starting."""


class OverheadConfig(Strict):
    """The two sides."""

    workers: int = Field(default=2, ge=1)
    """On each side; more than the machine has cores tells nothing of Ray."""
    turns: int = Field(default=30, ge=2)
    """Of each side."""
    turn_s: float = Field(default=12.0, gt=0)
    """Seconds of a turn; some checkpoints should fall into one."""
    batch: int = Field(default=32, ge=1)
    """Images of a step over all workers."""
    checkpoint_every: int = Field(default=25, ge=1)
    """Steps between checkpoints, on each side; Ray's reports come with them."""
    out: Path = Path("runs/overhead.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Report:
    """Seconds of a step, a number a turn, and whose they were."""

    settings: dict[str, Any]
    ray: list[float]
    plain: list[float]
    ray_cores: dict[str, float] = field(default_factory=dict)
    """How much of a core each kind of process took in its side's turns: see `Side.cores`."""
    plain_cores: dict[str, float] = field(default_factory=dict)

    @property
    def quotients(self) -> list[float]:
        """Ray's seconds by the plain ones, a number a pair of turns."""
        return [a / b for a, b in zip(self.ray, self.plain, strict=True)]


def median_interval(values: list[float], resamples: int = 4000) -> Interval:
    """The median of `values` and its 95% percentile bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    return percentiles(statistics.median(values), torch.from_numpy(np.median(drawn, axis=1)))


def run_config(config: OverheadConfig, folder: Path, name: str, shards: str) -> TSCDConfig:
    """The embedded model's last stage, k = 1, on encoded latents."""
    base = RECIPES["tiny"]("minutes")
    return base.model_copy(update={
        "data": base.data.model_copy(update={"shards": shards, "cache": "none"}),
        "distill": base.distill.model_copy(update={"k_list": (1,), "n_list": (40,), "steps_list": (10**6,)}),
        "optim": base.optim.model_copy(update={"batch": config.batch, "warmup": 0}),
        "run": base.run.model_copy(update={
            "name": name, "out": str(folder), "workers": config.workers, "checkpoint_every": config.checkpoint_every,
            "log_every": LOG_EVERY, "grids_every": 0, "loggers": ("tensorboard",), "prompts": base.run.prompts[:1],
        }),
    })  # fmt: skip


def encode(folder: Path) -> str:
    """The embedded data as latents, once."""
    from hypersd_ray.data.precompute import precompute
    from hypersd_ray.trainer.run import connect

    base = RECIPES["tiny"]("minutes")
    connect()
    precompute(base.data, base.teacher, str(folder))
    return str(folder)


@dataclass(frozen=True)
class Logged:
    """When a step was logged, by the clock."""

    time: float
    step: int


def logged(config: TSCDConfig) -> list[Logged]:
    """What a run has in its logs by now."""
    folder = f"{storage.run_folder(config.run)}/tensorboard"
    if not os.path.isdir(folder):
        return []
    events = EventAccumulator(folder).Reload()
    return [Logged(e.wall_time, e.step) for e in events.Scalars("loss")] if "loss" in events.Tags()["scalars"] else []


def seconds_a_step(logs: Sequence[Logged], turns: Sequence[tuple[float, float]]) -> list[float]:
    """Of each turn (begin, end, by the clock) that lies within the logs; between turns the run stood still.

    A step that was begun in one turn and ended in a later one is shared out by the time that each gave it.
    """
    begins, ends = np.array([b for b, _ in turns]), np.array([e for _, e in turns])

    def moved(time: float) -> float:  # seconds until `time` in which the run was not still
        return float(np.clip(time - begins, 0, ends - begins).sum())

    times, steps = [moved(entry.time) for entry in logs], [entry.step for entry in logs]
    found = []
    for begin, end in turns:
        if logs[0].time <= begin and end <= logs[-1].time:
            made = np.interp([moved(begin), moved(end)], times, steps)
            found.append((end - begin) / float(made[1] - made[0]))
    return found


def read_rows(config: TSCDConfig, rank: int) -> list[dict[str, Any]]:
    """Batches of one rank from its share of the files, without Ray; as many as there are whole ones."""
    share = config.optim.batch // config.run.workers
    tables = [pq.read_table(url.removeprefix("file://")) for url in find_shards(config.data.patterns, "latents").urls]
    columns: dict[str, np.ndarray] = {}
    for name in [*TENSOR_COLUMNS, "key", "caption"]:
        if name in tables[0].column_names:
            parts = [t.column(name).combine_chunks() for t in tables]
            arrays = [
                p.to_numpy_ndarray() if hasattr(p, "to_numpy_ndarray") else np.array(p.to_pylist(), object)
                for p in parts
            ]
            columns[name] = np.concatenate(arrays)[rank :: config.run.workers]
    rows = len(columns["key"]) // share
    return [
        {n: torch.from_numpy(c[i * share : (i + 1) * share].copy()) if n in TENSOR_COLUMNS else c[i * share : (i + 1) * share].tolist()
         for n, c in columns.items()}
        for i in range(rows)
    ]  # fmt: skip


def _plain_worker(rank: int, config: TSCDConfig, port: int) -> None:
    run = config.run
    torch.set_num_threads(1)
    if run.workers > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=run.workers)
    kind, device = KINDS["tscd"], torch.device("cpu")
    state, batches = kind.build(config, Place(device, rank)), read_rows(config, rank)
    loggers = Loggers(config) if rank == 0 else None
    for step in range(1, config.stage_steps[0] + 1):
        metrics = state.step(Batch.from_rows(batches[step % len(batches)], device))
        if loggers is not None and step % run.log_every == 0:
            loggers.scalars(step, {name: float(value) for name, value in metrics.items()})
        if step % run.checkpoint_every == 0:
            with tempfile.TemporaryDirectory() as temporary:
                save_checkpoint(Path(temporary), state, rank, run.workers)
                if rank == 0:
                    shutil.copytree(temporary, f"{storage.run_folder(run)}/checkpoint_{step}")
            if run.workers > 1:
                dist.barrier()
    if loggers is not None:
        loggers.close()
    if run.workers > 1:
        dist.destroy_process_group()


def plain(config: TSCDConfig) -> None:
    """The run as so many processes in one gloo group."""
    mp.spawn(_plain_worker, (config, free_port()), nprocs=config.run.workers)


def under_ray(config: TSCDConfig) -> None:
    """The run as `jobs/tscd.py` makes it."""
    from hypersd_ray.trainer.run import train

    # So that a worker has one thread: as if other runs had the rest of the machine.
    train(config, runs_per_node=max(1, len(os.sched_getaffinity(0)) // config.run.workers))


class Side:
    """A run in a process of its own, which can stand still with all that it has started."""

    def __init__(self, run: Callable[[TSCDConfig], None], config: TSCDConfig) -> None:
        self.config = config
        self.turns: list[tuple[float, float]] = []
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.before: dict[int, float] = {}
        self.process = mp.get_context("spawn").Process(target=run, args=(config,))
        self.process.start()
        self.begun = time.time()

    def _tree(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def freeze(self) -> None:
        """Until `thaw`; ends a turn."""
        still: set[int] = set()
        while new := [process for process in self._tree() if process.pid not in still]:  # one may have started another
            for process in new:
                still.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
        self.turns.append((self.begun, time.time()))
        for pid, (name, seconds) in self._seconds().items():
            self.busy[name] += seconds - self.before.get(pid, 0.0)

    def _seconds(self) -> dict[int, tuple[str, float]]:
        """Each process's name and CPU time until now."""
        found = {}
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times, words = process.cpu_times(), process.cmdline()
                # Ray names its workers in the first word, `python -u .../log_monitor.py` itself in the third.
                path = next((word for word in words if word.endswith(".py")), words[0] if words else process.name())
                found[process.pid] = (path if path.startswith("ray::") else Path(path).name, times.user + times.system)
        return found

    def cores(self) -> dict[str, float]:
        """How much of a core the processes of each name took while it ran, the greatest first."""
        ran = sum(end - begin for begin, end in self.turns)
        return {name: round(self.busy[name] / ran, 4) for name in sorted(self.busy, key=lambda n: -self.busy[n])}

    def thaw(self) -> None:
        """A turn begins."""
        self.before = {pid: seconds for pid, (_, seconds) in self._seconds().items()}
        self.begun = time.time()
        for process in reversed(self._tree()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def wait_warm(self) -> None:
        """Return when `WARM` steps are in the logs.

        Raises:
            RunError: the run ended before.
        """
        while not (logs := logged(self.config)) or logs[-1].step < WARM:
            self.check()
            time.sleep(1.0)

    def check(self) -> None:
        """Raises RunError if the run has ended."""
        if not self.process.is_alive():
            raise RunError(f"{self.config.run.name}: the run ended before it was measured; its lines are above")

    def end(self) -> None:
        """Of all of its processes."""
        for process in self._tree() if self.process.is_alive() else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.join()


def measure(config: OverheadConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """Both sides in turn.

    Raises:
        RunError: one of them ended.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoding = mp.get_context("spawn").Process(target=encode, args=(folder / "latents",))  # its Ray ends with it
        encoding.start()
        encoding.join()
        shards, sides = str(folder / "latents"), []
        try:
            for name, run in (("ray", under_ray), ("plain", plain)):
                sides.append(Side(run, run_config(config, folder, name, shards)))
            for side in sides:
                side.wait_warm()
            for side in sides:
                side.freeze()
                side.turns.clear()  # until now it was warming up
                side.busy.clear()
            for turn in range(config.turns + 1):  # the last one's steps may not be in the logs
                for side in sides[:: -1 if turn % 2 else 1]:
                    side.thaw()
                    time.sleep(config.turn_s)
                    side.freeze()
                    side.check()
                log(f"turn {turn + 1} of {config.turns + 1}")
        finally:
            for side in sides:
                side.end()
        found = [seconds_a_step(logged(side.config), side.turns)[: config.turns] for side in sides]
    turns = min(map(len, found))
    settings = config.model_dump(mode="json") | {"torch": torch.__version__}
    return Report(settings, found[0][:turns], found[1][:turns], sides[0].cores(), sides[1].cores())


def main() -> None:
    """Measure, say, write."""
    config = read_options(OverheadConfig, sys.argv[1:], __doc__ or "", OverheadConfig())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the runs would be left, frozen
    report = measure(config, log=progress)
    ratio = median_interval(report.quotients)
    print(
        f"{config.workers} workers, batch {config.batch}: Ray {statistics.median(report.ray):.4f} s a step, plain "
        f"{statistics.median(report.plain):.4f} s; ratio {ratio:.3f} "
        f"({len(report.ray)} turns, {min(report.quotients):.3f} to {max(report.quotients):.3f})"
    )
    workers, all_of_ray = report.ray_cores.get("ray::RayTrainWorker", 0.0), sum(report.ray_cores.values())
    print(
        f"cores: workers {workers:.2f} and Ray's other processes {all_of_ray - workers:.3f}, "
        f"plain {sum(report.plain_cores.values()):.2f}"
    )
    save_report(config.out, asdict(report) | {"ratio": ratio.mean, "interval": [ratio.low, ratio.high]})


if __name__ == "__main__":
    run_job(main)
