"""Pictures a second of the evaluation's pools, beside a bare loop of diffusers' pipeline at the same batch size.

    python evaluation/throughput.py --lora hypersd_ray/embedded/loras/tscd-k4.safetensors
    python evaluation/throughput.py --lora LORA --base FOLDER --generators.num-gpus 1 --workers 1 2

The bare loop makes pictures and nothing else; the pools make, write and judge them (`--judge` takes a CLIP), with one
generator and with two (`--workers`). Both have the threads of one generator. Both are timed from when their first batch was
made: to the bare loop's last, and to when the pools' last was judged, so that the first loading of a model counts in neither
(a second generator's does). They take turns.
Aim: at least 0.9 of the bare loop with one generator, more than 1 with two on cores of their own.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from diffusers import DiffusionPipeline
from pydantic import Field

from evaluation.harness.judges import judge_specs
from evaluation.harness.making import make, tasks
from evaluation.harness.plan import plan
from evaluation.harness.prompts import Row, read_rows
from evaluation.harness.store import Store, shards_of
from evaluation.harness.subjects import find_subject
from evaluation.output import save_report
from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.samplers import diffusers_scheduler


class ThroughputConfig(Strict):
    """What is measured."""

    lora: Path
    """LoRA of the base."""
    base: str = str(paths.TEACHER)
    """Folder of the base model."""
    steps: int = Field(default=4, ge=1)
    """Sampling steps, TCD."""
    prompts: int = Field(default=512, ge=2)
    """Pictures of a turn."""
    judge: str = str(paths.EVALUATORS / "clip")
    """CLIP that judges in the pools; empty is none."""
    generators: ActorPool = ActorPool(batch_size=32)
    """Actors that make pictures; the bare loop has their batch size and device."""
    scorers: ActorPool = ActorPool(batch_size=32)
    """Actors that judge."""
    workers: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    """Numbers of generators, each measured."""
    repeats: int = Field(default=3, ge=1)
    """Turns."""
    out: Path = Path("runs/throughput.json")
    """The JSON file that is written."""


def threads(config: ThroughputConfig) -> int:
    """Of a generator: Ray gives an actor as many as it has CPUs, if the environment does not say."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(config.generators.num_cpus))


def bare(config: ThroughputConfig, rows: list[Row]) -> float:
    """Pictures a second of the pipeline alone, with the LoRA fused."""
    torch.set_num_threads(threads(config))
    device = "cuda" if config.generators.num_gpus else "cpu"
    checker: dict[str, Any] = {"safety_checker": None} if read_base(config.base).family == "sd" else {}
    dtype = getattr(torch, config.generators.dtype)
    safely: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        pipe = DiffusionPipeline.from_pretrained(config.base, **safely, torch_dtype=dtype, **checker).to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base {config.base} cannot be loaded: {' '.join(str(error).split())}") from None
    pipe.scheduler = diffusers_scheduler("tcd", pipe.scheduler.config)
    pipe.load_lora_weights(str(config.lora))
    pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    begun, made = 0.0, 0
    for i, part in enumerate(shards_of(rows, config.generators.batch_size)):
        pipe(prompt=[r.prompt for r in part], num_inference_steps=config.steps, guidance_scale=0.0, eta=0.0)
        if i == 0:
            begun = time.perf_counter()
        else:
            made += len(part)
    return made / (time.perf_counter() - begun)


def pools(config: ThroughputConfig, rows: list[Row], workers: int) -> float:
    """Pictures a second of `workers` generators and the scorers."""
    generators = config.generators.model_copy(update={"min_size": workers, "max_size": workers})
    with tempfile.TemporaryDirectory() as out:
        settings = EvaluateConfig(
            base=config.base, steps=(config.steps,), scheduler="tcd", reference_steps=0, out=out,
            judges=JudgesConfig(clip_score=config.judge),
        )  # fmt: skip
        what = plan(settings, rows, [find_subject(str(config.lora), settings)])
        specs = [spec for spec in judge_specs(settings.judges) if spec.kind == "reward"]
        todo = tasks(Store(out), what.cells, rows, specs, generators.batch_size)
        ends: list[float] = []
        make(out, todo, specs, generators, config.scorers, lambda *_: ends.append(time.time()))
        made = sorted(path.stat().st_mtime for path in Path(out).rglob("*.tar"))
        begun = made[workers - 1]  # each generator has made its first shard, about
        return (len(rows) - workers * len(todo[0].rows)) / (ends[-1] - begun)


def main() -> None:
    """Measure in turns, print, write."""
    config: ThroughputConfig = read_options(ThroughputConfig, sys.argv[1:], __doc__ or "")
    rows = read_rows(EvaluateConfig(limit=config.prompts))
    turns = []
    for _ in range(config.repeats):
        of_pools = {f"pools, {n} generator{'s' * (n > 1)}": pools(config, rows, n) for n in config.workers}
        turns.append({"bare": bare(config, rows)} | of_pools)
    for name in turns[0]:
        ratios = [turn[name] / turn["bare"] for turn in turns]
        speed = statistics.median(turn[name] for turn in turns)
        print(
            f"{name:22s} {speed:8.2f} pictures/s, {statistics.median(ratios):.2f} of bare [{min(ratios):.2f}, {max(ratios):.2f}]"
        )
    about = {"settings": config.model_dump(mode="json"), "threads": threads(config), "turns": turns}
    save_report(config.out, about)


if __name__ == "__main__":
    run_job(main)
