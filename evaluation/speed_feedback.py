"""What shared reward actors cost: a feedback step with the judges in other processes against the same in this one.

    python evaluation/speed_feedback.py --lora hypersd_ray/embedded/loras/tscd-k1.safetensors

Both ways take the same steps on the same batch, turn by turn, the training on one thread and (`remote`) the judges on another.
Then several workers call the same actors: which processes answered them, and how much memory their models take there, against a
copy in each worker. Needs as many free cores as threads.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import ray
import torch
from pydantic import Field

from evaluation.output import save_report
from hypersd_ray.actors.client import RemoteBackend
from hypersd_ray.actors.placement import Handles, start_evaluators, stop_evaluators
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders, load_vae
from hypersd_ray.models.scoring import Backend, RewardClient, local_backend
from hypersd_ray.recipes import FEEDBACK_RECIPES
from hypersd_ray.trainer.kinds.feedback import read_annotations
from hypersd_ray.trainer.run import connect
from hypersd_ray.training.feedback import Feedback, build_roles
from hypersd_ray.training.tscd import Batch


class SpeedConfig(Strict):
    """Sizes of the measurement."""

    lora: str
    """TSCD LoRA of the embedded model."""
    batch: int = Field(default=16, ge=1)
    """Pictures of a step."""
    rounds: int = Field(default=20, ge=3)
    """Steps of each way, in turns; the first two are left out."""
    workers: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes that share the actors."""
    out: Path = Path("runs/speed-feedback.json")
    """The JSON file that is written."""


def one_batch(config: FeedbackConfig, size: int) -> Batch:
    """Annotated pictures of the embedded world, encoded."""
    images, captions = load_pictures(paths.DATA, "train")
    encoders = load_encoders(config.teacher)
    embeds = encoders.encode_prompts(captions[:size])
    keys = [f"train{i:07d}" for i in range(size)]
    cond = Conditioning(embeds.prompt_embeds, embeds.pooled)
    return Batch(encoders.encode_images(images[:size]), cond, tuple(captions[:size]), tuple(keys))


def stepper(config: FeedbackConfig, backend: Backend, batch: Batch) -> Callable[[], float]:
    """A training of its own; each call is one step, its result the seconds it took."""
    vae = load_vae(config.teacher).eval().requires_grad_(False)
    training = Feedback(config, build_roles(config, "cpu"), vae, RewardClient(backend), read_annotations(config))

    def step() -> float:
        begun = time.perf_counter()
        training.step(batch)
        return time.perf_counter() - begun

    return step


def compare(config: FeedbackConfig, settings: SpeedConfig, handles: Handles) -> dict[str, Any]:
    """Seconds of a step both ways, and the median of the rounds' ratios."""
    torch.set_num_threads(1)
    batch = one_batch(config, settings.batch)
    local = stepper(config, local_backend(config.models, "cpu"), batch)
    remote = stepper(config, RemoteBackend(handles), batch)
    rounds = [(local(), remote()) for _ in range(settings.rounds)][2:]
    ratios = [there / here for here, there in rounds]
    return {
        "local_s": statistics.median(here for here, _ in rounds),
        "remote_s": statistics.median(there for _, there in rounds),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


@ray.remote(num_cpus=0)
def who_answers(handles: Handles, batch: int) -> dict[str, int]:
    """A worker: scores pictures with every reward; -> the process that answered, by model."""
    images = torch.rand(batch, 3, 32, 32)
    rewards = [name for name in handles if name not in ("solo", "mask2former")]
    RemoteBackend(handles)(images, {name: ["a noto penguin"] * batch for name in rewards}, True)
    return {name: ray.get(handles[name][0].counts.remote())["pid"] for name in handles}


def memory(handles: Handles, settings: SpeedConfig) -> list[dict[str, Any]]:
    """For each number of workers: the processes that hold models, and the models' megabytes there and in copies."""
    loaded = {name: ray.get(replicas[0].load.remote()) for name, replicas in handles.items()}
    megabytes = sum(4 * about["parameters"] for about in loaded.values()) / 1e6
    rows = []
    for workers in settings.workers:
        seen = ray.get([who_answers.remote(handles, settings.batch) for _ in range(workers)])
        holders = {pid for answer in seen for pid in answer.values()}
        held = megabytes * len(holders) / len(handles)
        rows.append({"workers": workers, "processes": len(holders), "held_mb": held, "copies_mb": megabytes * workers})
    return rows


def main() -> None:
    """Measure, print, write the JSON file."""
    settings: SpeedConfig = read_options(SpeedConfig, sys.argv[1:], __doc__ or "")
    config = FEEDBACK_RECIPES["tiny"](lora=str(Path(settings.lora).resolve()))
    connect()
    handles = start_evaluators(config.models, config.placement, "speed")
    try:
        result = compare(config, settings, handles) | {"memory": memory(handles, settings)}
    finally:
        stop_evaluators(handles)
    print(f"step of {settings.batch} pictures, {', '.join(handles)}: in process {result['local_s']:.3f} s, "
          f"actors {result['remote_s']:.3f} s; ratio {result['ratio']:.2f} ({result['ratio_least']:.2f} to {result['ratio_most']:.2f})")  # fmt: skip
    for row in result["memory"]:
        print(f"{row['workers']} workers: models in {row['processes']} processes, {row['held_mb']:.1f} MB; "
              f"in each worker they would take {row['copies_mb']:.1f} MB")  # fmt: skip
    save_report(settings.out, settings.model_dump(mode="json") | result)


if __name__ == "__main__":
    run_job(main)
