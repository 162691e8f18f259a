"""Single steps against real pictures: how far their statistics are from those of the held-out ones, and CLIP's score.

    python evaluation/onestep.py tiny --loras runs/tiny-onestep-unified/lora/onestep-unified.safetensors ...

Fréchet distance: two Gaussians fitted to CLIP's embeddings (of norm 1) of the generated and of the real pictures, times
1000. The real pictures are those whose captions are the prompts. Every model starts from the same x_T, a function of
(seed, prompt). Each LoRA's row also says the difference to a baseline at as many steps, with a 95% bootstrap interval in
which the prompts are kept together. A LoRA made for certain inputs of the network (T = 800) is sampled from these.

Shapes: pictures (P, 3, H, W) in [0, 1], features (P, D), per-prompt numbers (P,); P prompts.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from pydantic import Field
from torch import Tensor

from evaluation.bootstrap import Interval, bootstrap_interval, paired_difference, percentiles, resample_counts
from evaluation.output import progress, save_report
from evaluation.quality import QualityConfig, Subject, check_loras, check_sampling, read_prompts
from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.data.images import crop_square, open_image
from hypersd_ray.embedded import paths
from hypersd_ray.models.lora_file import read_lora
from hypersd_ray.models.rewards.clip import CLIPScore
from hypersd_ray.models.rewards.registry import load_reward
from hypersd_ray.training.randomness import generator_of

SCALE = 1000.0
"""Of Fréchet distances between features of norm 1."""


class SingleStepConfig(Strict):
    """LoRAs, the ones they are compared with, prompts with real pictures, and a CLIP."""

    baselines: tuple[Path, ...]
    """LoRA files to compare with: for each number of steps the one whose file names it first, else the first."""
    loras: tuple[Path, ...] = ()
    """LoRA files of the same teacher."""
    unets: tuple[Path, ...] = ()
    """Folders of whole UNets that `jobs/onestep.py --full-unet` left (unet-...)."""
    clip: RewardConfig
    """A reward by CLIP (clip_score): its image tower makes the features, its score is the other column."""
    pictures: Path = paths.DATA
    """Folder with val-*.tar: the real pictures and their captions, which are the prompts."""
    sampling: QualityConfig = QualityConfig(steps=(1,))
    """Teacher, prompts, steps, sampler, seed; its `loras`, `prompts_file`, `cache`, `out` are not used."""
    resamples: int = Field(default=1000, ge=100)
    """Of the bootstrap."""
    out: Path = Path("runs/onestep.json")
    """The JSON file that is written."""


def tiny() -> SingleStepConfig:
    """The embedded model, its committed TSCD LoRAs as baselines, its CLIP."""
    return SingleStepConfig(
        baselines=tuple(paths.LORAS / f"tscd-k{k}.safetensors" for k in (1, 2, 4, 8)),
        clip=RewardConfig(name="clip_score", checkpoint=str(paths.EVALUATORS / "clip"), role="watch"),
    )


@dataclass(frozen=True)
class Row:
    """One model at one number of steps; `versus`: differences to `baseline` at as many steps.

    `inputs`: the network's, where the sampler's own are not used.
    """

    model: str
    steps: int
    frechet: Interval
    clip_score: Interval
    inputs: tuple[int, ...] = ()
    baseline: str = ""
    versus: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the JSON file holds. `floor`: the real pictures through the autoencoder and back."""

    settings: dict[str, Any]
    loras: dict[str, dict[str, Any]]
    floor: Interval | None = None
    rows: list[Row] = field(default_factory=list)


def real_pictures(folder: Path, prompts: Sequence[str], resolution: int) -> Tensor:
    """(P, 3, resolution, resolution): of each prompt the first picture in `folder`'s val-*.tar whose caption it is.

    Raises:
        ConfigError: a prompt has none.
    """
    wanted, found = set(prompts), dict[str, Tensor]()
    for shard in sorted(folder.glob("val-*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name in members:
                if not name.endswith(".txt"):
                    continue
                caption = tar.extractfile(members[name]).read().decode().strip()  # type: ignore[union-attr]
                picture = members.get(name.removesuffix(".txt") + ".png")
                if caption not in wanted or caption in found or picture is None:
                    continue
                data = tar.extractfile(picture).read()  # type: ignore[union-attr]
                found[caption] = torch.from_numpy(crop_square(open_image(data), resolution)[0].copy())
    missing = [prompt for prompt in prompts if prompt not in found]
    if missing:
        raise ConfigError(f"pictures={folder}: no val-*.tar has a PNG with the caption {missing[0]!r}")
    return torch.stack([found[prompt] for prompt in prompts]).float() / 255


def gaussian(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (R, D) and covariance (R, D, D) of (P, D) features in which row p counts weights (R, P) times."""
    n = weights.sum(1)
    mean = weights @ features / n[:, None]
    second = torch.einsum("rp,pd,pe->rde", weights, features, features)
    return mean, (second - n[:, None, None] * mean[:, :, None] * mean[:, None, :]) / (n[:, None, None] - 1)


# Dowson and Landau 1982; Heusel et al. 2017, Eq. 6
def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussians, (..., D) and (..., D, D) -> (...)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum(-1)
    traces = cov_a.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_b.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * cross


def frechet_samples(
    features: Tensor, real: Tensor, resamples: int, seed: int, chunk: int = 50
) -> tuple[Tensor, Tensor]:
    """The distance of (P, D) features to the real pictures', (), and that of `resamples` draws of prompts, (R,).

    Generated and real picture of a prompt are drawn together, the same for every model of a seed. A resample has fewer
    distinct prompts than there are, which alone makes it farther: the draws are shifted back by their mean excess.
    """
    features, real = features.double(), real.double()
    everything = torch.ones(1, len(features), dtype=torch.float64)
    found = frechet(*gaussian(features, everything), *gaussian(real, everything))[0]
    generator, parts = generator_of(seed, "frechet", len(features), resamples), []
    for first in range(0, resamples, chunk):
        weights = resample_counts(len(features), min(chunk, resamples - first), generator)
        parts.append(frechet(*gaussian(features, weights), *gaussian(real, weights)))
    draws = torch.cat(parts)
    return SCALE * found, SCALE * (draws - draws.mean() + found)


def interval_of(value: Tensor, draws: Tensor) -> Interval:
    """A value () and the percentiles of its resamples (R,)."""
    return percentiles(float(value), draws, (1 - 0.95) / 2)  # as `bootstrap_interval`, to the last bit


def baseline_of(baselines: Sequence[Path], steps: int) -> Path:
    """The one that was made for `steps` steps, else the first."""
    named = [metadata.steps[0] if (metadata := read_lora(path)[1]) else None for path in baselines]
    return next((path for path, n in zip(baselines, named, strict=True) if n == steps), baselines[0])


@dataclass(frozen=True)
class Measured:
    """One model's numbers: the distance with its resamples, CLIP's scores (P,)."""

    distance: Tensor
    draws: Tensor
    scores: Tensor


class Measure:
    """CLIP and the real pictures' features, held once.

    Raises:
        ConfigError: the reward has no image tower.
    """

    def __init__(self, config: SingleStepConfig, prompts: Sequence[str], subject: Subject):
        self.config, self.prompts, self.subject = config, list(prompts), subject
        reward = load_reward(config.clip, config.sampling.device)
        if not isinstance(reward, CLIPScore):
            raise ConfigError(f"clip.name={config.clip.name} has no embedding of pictures: use clip_score")
        self.reward: CLIPScore = reward
        self.pictures = real_pictures(config.pictures, prompts, subject.side)
        self.real = self._features(self.pictures)

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        device = self.config.sampling.device
        parts = pictures.split(self.config.sampling.batch)
        return torch.cat([self.reward.tower.image_embedding(part.to(device)).float().cpu() for part in parts])

    @torch.no_grad()
    def _scores(self, pictures: Tensor) -> Tensor:
        batch, device = self.config.sampling.batch, self.config.sampling.device
        return torch.cat([
            self.reward(pictures[first : first + batch].to(device), self.prompts[first : first + batch]).float().cpu()
            for first in range(0, len(pictures), batch)
        ])  # fmt: skip

    def __call__(self, latents: Tensor) -> Measured:
        """Of latents (P, C, h, w)."""
        decode, batch = self.subject.encoders.decode, self.config.sampling.batch
        pictures = torch.cat([decode(part).cpu() for part in latents.split(batch)]).float() / 255
        seed = self.config.sampling.seed
        distance, draws = frechet_samples(self._features(pictures), self.real, self.config.resamples, seed)
        return Measured(distance, draws, self._scores(pictures))

    def floor(self) -> Measured:
        """The real pictures through the autoencoder: no model that draws with it comes nearer."""
        encode, batch = self.subject.encoders.encode_images, self.config.sampling.batch
        return self(torch.cat([encode(part * 255).float().cpu() for part in self.pictures.split(batch)]))


def evaluate(config: SingleStepConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """The teacher's row, the baselines', then each LoRA's; `log` hears of each as it is done.

    Raises:
        ValueError: a file that is missing or does not fit; one line says which.
    """
    sampling = config.sampling
    check_sampling(sampling)
    if not config.baselines:
        raise ConfigError("baselines: name at least one LoRA to compare with")
    prompts = read_prompts(sampling.model_copy(update={"prompts_file": None}))
    loras = check_loras((*config.baselines, *config.loras))
    subject = Subject(sampling, prompts)
    measure, seed = Measure(config, prompts, subject), sampling.seed
    floor = measure.floor()
    report = Report(config.model_dump(mode="json"), loras, interval_of(floor.distance, floor.draws))

    def add(model: str, steps: int, found: Measured, inputs: tuple[int, ...] = (), beside: str = "",
            theirs: Measured | None = None) -> None:  # fmt: skip
        versus = {}
        if theirs is not None:
            versus["frechet"] = interval_of(found.distance - theirs.distance, found.draws - theirs.draws)
            versus["clip_score"] = paired_difference(found.scores, theirs.scores, seed=seed)
        distance, score = interval_of(found.distance, found.draws), bootstrap_interval(found.scores, seed=seed)
        report.rows.append(Row(model, steps, distance, score, inputs, beside, versus))
        log(f"{model}, {steps} steps: Fréchet {distance.mean:.2f}, CLIP score {score.mean:.2f}")

    add("teacher", sampling.reference_steps, measure(subject.teacher(sampling.reference_steps)))
    names = {lora["path"]: name for name, lora in loras.items()}
    before: dict[int, tuple[str, Measured]] = {}
    for steps in sampling.steps:
        path = baseline_of(config.baselines, steps)
        subject.load_lora(path)
        before[steps] = names[str(path)], measure(subject.student(steps, sampling.sampler))
        add(names[str(path)], steps, before[steps][1], subject.inputs(steps))
    for path in (*config.loras, *config.unets):
        load, name = (subject.load_lora, names[str(path)]) if path in config.loras else (subject.load_unet, path.name)
        load(path)
        for steps in filter(subject.can, sampling.steps):
            found = measure(subject.student(steps, sampling.sampler))
            add(name, steps, found, subject.inputs(steps), *before[steps])
    return report


def table(report: Report) -> str:
    """The rows in Markdown; a difference to the baseline's at as many steps is said in its unit and in per cent."""

    def cell(row: Row, name: str, own: Interval) -> str:
        change = row.versus.get(name)
        if change is None:
            return f"{own:.2f} |"
        share = change.mean / (own.mean - change.mean)
        return f"{own:.2f} | {change:+.2f}, {share:+.1%}"

    lines = [
        "| model | steps | Fréchet distance x 1000 | minus the baseline's | CLIP score | minus the baseline's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report.rows:
        name = f"{row.model} from {', '.join(map(str, row.inputs))}" if row.inputs else row.model
        cells = [cell(row, "frechet", row.frechet), cell(row, "clip_score", row.clip_score)]
        lines.append(f"| {name} | {row.steps} | {' | '.join(cells)} |")
    s = report.settings["sampling"]
    lines += [
        "",
        f"{s['prompts']} prompts with their real pictures, seed {s['seed']}; in brackets 95% bootstrap intervals.",
    ]
    if report.floor is not None:
        lines[-1] += f" The real pictures through the autoencoder are at {report.floor.mean:.2f}."
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    config = parse({"tiny": tiny}, SingleStepConfig, __doc__ or "")
    report = evaluate(config, log=progress)
    print(table(report))
    save_report(config.out, asdict(report))


if __name__ == "__main__":
    run_job(main)
