"""Whether guidance and negative prompts still work on a few-step LoRA (the paper's limitation, Sec. 6).

    python evaluation/guidance.py --loras runs/tiny-minutes-keep-cfg/lora/tscd-k8.safetensors hypersd_ray/embedded/loras/tscd-k8.safetensors

Two tables, every row from the same x_T, a function of (seed, prompt):

    guidance    CLIP score of the samples to their prompts at several guidance scales, and its paired difference to scale 1
    negative    prompts that name two objects, drawn without and with the second object as the negative prompt: by how much
                the CLIP score to a text of that object alone falls, and that to a text of the first object alone

Scores are 100 times the cosine. In brackets 95% bootstrap intervals over the prompts.
"""

from __future__ import annotations

import re
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
from evaluation.output import progress, save_report
from evaluation.quality import QualityConfig, Subject, check_loras, read_prompts
from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.rewards.registry import load_reward
from hypersd_ray.models.samplers import TCD_GRID, diffusers_scheduler

TWO = re.compile(r"^(?P<first>an? .+) and (?P<second>an? .+) on (?P<ground>an? .+ background)$")
"""A caption of the embedded world that names two objects."""


class GuidanceConfig(Strict):
    """LoRAs, scales and prompts."""

    loras: tuple[Path, ...]
    """LoRA files of the teacher."""
    teacher: Path = paths.TEACHER
    """Folder of the base model in diffusers' layout."""
    clip: RewardConfig = RewardConfig(name="clip_score", checkpoint=str(paths.EVALUATORS / "clip"), role="watch")
    """The judge."""
    steps: int = Field(default=8, ge=1, le=TCD_GRID)
    """Sampling steps, by diffusers' TCDScheduler."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Guidance scales, the first of them what the others are compared with."""
    negative_scale: float = Field(default=3.0, gt=1)
    """Guidance scale of the negative prompts."""
    prompts: int = Field(default=512, ge=2)
    """Held-out prompts of the embedded model; those that name two objects are the second table's."""
    seed: int = 0
    """x_T and the bootstrap are functions of it."""
    batch: int = Field(default=64, ge=1)
    """Prompts sampled at a time."""
    device: str = "cpu"
    """Where: cpu, cuda, ..."""
    out: Path = Path("runs/guidance.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Scaled:
    """A row of the first table."""

    model: str
    scale: float
    score: Interval
    change: Interval | None


@dataclass(frozen=True)
class Negated:
    """A row of the second table: changes of the scores by the negative prompt."""

    model: str
    prompts: int
    removed: Interval
    kept: Interval
    removed_more: Interval


@dataclass(frozen=True)
class Report:
    """What the JSON file holds."""

    settings: dict[str, Any]
    loras: dict[str, dict[str, Any]]
    scaled: list[Scaled] = field(default_factory=list)
    negated: list[Negated] = field(default_factory=list)


class Guided(Subject):
    """The pipeline with a LoRA, sampled under guidance."""

    def pictures(
        self, prompts: Sequence[str], steps: int, scale: float, negative: Sequence[str] | None = None
    ) -> Tensor:
        """Pictures (P, 3, H, W) in [0, 1] of `prompts`; `negative` has one a prompt."""
        self.prompts = list(prompts)
        without = dict(zip(prompts, negative or [""] * len(prompts), strict=True))
        self.pipe.scheduler = diffusers_scheduler("tcd", self.pipe.scheduler.config)

        def sample(chunk: list[str], x_T: Tensor, _: Any) -> Tensor:
            return self.pipe(
                prompt=chunk, negative_prompt=[without[prompt] for prompt in chunk], latents=x_T,
                num_inference_steps=steps, guidance_scale=scale, eta=0.0, output_type="latent",
            ).images  # fmt: skip

        latents = self._chunks(sample)
        return torch.cat([self.encoders.decode(part).cpu() for part in latents.split(self.config.batch)]) / 255.0


def two_objects(prompts: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """(prompt, its second object, a prompt of the first alone, one of the second alone) of those that name two."""
    found = []
    for prompt in prompts:
        if match := TWO.match(prompt):
            first, second, ground = match["first"], match["second"], match["ground"]
            found.append((prompt, second, f"{first} on {ground}", f"{second} on {ground}"))
    return found


def evaluate(config: GuidanceConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """Both tables for every LoRA.

    Raises:
        ConfigError, ValueError: a scale below 1, a file that is missing or does not fit; one line says which.
    """
    if not config.scales or min(config.scales) < 1:
        raise ConfigError(f"--scales {config.scales}: at least one, none below 1 (1 is no guidance)")
    sampling = QualityConfig(
        teacher=config.teacher, prompts=config.prompts, seed=config.seed, batch=config.batch, device=config.device
    )
    prompts, loras = read_prompts(sampling), check_loras(config.loras)
    reward, subject = load_reward(config.clip, config.device), Guided(sampling, prompts)
    report, pairs = Report(config.model_dump(mode="json"), loras), two_objects(prompts)

    @torch.no_grad()
    def score(pictures: Tensor, texts: Sequence[str]) -> Tensor:
        parts = [
            reward(pictures[i : i + config.batch].to(config.device), list(texts[i : i + config.batch])).float().cpu()
            for i in range(0, len(texts), config.batch)
        ]
        return torch.cat(parts)

    for name, lora in loras.items():
        subject.load_lora(Path(lora["path"]))
        first: Tensor | None = None
        for scale in config.scales:
            values = score(subject.pictures(prompts, config.steps, scale), prompts)
            change = None if first is None else paired_difference(values, first, seed=config.seed)
            first = values if first is None else first
            report.scaled.append(Scaled(name, scale, bootstrap_interval(values, seed=config.seed), change))
            log(f"{name}, guidance {scale:g}: CLIP score {report.scaled[-1].score.mean:.2f}")
        if len(pairs) < 2:
            continue
        both, second, kept, removed = zip(*pairs, strict=True)
        before = subject.pictures(both, config.steps, config.negative_scale)
        after = subject.pictures(both, config.steps, config.negative_scale, second)
        fall = score(after, removed) - score(before, removed)
        other = score(after, kept) - score(before, kept)
        intervals = [bootstrap_interval(values, seed=config.seed) for values in (fall, other, fall - other)]
        report.negated.append(Negated(name, len(pairs), *intervals))
        log(
            f"{name}, negative prompt: the object's score {intervals[0].mean:+.2f}, the other's {intervals[1].mean:+.2f}"
        )
    return report


def table(report: Report) -> str:
    """Both tables in Markdown."""

    def cell(i: Interval | None, sign: str = "+") -> str:
        return "" if i is None else f"{i:{sign}.2f}"

    first = f"scale {report.settings['scales'][0]:g}"
    lines = [f"| model | guidance | CLIP score | minus {first} |", "|---|---:|---:|---:|"]
    lines += [f"| {r.model} | {r.scale:g} | {cell(r.score, '')} | {cell(r.change)} |" for r in report.scaled]
    if report.negated:
        lines += ["", "| model | prompts | object in the negative prompt | the other object | difference |"]
        lines += ["|---|---:|---:|---:|---:|"]
    for n in report.negated:
        lines.append(f"| {n.model} | {n.prompts} | {cell(n.removed)} | {cell(n.kept)} | {cell(n.removed_more)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    config: GuidanceConfig = read_options(GuidanceConfig, sys.argv[1:], __doc__ or "")
    report = evaluate(config, log=progress)
    print(table(report))
    save_report(config.out, asdict(report))


if __name__ == "__main__":
    run_job(main)
