"""What Ray costs: the same training on the same workers with Ray (Data, Train, reports, logs), and in plain torch.distributed.

    python evaluation/overhead.py --workers 2 --steps 100 --rounds 5     # on an otherwise quiet machine

Both sides read the same encoded latents, build the same state and make the same step (`hypersd_ray/training`), on gloo and
the CPU, one thread a worker. The plain side reads its rows before it begins, so that it pays nothing for data. Rounds
alternate between the two; of each round the mean step after the first five counts; the ratio is the median of the rounds'.
`--workers 1` and `4` show how the step grows with workers, for `--plan`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.sources import find_shards
from hypersd_ray.recipes import RECIPES
from hypersd_ray.trainer.kinds import KINDS
from hypersd_ray.trainer.kinds.base import Place
from hypersd_ray.trainer.local import free_port
from hypersd_ray.trainer.loop import Stopwatch


class OverheadConfig(Strict):
    """The two sides."""

    workers: int = Field(default=2, ge=1)
    """On each side; the machine should have a free core for each."""
    steps: int = Field(default=100, ge=10)
    """Of a round, on each side."""
    rounds: int = Field(default=5, ge=1)
    """Of both sides in turn."""
    batch: int = Field(default=32, ge=1)
    """Images of a step over all workers."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Ray's side writes checkpoints as a run does; they are not in its steps' time (the training says so too)."""
    out: Path = Path("runs/overhead.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Report:
    """Mean seconds of a step, a number a round."""

    settings: dict[str, Any]
    ray: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        """Median of the rounds' quotients."""
        return statistics.median(a / b for a, b in zip(self.ray, self.plain, strict=True))


def run_config(config: OverheadConfig, folder: Path, name: str, shards: str) -> TSCDConfig:
    """The embedded model's last stage, k = 1, on encoded latents."""
    base = RECIPES["tiny"]("minutes")
    return base.model_copy(update={
        "data": base.data.model_copy(update={"shards": shards, "cache": "none"}),
        "distill": base.distill.model_copy(update={"k_list": (1,), "n_list": (40,), "steps_list": (config.steps,)}),
        "optim": base.optim.model_copy(update={"batch": config.batch, "warmup": 0}),
        "run": base.run.model_copy(update={
            "name": name, "out": str(folder), "workers": config.workers, "checkpoint_every": config.checkpoint_every,
            "prompts": base.run.prompts[:1],
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


def with_ray(config: TSCDConfig) -> float:
    """Mean seconds of a step, as the training itself counts them."""
    from hypersd_ray.trainer.run import train

    result = train(config)
    return result.metrics["train_seconds"] / (sum(config.stage_steps) - Stopwatch.WARMUP)


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


def _plain_worker(rank: int, config: TSCDConfig, port: int, answer: Path) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.run.workers))
    if config.run.workers > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=config.run.workers)
    kind, device = KINDS["tscd"], torch.device("cpu")
    state, batches = kind.build(config, Place(device, rank)), read_rows(config, rank)
    begun = time.perf_counter()
    for step in range(config.stage_steps[0]):
        if step == Stopwatch.WARMUP:
            begun = time.perf_counter()
        metrics = state.step(kind.batch(batches[step % len(batches)], device))
        if step % config.run.log_every == 0:
            {name: float(value) for name, value in metrics.items()}
    if rank == 0:
        answer.write_text(str((time.perf_counter() - begun) / (config.stage_steps[0] - Stopwatch.WARMUP)))
    if config.run.workers > 1:
        dist.destroy_process_group()


def plain(config: TSCDConfig) -> float:
    """Mean seconds of a step of as many processes in one gloo group."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "seconds"
        mp.spawn(_plain_worker, (config, free_port(), answer), nprocs=config.run.workers)
        return float(answer.read_text())


def measure(config: OverheadConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """Both sides in turn."""
    report = Report(config.model_dump(mode="json") | {"torch": torch.__version__}, [], [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = encode(folder / "latents")
        for turn in range(config.rounds):
            report.ray.append(with_ray(run_config(config, folder, f"ray-{turn}", shards)))
            report.plain.append(plain(run_config(config, folder, f"plain-{turn}", shards)))
            log(f"round {turn + 1}: Ray {report.ray[-1]:.4f} s a step, plain {report.plain[-1]:.4f} s")
    return report


def main() -> None:
    """Measure, say, write."""
    config = read_options(OverheadConfig, sys.argv[1:], __doc__ or "", OverheadConfig())
    report = measure(config, log=lambda line: print(line, file=sys.stderr, flush=True))
    quotients = [a / b for a, b in zip(report.ray, report.plain, strict=True)]
    print(
        f"{config.workers} workers, batch {config.batch}: Ray {statistics.median(report.ray):.4f} s a step, plain "
        f"{statistics.median(report.plain):.4f} s; ratio {report.ratio:.3f} (rounds {min(quotients):.3f} to {max(quotients):.3f})"
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(asdict(report) | {"ratio": report.ratio}, indent=1) + "\n")


if __name__ == "__main__":
    run_job(main)
