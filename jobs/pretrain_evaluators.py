"""Train the embedded world's evaluators: a CLIP, an aesthetic head on it, and a SOLO.

    python jobs/build_emoji.py --node-modules node_modules --train 24000 --out build/emoji
    python jobs/pretrain_evaluators.py --data build/emoji --out build/evaluators

Some minutes each on 2 cores; stopped and started again, it goes on. The results (`OUT/clip`, `OUT/aesthetic.safetensors`,
`OUT/solo`, `OUT/report.json`) are committed in `hypersd_ray/embedded/evaluators`, so nobody needs to run this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import tyro
from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import run_job
from hypersd_ray.embedded import paths

if TYPE_CHECKING:
    from torch import Tensor

    Pictures = tuple[Tensor, list[str]]


class EvaluatorsConfig(Strict):
    """Sizes of the trainings."""

    data: Path
    """Folder with train-*.tar, val-*.tar and instances_*.json."""
    out: Path
    """Folder for the states and the finished models."""
    teacher: Path = paths.TEACHER
    """Its tokenizer is CLIP's too; what it denoises badly teaches the aesthetic head."""
    what: tuple[Literal["clip", "aesthetic", "solo"], ...] = ("clip", "aesthetic", "solo")
    """Which to train; the aesthetic head needs the CLIP."""
    clip_steps: tuple[int, ...] = (1800, 1200, 900)
    """Batches of 128 pictures with captions, in cycles of the learning rate."""
    clip_spoilt: int = Field(default=8000, ge=0)
    """Spoilt pictures among CLIP's, beside the sound ones."""
    aesthetic_steps: int = Field(default=1000, ge=10)
    """Batches of 256 rated pictures, embedded before."""
    aesthetic_pictures: int = Field(default=6000, ge=16)
    """Pictures that are spoilt and rated for it."""
    solo_steps: int = Field(default=2000, ge=10)
    """Batches of 16 annotated pictures."""
    seed: int = 0
    """All randomness is a function of (seed, step)."""


def main() -> None:
    """Train what is asked for, measure it on held-out pictures, and say so."""
    config = tyro.cli(EvaluatorsConfig, description=__doc__)
    from hypersd_ray.embedded.pictures import load_pictures

    config.out.mkdir(parents=True, exist_ok=True)
    train_set, held_out = load_pictures(config.data, "train"), load_pictures(config.data, "val")
    report_path = config.out / "report.json"
    report = json.loads(report_path.read_text()) if report_path.exists() else {}
    for name in config.what:
        report[name] = {"clip": clip, "aesthetic": aesthetic, "solo": solo}[name](config, train_set, held_out)
        report_path.write_text(json.dumps(report, indent=1))
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in report[name].items()), flush=True)


def clip(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """CLIP score's model, and the tower of the aesthetic head."""
    from hypersd_ray.embedded.pretrain_clip import retrieval, train_clip, with_spoilt

    images, captions = with_spoilt(*train_set, config.teacher, config.clip_spoilt, seed=config.seed)
    tower = train_clip(
        images,
        captions,
        config.teacher,
        config.out,
        config.out / "clip",
        config.clip_steps,
        seed=config.seed,
        spoilt=len(images) - len(train_set[0]),
    )
    return retrieval(tower, *held_out)


def aesthetic(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """The head."""
    from hypersd_ray.embedded.pretrain_clip import rating_error, train_aesthetic
    from hypersd_ray.models.rewards.clip import load_tower

    if not (config.out / "clip").is_dir():
        raise ValueError(f"{config.out}/clip does not exist: train it first (--what clip aesthetic)")
    tower = load_tower("", config.out / "clip")
    images, captions = train_set[0][: config.aesthetic_pictures], train_set[1][: config.aesthetic_pictures]
    head = train_aesthetic(
        tower, images, captions, config.teacher, config.out, config.out / "aesthetic.safetensors",
        config.aesthetic_steps, seed=config.seed,
    )  # fmt: skip
    return rating_error(tower, head, *held_out, config.teacher)


def solo(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """Instance segmentation."""
    from hypersd_ray.embedded.pretrain_solo import average_precision, read_annotations, train_solo
    from hypersd_ray.models.perception.coco import CocoAnnotations

    classes = CocoAnnotations(config.data / "instances_val.json").num_classes
    targets = read_annotations(config.data, "train", len(train_set[0]))
    model = train_solo(
        train_set[0], targets, classes, config.out, config.out / "solo", config.solo_steps, seed=config.seed
    )
    return average_precision(model, held_out[0], config.data)


if __name__ == "__main__":
    run_job(main)
