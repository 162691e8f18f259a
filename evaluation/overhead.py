"""What Ray costs: the same training on the same workers with Ray (Data, Train, reports), and in plain torch.distributed.

    python evaluation/overhead.py     # 2 workers, 10 rounds of 60 steps, a quarter of an hour; on an otherwise quiet machine

Both sides read the same encoded latents, build the same state, make the same step (`hypersd_ray/training`), write the same logs and
as many checkpoints to the same disk, on gloo and the CPU, one thread a worker. The plain side reads its rows before it begins, so
that it pays nothing for data, and tells nobody of its checkpoints. What counts of a round is the wall clock from the first step in
the logs, the tenth, to the last, by the logs' own times: all that lies between is in it. Rounds are short and begin with either side
in turn; the ratio is the median of the rounds', with the 95% bootstrap interval of that median. `--workers 1` and `4` show how the
step grows with workers, for `--plan`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import numpy as np
import pyarrow.parquet as pq
import ray.data  # noqa: F401  it tells pyarrow of the latents' type of column
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypersd_ray.config.base import Strict
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

LOG_EVERY = 10
"""Steps. The first that is logged is past those in which a process is still starting."""


class OverheadConfig(Strict):
    """The two sides."""

    workers: int = Field(default=2, ge=1)
    """On each side; the machine should have a free core for each."""
    steps: int = Field(default=60, ge=3 * LOG_EVERY)
    """Of a round, on each side."""
    rounds: int = Field(default=10, ge=1)
    """Of both sides in turn."""
    batch: int = Field(default=32, ge=1)
    """Images of a step over all workers."""
    checkpoint_every: int = Field(default=25, ge=1)
    """Steps between checkpoints, on each side; Ray's reports come with them."""
    out: Path = Path("runs/overhead.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Report:
    """Seconds of a step, a number a round."""

    settings: dict[str, Any]
    ray: list[float]
    plain: list[float]

    @property
    def quotients(self) -> list[float]:
        """Ray's seconds by the plain ones, a number a round."""
        return [a / b for a, b in zip(self.ray, self.plain, strict=True)]


def median_interval(values: list[float], resamples: int = 4000) -> tuple[float, float, float]:
    """The median of `values`, and the ends of its 95% percentile bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return statistics.median(values), float(low), float(high)


def run_config(config: OverheadConfig, folder: Path, name: str, shards: str) -> TSCDConfig:
    """The embedded model's last stage, k = 1, on encoded latents."""
    base = RECIPES["tiny"]("minutes")
    return base.model_copy(update={
        "data": base.data.model_copy(update={"shards": shards, "cache": "none"}),
        "distill": base.distill.model_copy(update={"k_list": (1,), "n_list": (40,), "steps_list": (config.steps,)}),
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


def seconds_a_step(config: TSCDConfig) -> float:
    """Wall clock between the first and the last step in the run's logs, by the number of steps between them."""
    events = EventAccumulator(f"{storage.run_folder(config.run)}/tensorboard")
    first, *_, last = events.Reload().Scalars("loss")
    return (last.wall_time - first.wall_time) / (last.step - first.step)


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
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // run.workers))
    if run.workers > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=run.workers)
    kind, device = KINDS["tscd"], torch.device("cpu")
    state, batches = kind.build(config, Place(device, rank)), read_rows(config, rank)
    loggers = Loggers(config) if rank == 0 else None
    for step in range(1, config.stage_steps[0] + 1):
        metrics = state.step(kind.batch(batches[step % len(batches)], device))
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


def measure(config: OverheadConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """Both sides in turn."""
    from hypersd_ray.trainer.run import train

    report = Report(config.model_dump(mode="json") | {"torch": torch.__version__}, [], [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = encode(folder / "latents")
        for turn in range(config.rounds):
            sides: list[tuple[str, Callable[[TSCDConfig], object], list[float]]] = [
                ("ray", train, report.ray),
                ("plain", plain, report.plain),
            ]
            for name, side, found in sides[
                :: -1 if turn % 2 else 1
            ]:  # what slows the machine down meanwhile slows both
                of_side = run_config(config, folder, f"{name}-{turn}", shards)
                side(of_side)
                found.append(seconds_a_step(of_side))
            log(f"round {turn + 1}: Ray {report.ray[-1]:.4f} s a step, plain {report.plain[-1]:.4f} s")
    return report


def main() -> None:
    """Measure, say, write."""
    config = read_options(OverheadConfig, sys.argv[1:], __doc__ or "", OverheadConfig())
    report = measure(config, log=lambda line: print(line, file=sys.stderr, flush=True))
    ratio, low, high = median_interval(report.quotients)
    print(
        f"{config.workers} workers, batch {config.batch}: Ray {statistics.median(report.ray):.4f} s a step, plain "
        f"{statistics.median(report.plain):.4f} s; ratio {ratio:.3f} [{low:.3f}, {high:.3f}] "
        f"({config.rounds} rounds, {min(report.quotients):.3f} to {max(report.quotients):.3f})"
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(asdict(report) | {"ratio": ratio, "interval": [low, high]}, indent=1) + "\n")


if __name__ == "__main__":
    run_job(main)
