"""What reward models and a detector think of few-step samples, beside a baseline from the same noise.

    python evaluation/rewards.py tiny --baseline LORA --loras LORA ...        # the embedded judges, on the embedded model
    python evaluation/rewards.py --config judges.yaml                         # others

Every model starts from the same x_T, a function of (seed, prompt). Of each reward the mean over the prompts, and its
difference to the baseline's with a 95% bootstrap interval of the paired differences; of the detector the average precision of
the objects that the prompts name (evaluation/objects.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from pydantic import Field
from torch import Tensor

from evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from evaluation.objects import object_precision, object_precision_difference
from evaluation.output import progress, save_report
from evaluation.quality import QualityConfig, Subject, check_loras, check_sampling, read_prompts
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.perception.coco import CocoAnnotations
from hypersd_ray.models.perception.registry import load_perception
from hypersd_ray.models.rewards.registry import load_reward
from hypersd_ray.recipes.feedback import embedded_rewards
from hypersd_ray.training.pictures import diversity, saturation

OBJECTS = "objects"
"""The detector's column."""


class RewardsConfig(Strict):
    """LoRAs, prompts and judges."""

    baseline: Path
    """LoRA that the others are compared with."""
    loras: tuple[Path, ...] = ()
    """LoRA files of the same teacher."""
    rewards: tuple[RewardConfig, ...]
    """Reward models; `role` is only said in the table."""
    detector: PerceptionConfig | None = None
    """Instance segmentation model; None leaves that column out."""
    annotations: Path = paths.DATA / "instances_val.json"
    """COCO instances whose pictures have captions in `captions`: which classes a prompt names."""
    captions: Path = paths.DATA / "captions_val.json"
    """COCO captions of the same pictures; a prompt that is not among them names nothing."""
    sampling: QualityConfig = QualityConfig(steps=(1, 2, 4))
    """Teacher, prompts, steps, sampler, seed; its `loras`, `cache`, `out` are not used."""
    out: Path = Path("runs/rewards.json")
    """The JSON file that is written."""
    resamples: int = Field(default=1000, ge=100)
    """Of the detector's bootstrap."""


def tiny(baseline: str, detector: str = str(paths.EVALUATORS / "solo")) -> RewardsConfig:
    """The embedded model's judges."""
    return RewardsConfig(
        baseline=Path(baseline),
        rewards=embedded_rewards(),
        detector=PerceptionConfig(checkpoint=detector) if detector else None,
    )


@dataclass(frozen=True)
class Row:
    """One model at one number of steps: each judge's mean, and its difference to the baseline's."""

    model: str
    steps: int
    means: dict[str, Interval]
    versus: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the JSON file holds."""

    settings: dict[str, Any]
    judges: dict[str, str]
    loras: dict[str, dict[str, Any]]
    rows: list[Row] = field(default_factory=list)


def named_objects(annotations_file: Path, captions_file: Path, prompts: Sequence[str]) -> list[list[int]]:
    """The classes that each prompt names, from the annotated picture whose caption it is; none for another prompt."""
    annotations = CocoAnnotations(annotations_file)
    found = json.loads(captions_file.read_text())["annotations"]
    captions: dict[int, list[str]] = {}
    for a in found:  # real COCO has five a picture
        captions.setdefault(a["image_id"], []).append(" ".join(a["caption"].split()))
    labels: dict[str, list[int]] = {}
    for image in annotations.images.values():
        rows = annotations.by_image.get(image["id"], [])
        for caption in captions.get(image["id"], ()):
            labels.setdefault(caption, [annotations.label_of[r["category_id"]] for r in rows])
    return [labels.get(" ".join(prompt.split()), []) for prompt in prompts]


def named_labels(config: RewardsConfig, prompts: Sequence[str]) -> list[list[int]]:
    """`named_objects` of the configuration's files."""
    return named_objects(config.annotations, config.captions, prompts)


class Judges:
    """All models that judge, loaded once."""

    def __init__(self, config: RewardsConfig, prompts: Sequence[str]):
        self.config, self.prompts, device = config, list(prompts), config.sampling.device
        self.rewards = {r.name: load_reward(r, device) for r in config.rewards}
        self.detector = None if config.detector is None else load_perception(config.detector, device)
        self.named = named_labels(config, prompts) if self.detector is not None else []

    def __call__(self, pictures: Tensor) -> tuple[dict[str, Tensor], tuple[Interval, Tensor] | None]:
        """Pictures (P, 3, H, W) in [0, 1] -> each reward's (P,), and the detector's precision with its resamples."""
        batch, device = self.config.sampling.batch, self.config.sampling.device
        values: dict[str, list[Tensor]] = {name: [] for name in self.rewards}
        found = []
        with torch.no_grad():
            for first in range(0, len(pictures), batch):
                part, told = pictures[first : first + batch].to(device), self.prompts[first : first + batch]
                for name, reward in self.rewards.items():
                    values[name].append(reward(part, told).float().cpu())
                if self.detector is not None:
                    found += [instances.to("cpu") for instances in self.detector.predict(part)]
        rewards = {name: torch.cat(parts) for name, parts in values.items()}
        if self.detector is None:
            return rewards, None
        seed = self.config.sampling.seed
        return rewards, object_precision(found, self.named, self.config.resamples, seed)


def evaluate(config: RewardsConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """The baseline's rows, then each LoRA's; `log` hears of each as it is done.

    Raises:
        ValueError: a file that is missing or does not fit; one line says which.
    """
    check_sampling(config.sampling)
    prompts, loras = read_prompts(config.sampling), check_loras((config.baseline, *config.loras))
    judges, subject = Judges(config, prompts), Subject(config.sampling, prompts)
    conventions: dict[str, str] = {name: model.convention for name, model in judges.rewards.items()}
    report = Report(config.model_dump(mode="json"), conventions, loras)
    before: dict[int, tuple] = {}
    seed = config.sampling.seed
    for name, lora in loras.items():
        subject.load_lora(Path(lora["path"]))
        for steps in filter(subject.can, config.sampling.steps):
            latents = subject.student(steps, config.sampling.sampler)
            pictures = torch.cat([subject.encoders.decode(z) for z in latents.split(config.sampling.batch)]) / 255.0
            rewards, objects = judges(pictures)
            means = {judge: bootstrap_interval(values, seed=seed) for judge, values in rewards.items()}
            versus: dict[str, Interval] = {}
            if steps in before:
                theirs, their_objects = before[steps]
                versus = {j: paired_difference(values, theirs[j], seed=seed) for j, values in rewards.items()}
                if objects is not None:
                    versus[OBJECTS] = object_precision_difference(objects, their_objects)
            else:
                before[steps] = rewards, objects
            if objects is not None:
                means[OBJECTS] = objects[0]
            for look, measure in (("saturation", saturation), ("diversity", diversity)):
                value = measure(pictures).item()
                means[look] = Interval(value, value, value)
            report.rows.append(Row(name, steps, means, versus))
            log(f"{name}, {steps} steps: " + ", ".join(f"{judge} {i.mean:.3f}" for judge, i in means.items()))
    return report


def table(report: Report) -> str:
    """The rows in Markdown: the mean, and below the baseline's rows the difference to it with its interval."""
    judges = list(report.rows[0].means)
    lines = [f"| model | steps | {' | '.join(judges)} |", "|---|---:|" + "---:|" * len(judges)]
    for row in report.rows:
        cells = []
        for judge in judges:
            cell, change = f"{row.means[judge].mean:.3f}", row.versus.get(judge)
            cells.append(cell if change is None else f"{cell} ({change:+.3f})")
        lines.append(f"| {row.model} | {row.steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    config = parse({"tiny": tiny}, RewardsConfig, __doc__)
    report = evaluate(config, log=progress)
    print(table(report))
    save_report(config.out, asdict(report))


if __name__ == "__main__":
    run_job(main)
