"""The plan of throughput (`jobs/tscd.py --plan`) held against workers of this machine.

    python evaluation/scaling.py                         # 1, 2 and 4 workers, gradients of 67M parameters (SD1.5's LoRA)
    python evaluation/scaling.py --parameters 200000000 --seconds-per-image 0.1

A worker is a process in a gloo group. What its GPU would compute is a wait of `seconds_per_image` for each of its images, so
that four workers need no cores for that; the gradients' all-reduce and the checkpoints, four times their bytes, written and
hashed by rank 0 while the others wait, are the training's own, but for the copy to run.out that the loop makes of each: there
is none here. The plan is given the rates of two probes, an all-reduce of two workers with an eighth of the gradients and a
checkpoint of one worker of its full size (smaller ones are written faster), and says what a step will take; the steps are
then measured. Medians count. The plan gives every worker a link of its own, here all bytes go over one memory; so it is asked
twice, with the probe's link for each and with it shared out: what is measured should lie between.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field, PositiveInt, model_validator

from evaluation.output import save_report
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.trainer.local import free_port
from hypersd_ray.training.checkpoint import save_checkpoint
from hypersd_ray.training.distributed import average_gradients
from hypersd_ray.tuning.plan import GIGA, Hardware, Row, Work, row

PROBE = 8
"""The probe's gradients are this part of the run's."""
LAYERS = 64
"""Parameters come in as many tensors."""


class ScalingConfig(Strict):
    """What is run."""

    workers: tuple[PositiveInt, ...] = Field(default=(1, 2, 4), min_length=1)
    """Numbers of workers, each measured."""
    parameters: int = Field(default=67_000_000, ge=LAYERS * PROBE)
    """Trained parameters: gradients of four bytes each."""
    batch: int = Field(default=32, ge=1)
    """Images of a step over all workers."""
    seconds_per_image: float = Field(default=0.05, gt=0)
    """The wait that stands for a GPU's work."""
    steps: int = Field(default=12, ge=4)
    """Of a run."""
    checkpoint_every: int = Field(default=4, ge=1)
    """Steps between checkpoints."""
    rounds: int = Field(default=3, ge=1)
    """Runs of each number of workers, in turn."""
    out: Path = Path("runs/scaling.json")
    """The JSON file that is written."""

    @model_validator(mode="after")
    def _a_checkpoint_is_written(self) -> ScalingConfig:
        if self.checkpoint_every > self.steps:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} is above steps={self.steps}: lower it")
        return self


@dataclass(frozen=True)
class Seconds:
    """Of a step, on rank 0: medians of the two parts that a step has, and of the checkpoints' share."""

    compute: float
    all_reduce: float
    checkpoint: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.all_reduce + self.checkpoint


class _State:
    """What a checkpoint holds of as many parameters: the student, its average, two moments."""

    def __init__(self, layers: list[torch.nn.Parameter]):
        self.layers = layers

    def parts(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """As a training gives them."""
        for part in ("student", "average", "moment1", "moment2"):
            yield part, {str(i): layer.detach() for i, layer in enumerate(self.layers)}

    def notes(self) -> dict[str, Any]:
        """None."""
        return {}


def _worker(rank: int, world: int, port: int, config: ScalingConfig, parameters: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    layers = [torch.nn.Parameter(torch.zeros(parameters // LAYERS)) for _ in range(LAYERS)]
    for layer in layers:
        layer.grad = torch.ones_like(layer)
    images = -(-config.batch // world)
    parts: dict[str, list[float]] = {"compute": [], "all_reduce": [], "checkpoint": []}
    for step in range(config.steps):
        begun = time.perf_counter()
        time.sleep(config.seconds_per_image * images)
        computed = time.perf_counter()
        average_gradients(layers)
        reduced = time.perf_counter()
        parts["compute"].append(computed - begun)
        parts["all_reduce"].append(reduced - computed)
        if (step + 1) % config.checkpoint_every == 0:
            save_checkpoint(folder, _State(layers), rank, world)
            if world > 1:
                dist.barrier()
            parts["checkpoint"].append(time.perf_counter() - reduced)
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps({name: statistics.median(v) for name, v in parts.items()}))
    if world > 1:
        dist.destroy_process_group()


def run(config: ScalingConfig, world: int, parameters: int) -> Seconds:
    """A run of `world` workers, measured."""
    with tempfile.TemporaryDirectory() as temporary:
        mp.spawn(_worker, (world, free_port(), config, parameters, Path(temporary)), nprocs=world)
        found = json.loads((Path(temporary) / "seconds.json").read_text())
    return Seconds(found["compute"], found["all_reduce"], found["checkpoint"] / config.checkpoint_every)


def probe(config: ScalingConfig) -> Hardware:
    """The rates of this machine, from one run of two workers on smaller gradients and one of one worker."""
    short = config.model_copy(update={"batch": 1, "steps": 12, "checkpoint_every": 4})
    small = config.parameters // PROBE
    two, one = run(short, 2, small), run(short, 1, config.parameters)
    # a ring of two sends each byte once: 2 (2 - 1) / 2
    return Hardware(
        gpus_per_node=max(config.workers), gpu_link=4 * small / two.all_reduce / GIGA,
        storage=4 * 4 * config.parameters / (one.checkpoint * short.checkpoint_every) / GIGA,
        seconds_per_image=config.seconds_per_image, encoder_images_s=1e9, reward_images_s=1e9,
    )  # fmt: skip


def _plans(config: ScalingConfig, hardware: Hardware, world: int) -> dict[str, Any]:
    work = Work(config.parameters, 4 * 4.0 * config.parameters, 0.0, config.batch, config.checkpoint_every)
    shared = replace(hardware, gpu_link=hardware.gpu_link * 2 / max(2, world))
    return {"planned": asdict(row(work, hardware, world)), "shared": asdict(row(work, shared, world))}


def measure(config: ScalingConfig) -> dict[str, Any]:
    """The probe's rates, and for each number of workers what was planned and what was measured."""
    hardware = probe(config)
    runs: dict[int, list[Seconds]] = {world: [] for world in config.workers}
    for _ in range(config.rounds):
        for world in config.workers:
            runs[world].append(run(config, world, config.parameters))
    return {
        "settings": config.model_dump(mode="json") | {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))},
        "hardware": asdict(hardware),
        "rows": {
            str(world): _plans(config, hardware, world) | {"measured": [asdict(s) for s in of_world]}
            for world, of_world in runs.items()
        },
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Markdown: seconds planned with links of their own, with one that is shared, and measured."""
    hardware, batch = found["hardware"], found["settings"]["batch"]
    lines = [
        f"{found['settings']['parameters'] / 1e6:.0f}M parameters; probes: all-reduce {hardware['gpu_link']:.2f} GB/s, "
        f"checkpoints {hardware['storage']:.2f} GB/s",
        "",
        "| workers | s a step: planned, links of their own | one shared | measured | images/s | all-reduce | checkpoint |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for world, one in found["rows"].items():
        own, shared = Row(**one["planned"]), Row(**one["shared"])
        measured = [Seconds(**s) for s in one["measured"]]
        middle = {n: statistics.median(getattr(s, n) for s in measured) for n in ("step", "all_reduce", "checkpoint")}
        difference = [f"{plan.step:.3f} ({plan.step / middle['step'] - 1:+.0%})" for plan in (own, shared)]
        lines.append(
            f"| {world} | {' | '.join(difference)} | {middle['step']:.3f} | {batch / middle['step']:.1f} "
            f"| {own.all_reduce:.3f} to {shared.all_reduce:.3f} / {middle['all_reduce']:.3f} "
            f"| {own.checkpoint:.3f} / {middle['checkpoint']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    config = read_options(ScalingConfig, sys.argv[1:], __doc__ or "", ScalingConfig())
    found = measure(config)
    print(table(found))
    save_report(config.out, found)


if __name__ == "__main__":
    run_job(main)
