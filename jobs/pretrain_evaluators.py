"""Train the embedded world's evaluators: two CLIPs, an aesthetic predictor, an ImageReward, an HPS, a SOLO.

    python jobs/build_emoji.py --node-modules node_modules --train 24000 --out build/emoji
    python jobs/pretrain_evaluators.py --data build/emoji --out build/evaluators --device cuda

Stopped and started again, it goes on. The results (all in OUT but the states, which end in `_state.pt`) are committed in
`hypersd_ray/embedded/evaluators`, so nobody needs to run this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded import paths

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd_ray.embedded.preferences import Preferences
    from hypersd_ray.embedded.spoiling import Bank

    Pictures = tuple[Tensor, list[str]]

What = Literal["clip", "aesthetic", "image_reward", "hps", "solo"]


class EvaluatorsConfig(Strict):
    """Sizes of the trainings."""

    data: Path
    """Folder with train-*.tar, val-*.tar and instances_*.json."""
    out: Path
    """Folder for the states and the finished models."""
    teacher: Path = paths.TEACHER
    """Its tokenizer is CLIP's too; what it denoises badly teaches the aesthetic head."""
    what: tuple[What, ...] = ("clip", "aesthetic", "image_reward", "hps", "solo")
    """Which to train; HPS begins with the CLIP."""
    clip_steps: tuple[int, ...] = (1800, 1200, 900)
    """Batches of 128 pictures with captions, in cycles of the learning rate."""
    clip_spoilt: int = Field(default=8000, ge=0)
    """Spoilt pictures among CLIP's, beside the sound ones."""
    aesthetic_steps: int = Field(default=2500, ge=12)
    """Batches of 256 pictures with captions and marks."""
    image_reward_steps: int = Field(default=2000, ge=12)
    """Batches of pairs."""
    image_reward_batch: int = Field(default=64, ge=2)
    """Pairs of one."""
    hps_steps: int = Field(default=1200, ge=12)
    """Batches of 128 pairs, others than ImageReward's."""
    solo_steps: int = Field(default=9000, ge=12)
    """Batches of 16 annotated pictures."""
    pictures: int = Field(default=24000, ge=16)
    """Sound pictures at most, for those that learn marks or preferences."""
    spoilt_versions: int = Field(default=3, ge=1)
    """Spoilt ones of each."""
    device: str = "cpu"
    """Where those learn: cpu, cuda."""
    seed: int = 0
    """All randomness is a function of (seed, step)."""


def main() -> None:
    """Train what is asked for, measure it on held-out pictures, and say so."""
    config: EvaluatorsConfig = read_options(EvaluatorsConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.embedded.pictures import load_pictures

    config.out.mkdir(parents=True, exist_ok=True)
    train_set, held_out = load_pictures(config.data, "train"), load_pictures(config.data, "val")
    report_path = config.out / "report.json"
    trainings = {"clip": clip, "aesthetic": aesthetic, "image_reward": image_reward, "hps": hps, "solo": solo}
    for name in config.what:
        found = trainings[name](config, train_set, held_out)
        report = json.loads(report_path.read_text()) if report_path.exists() else {}
        report_path.write_text(json.dumps(report | {name: found}, indent=1))
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


def banks(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures, seed: int) -> tuple[Bank, Bank]:
    """Spoilt pictures to learn from, and to be measured on."""
    from hypersd_ray.embedded.spoiling import spoil_all

    images, captions = train_set[0][: config.pictures], train_set[1][: config.pictures]
    learnt = spoil_all(images, captions, config.teacher, config.spoilt_versions, seed, config.device)
    return learnt, spoil_all(*held_out, config.teacher, 2, seed + 1, config.device)


def clip(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """CLIP score's model, and what HPS begins with."""
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
    """The predictor, and the CLIP below it."""
    from hypersd_ray.embedded.pretrain_aesthetic import rating_error, train_aesthetic
    from hypersd_ray.embedded.pretrain_clip import retrieval

    learnt, measured = banks(config, train_set, held_out, config.seed)
    model = train_aesthetic(
        learnt, config.teacher, config.out, config.out / "clip_large", config.out / "aesthetic.safetensors",
        config.aesthetic_steps, seed=config.seed, device=config.device,
    )  # fmt: skip
    return rating_error(model, measured) | retrieval(model.tower, *held_out)


def image_reward(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """Eq. 11 on preferences of the oracle."""
    from hypersd_ray.embedded.pretrain_preference import agreement, train_image_reward

    learnt, measured = preferences(config, train_set, held_out, config.seed)
    model = train_image_reward(
        learnt, config.teacher, config.out, config.out / "image_reward", config.image_reward_steps,
        config.image_reward_batch, config.seed, config.device,
    )  # fmt: skip
    return agreement(model.to(config.device), measured)


def hps(config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures) -> dict[str, float]:
    """A held-out judge of preference: of another class than ImageReward, and from other pairs."""
    from hypersd_ray.embedded.pretrain_preference import agreement, train_hps

    report = config.out / "report.json"  # the folder of a CLIP is there before it is trained
    if not report.exists() or "clip" not in json.loads(report.read_text()):
        raise ValueError(f"{report} tells of no trained CLIP: train it first (--what clip hps)")
    learnt, measured = preferences(config, train_set, held_out, config.seed + 10)
    model = train_hps(
        learnt, config.out / "clip", config.out, config.out / "hps", config.hps_steps,
        seed=config.seed + 10, device=config.device,
    )  # fmt: skip
    return agreement(model.to(config.device), measured)


def preferences(
    config: EvaluatorsConfig, train_set: Pictures, held_out: Pictures, seed: int
) -> tuple[Preferences, Preferences]:
    """To learn from, and to be measured on."""
    from hypersd_ray.embedded.preferences import Preferences

    learnt, measured = banks(config, train_set, held_out, seed)
    return Preferences(learnt), Preferences(measured)


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
