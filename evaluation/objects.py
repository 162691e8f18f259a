"""Whether generated pictures hold the objects that their prompts name, by class: a detector's average precision.

A prompt says what is in a picture and not where, so a found object counts as right when the prompt names its class and
no better found one has taken that name already. Shapes: n pictures, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.bootstrap import Interval, percentiles, resample_counts
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.training.randomness import generator_of


class ObjectPrecision:
    """Average precision over pictures, and over resamples of them.

    Args:
        found: of each picture, with scores.
        named: the labels that each picture's prompt names; one that is named twice is wanted twice.

    Raises:
        ValueError: they are not of as many pictures, or no label is named at all.
    """

    def __init__(self, found: Sequence[Instances], named: Sequence[Sequence[int]]):
        if len(found) != len(named):
            raise ValueError(f"{len(found)} pictures and {len(named)} lists of named objects: one each")
        if not any(named):
            raise ValueError("no prompt names an object of the detector's classes")
        self.pictures = len(found)
        self.classes = [_Class(label, found, named) for label in sorted({c for labels in named for c in labels})]

    def mean(self, weights: Tensor) -> Tensor:
        """(R, n) how often each picture counts -> (R,) mean over the classes of the area under precision and recall."""
        values = torch.stack([c.average_precision(weights) for c in self.classes])
        return torch.nanmean(values, 0)  # a class that no picture of a resample names has no precision

    def draws(self, resamples: int, seed: int) -> Tensor:
        """(R, n) float64 counts of a bootstrap, the same for every model."""
        return resample_counts(self.pictures, resamples, generator_of(seed, "objects", self.pictures, resamples))


class _Class:
    """Found objects of one class over all pictures, best first: `right` and the picture of each; `wanted` per picture."""

    def __init__(self, label: int, found: Sequence[Instances], named: Sequence[Sequence[int]]):
        self.wanted = torch.tensor([list(labels).count(label) for labels in named], dtype=torch.float64)
        scores, right, where = [], [], []
        for i, instances in enumerate(found):
            assert instances.scores is not None, "found objects have scores"
            of_class = instances.scores[instances.labels == label].sort(descending=True).values.tolist()
            for rank, score in enumerate(of_class):
                scores.append(score)
                right.append(rank < self.wanted[i])
                where.append(i)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        self.right = torch.tensor([right[i] for i in order], dtype=torch.float64)
        self.where = torch.tensor([where[i] for i in order], dtype=torch.long)

    def average_precision(self, weights: Tensor) -> Tensor:
        """(R, n) -> (R,); NaN where no picture names the class."""
        total = weights @ self.wanted
        if not len(self.right):
            return torch.where(total > 0, 0.0, float("nan")).to(weights)
        counts = weights[:, self.where]
        hits = (counts * self.right).cumsum(1)
        precision = hits / counts.cumsum(1).clamp(min=1)
        # the best precision at this or a greater recall, as COCO's and VOC's curves have it
        envelope = precision.flip(1).cummax(1).values.flip(1)
        return (envelope * counts * self.right).sum(1) / total


def object_precision(
    found: Sequence[Instances], named: Sequence[Sequence[int]], resamples: int = 1000, seed: int = 0
) -> tuple[Interval, Tensor]:
    """The average precision with its 95% interval, and its values (R,) over the resamples."""
    precision = ObjectPrecision(found, named)
    whole = precision.mean(torch.ones(1, precision.pictures, dtype=torch.float64)).item()
    values = precision.mean(precision.draws(resamples, seed))
    return percentiles(whole, values), values


def object_precision_difference(ours: tuple[Interval, Tensor], theirs: tuple[Interval, Tensor]) -> Interval:
    """Ours minus theirs, the pictures kept together."""
    return percentiles(ours[0].mean - theirs[0].mean, ours[1] - theirs[1])
