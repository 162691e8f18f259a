"""From judged pictures to numbers with intervals: one measure a column, each with its card.

Shapes: P prompts, R resamples; values (P,), draws (R,), features (P, D) of norm 1, latents (P, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.bootstrap import Interval, percentiles, resample_counts, resampled_means, training_noise
from evaluation.harness.judges import FEATURES, OBJECTS, JudgeSpec, MetricCard, reward_card
from evaluation.harness.subjects import Cell, by_weights
from evaluation.objects import object_precision
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.training.randomness import generator_of

LATENTS = "latents"
"""What fidelity reads in place of a judge's values."""


@dataclass(frozen=True, eq=False)
class Values:
    """One number a prompt, (P,) or of several trainings (S, P), NaN where it is missing; the mean is the column's."""

    values: Tensor

    @property
    def each(self) -> Tensor:
        """(S, P)."""
        return torch.atleast_2d(self.values)

    @property
    def there(self) -> Tensor:
        """(P,) whether a prompt has all its numbers."""
        return ~self.each.isnan().any(0)

    @property
    def missing(self) -> int:
        """Prompts without a number."""
        return int((~self.there).sum())

    def interval(self, resamples: int, seed: int) -> Interval:
        """The mean and its interval over trainings and the prompts that have a number."""
        there = self.each[:, self.there]
        if there.shape[1] < 2:
            return Interval(math.nan, math.nan, math.nan)
        return percentiles(there.mean().item(), resampled_means(there, resamples, seed))

    def minus(self, other: Values, resamples: int, seed: int) -> Interval:
        """The difference over the prompts that both have, kept together; each model's trainings are drawn apart."""
        both = self.there & other.there
        if int(both.sum()) < 2:
            return Interval(math.nan, math.nan, math.nan)
        a, b = self.each[:, both], other.each[:, both]
        draws = resampled_means(a, resamples, seed, 0) - resampled_means(b, resamples, seed, 1)
        return percentiles((a.mean() - b.mean()).item(), draws)


@dataclass(frozen=True, eq=False)
class Draws:
    """A number of the whole set, and its resamples. `centred`: the resamples' spread around their own mean is put around
    the point, for numbers that resampling shifts (it repeats pictures, which lowers diversity and raises MMD)."""

    point: float
    draws: Tensor
    centred: bool = False
    missing: int = 0

    def interval(self, resamples: int, seed: int) -> Interval:
        """The 95% interval."""
        draws = self.draws.double()
        if self.centred:
            draws = draws - draws.mean() + self.point
        return percentiles(self.point, draws)

    def minus(self, other: Draws, resamples: int, seed: int) -> Interval:
        """The difference with the prompts kept together."""
        return Draws(self.point - other.point, self.draws - other.draws, self.centred).interval(resamples, seed)


Estimate = Values | Draws
Read = Callable[[Cell, str], np.ndarray]
"""(cell, judge's name or LATENTS) -> its values, prompts first."""
Keep = Callable[[Cell, Callable[[], Draws]], Draws]
"""(cell, how to work out its draws) -> the draws: worked out, or as they were kept by an evaluation before."""


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        card: what stands behind it.
        estimate: (cells of one model at one number of steps, Read) -> the number; None where these cells have none.
        cases: (a model's cells, Read) -> (P,) what says which of the first cell's pictures are best and worst; None where
            nothing does. The card's `cases` says what it is.
    """

    card: MetricCard
    estimate: Callable[[Sequence[Cell], Read], Estimate | None]
    cases: Callable[[Sequence[Cell], Read], np.ndarray | None]

    @property
    def name(self) -> str:
        """The card's."""
        return self.card.name


def reward_measure(spec: JudgeSpec) -> Measure:
    """A reward model's mean."""
    return Measure(
        reward_card(spec),
        lambda cells, read: mean_values(cells, [read(c, spec.name) for c in cells]),
        lambda cells, read: read(cells[0], spec.name),
    )


def mean_values(cells: Sequence[Cell], arrays: Sequence[np.ndarray]) -> Values:
    """Of cells, prompt by prompt: the mean over those of one training, a row a training. A prompt is missing where any
    cell lacks it."""
    of_weights: dict[str, list[np.ndarray]] = {}
    for cell, array in zip(cells, arrays, strict=True):
        of_weights.setdefault(cell.weights_sha256, []).append(array.astype(np.float64))
    each = np.stack([np.stack(parts).mean(0) for parts in of_weights.values()])
    return Values(torch.from_numpy(each if len(each) > 1 else each[0]))


def fidelity_measure(references: dict[int, Cell], steps: int, guidance: float) -> Measure:
    """Distance of the latents to where the teacher's ODE ends from the same noise."""
    card = MetricCard(
        "distance", "distance to teacher", f"none: latents against the teacher's {steps} DDIM steps at guidance {guidance:g}",
        next((cell.base_sha256 for cell in references.values()), ""),
        "latents as they are, same noise", "mean squared difference / variance of the reference latents; 0 is the teacher", "lower",
    )  # fmt: skip

    def estimate(cells: Sequence[Cell], read: Read) -> Estimate | None:
        parts = []
        for cell in cells:
            if cell.seed not in references:
                return None
            ends = torch.from_numpy(read(references[cell.seed], LATENTS))
            latents = torch.from_numpy(read(cell, LATENTS))
            if latents.shape != ends.shape:
                return None
            parts.append(((latents - ends).square().flatten(1).mean(1) / ends.var()).numpy())
        return mean_values(cells, parts)

    def cases(cells: Sequence[Cell], read: Read) -> np.ndarray | None:
        found = estimate(cells[:1], read)
        return found.values.numpy() if isinstance(found, Values) else None

    return Measure(card, estimate, cases)


def vendi(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Vendi score (Friedman, Dieng 2022) of features (P, D) of norm 1 under the cosine kernel: exp of the entropy of the
    eigenvalues of K / P; 1 when all are alike, P when all are orthogonal. `weights` (R, P) counts -> (R,)."""
    x = features.double()
    if weights is None:
        weights = torch.ones(1, len(x), dtype=torch.float64)
    shares = weights / weights.sum(1, keepdim=True)
    # K's eigenvalues are those of X^T X, which is D by D
    values = torch.stack([torch.linalg.eigvalsh((x * w.unsqueeze(1)).T @ x) for w in shares]).clamp(min=0)
    values = values / values.sum(1, keepdim=True)
    return torch.special.entr(values).sum(1).exp()


def counts(prompts: int, resamples: int, seed: int) -> Tensor:
    """(R, P) how often each prompt is in each resample, the same for every model."""
    return resample_counts(prompts, resamples, generator_of(seed, "counts", prompts, resamples))


def work_out(cell: Cell, draws: Callable[[], Draws]) -> Draws:
    """A `Keep` that keeps nothing."""
    return draws()


def averaged(of_cell: Callable[[Cell, Read], Draws], keep: Keep = work_out) -> Callable[[Sequence[Cell], Read], Draws]:
    """The mean over cells of a number of a cell, each worked out once: it is asked for alone and among others. In each
    resample trainings count too; the prompts in it are the same for all."""
    kept: dict[str, Draws] = {}

    def estimate(cells: Sequence[Cell], read: Read) -> Draws:
        for cell in cells:
            if cell.key not in kept:
                kept[cell.key] = keep(cell, lambda cell=cell: of_cell(cell, read))  # type: ignore[misc]
        of_weights = {weights: [kept[cell.key] for cell in of] for weights, of in by_weights(cells).items()}
        each = torch.stack([torch.stack([e.draws for e in parts]).mean(0) for parts in of_weights.values()])
        all_of_them = [e for parts in of_weights.values() for e in parts]
        points = torch.tensor([sum(e.point for e in parts) / len(parts) for parts in of_weights.values()])
        noise = training_noise(
            points, each.shape[1], generator_of(0, "trainings", *of_weights)
        )  # models differ in them
        draws = each.mean(0) + noise
        return Draws(points.mean().item(), draws, all_of_them[0].centred, sum(e.missing for e in all_of_them))

    return estimate


def _whole_set(measure: Callable[[Tensor, Tensor | None], Tensor], resamples: int, seed: int, keep: Keep) -> Callable:
    """The estimate of a measure of all pictures of a cell."""

    def of_cell(cell: Cell, read: Read) -> Draws:
        features = torch.from_numpy(read(cell, FEATURES))
        there = ~features.isnan().any(1)
        draw = counts(len(features), resamples, seed)[:, there]
        point = measure(features[there], None).item()
        return Draws(point, measure(features[there], draw), True, int((~there).sum()))

    return averaged(of_cell, keep)


def vendi_measure(spec: JudgeSpec, resamples: int, seed: int, keep: Keep = work_out) -> Measure:
    """Diversity over all prompts."""
    card = MetricCard(
        "vendi", "Vendi score", f"image features of the judge clip_score, cosine kernel, {resamples} resamples", spec.sha256,
        "as CLIP score", "effective number of different pictures among all prompts", cases="1 - mean cosine to the other pictures",
        note="pictures that leave the prompts raise it too: read it beside CLIP score",
    )  # fmt: skip
    return Measure(
        card,
        _whole_set(lambda x, w: vendi(x, w), resamples, seed, keep),
        lambda cells, read: apart(_features(cells[0], read)).numpy(),
    )


def _features(cell: Cell, read: Read) -> Tensor:
    return torch.from_numpy(read(cell, FEATURES)).double()


def apart(features: Tensor) -> Tensor:
    """(P, D) of norm 1 -> (P,) 1 - mean cosine to the others."""
    there = ~features.isnan().any(1)
    others = features[there].sum(0) - features
    return 1 - (features * others).sum(1) / max(1, int(there.sum()) - 1)


def seed_measure(spec: JudgeSpec) -> Measure:
    """Diversity between pictures of one prompt."""
    card = MetricCard(
        "between_seeds", "diversity between seeds", "image features of the judge clip_score", spec.sha256, "as CLIP score",
        "1 - mean cosine of the pictures of one prompt from different noise",
        note="papers have LPIPS here (--judges.lpips), whose AlexNet no package ships",
    )  # fmt: skip

    def estimate(cells: Sequence[Cell], read: Read) -> Estimate | None:
        several = [torch.stack([_features(c, read) for c in of]) for of in by_weights(cells).values() if len(of) > 1]
        if not several:
            return None
        each = torch.stack([between_seeds(parts) for parts in several])
        return Values(each if len(each) > 1 else each[0])

    def cases(cells: Sequence[Cell], read: Read) -> np.ndarray | None:
        found = estimate(by_weights(cells)[cells[0].weights_sha256], read)
        return found.values.numpy() if isinstance(found, Values) else None

    return Measure(card, estimate, cases)


def between_seeds(features: Tensor) -> Tensor:
    """(S, P, D) of norm 1, S seeds -> (P,) 1 - mean cosine of the pairs."""
    seeds = len(features)
    total = features.sum(0).square().sum(1)  # sum over all ordered pairs, the S equal ones included
    return 1 - (total - seeds) / (seeds * (seeds - 1))


def cmmd(x: Tensor, y: Tensor, weights: Tensor | None = None, sigma: float = 10.0, scale: float = 1000.0) -> Tensor:
    """CMMD (Jayasumana et al. 2024): scale * MMD^2 of features x (P, D) and y (N, D) under a Gaussian kernel of width
    sigma, diagonals included. `weights` (R, P) counts of x -> (R,)."""
    x, y = x.double(), y.double()
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2))
    if weights is None:
        weights = torch.ones(1, len(x), dtype=torch.float64)
    w = weights / weights.sum(1, keepdim=True)
    within = ((w @ kernel(x, x)) * w).sum(1)
    return scale * (within + kernel(y, y).mean() - 2 * w @ kernel(x, y).mean(1))


def cmmd_measure(
    spec: JudgeSpec, real: Tensor, where: str, resamples: int, seed: int, keep: Keep = work_out
) -> Measure:
    """Distance of all pictures to real ones."""
    card = MetricCard(
        "cmmd", "CMMD", f"image features of the judge clip_score, against {len(real)} real pictures ({where})", spec.sha256,
        "as CLIP score", "1000 x MMD^2, Gaussian kernel of width 10", "lower",
        note="its authors take ViT-L/14 at 336 px. The paper reports no such number: it finds that FID does not reflect the "
        "quality of the pictures well",
        cases="1000 x mean kernel to the model's own pictures less that to the real ones",
    )  # fmt: skip
    return Measure(
        card, _whole_set(lambda x, w: cmmd(x, real, w), resamples, seed, keep),
        lambda cells, read: unlike(_features(cells[0], read), real).numpy(),
    )  # fmt: skip


def unlike(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> Tensor:
    """(P, D), (N, D) -> (P,) how much more each of x is like x than like y: CMMD's kernel, whose mean over x it pulls up."""
    x, y = x.double(), y.double()
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2))
    return scale * (kernel(x, x[~x.isnan().any(1)]).mean(1) - kernel(x, y).mean(1))


def objects_measure(
    spec: JudgeSpec, named: Sequence[Sequence[int]], resamples: int, seed: int, keep: Keep = work_out
) -> Measure:
    """Average precision of the objects that prompts name."""
    card = MetricCard(
        "objects", "objects", "SOLO", spec.sha256, "as its checkpoint asks",
        "average precision of the objects that the prompts name, by class",
        cases="mean over the named objects of the surest score that each was found with",
    )  # fmt: skip

    def of_cell(cell: Cell, read: Read) -> Draws:
        found = read(cell, OBJECTS)
        failed = np.asarray(np.isnan(found).any((1, 2)))
        asked = [() if lost else labels for lost, labels in zip(failed, named, strict=True)]
        interval, values = object_precision([_instances(f) for f in found], asked, resamples, seed)
        return Draws(interval.mean, values, False, int(failed.sum()))

    def cases(cells: Sequence[Cell], read: Read) -> np.ndarray:
        found = read(cells[0], OBJECTS)
        surest = lambda f, label: max((float(score) for one, score in f if one == label), default=0.0)
        return np.array([
            np.mean([surest(f, label) for label in labels]) if len(labels) and not np.isnan(f).any() else np.nan
            for f, labels in zip(found, named, strict=True)
        ])  # fmt: skip

    return Measure(card, averaged(of_cell, keep), cases)


def _instances(found: np.ndarray) -> Instances:
    kept = torch.from_numpy(found[found[:, 0] >= 0])
    return Instances(torch.zeros(len(kept), 1, 1, dtype=torch.bool), kept[:, 0].long(), kept[:, 1])
