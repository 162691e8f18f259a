"""Average precision by class: by hand, and its bootstrap."""

from __future__ import annotations

import pytest
import torch

from evaluation.objects import ObjectPrecision, object_precision, object_precision_difference
from hypersd_ray.models.perception.protocol import Instances


def found(*pairs: tuple[int, float]) -> Instances:
    """Objects of (label, score)."""
    masks = torch.ones(len(pairs), 2, 2, dtype=torch.bool)
    return Instances(masks, torch.tensor([p[0] for p in pairs], dtype=torch.long), torch.tensor([p[1] for p in pairs]))


def value(pictures, named) -> float:
    return object_precision(pictures, named, resamples=100)[0].mean


def test_by_hand():
    # one class, two wanted; best first: right, wrong, right: 1/2 * 1 + 1/2 * 2/3
    assert value([found((0, 0.9)), found((0, 0.8)), found((0, 0.7))], [[0], [], [0]]) == pytest.approx(5 / 6)
    # a second one of the same class in a picture that names one is wrong
    assert value([found((0, 0.9), (0, 0.8)), found((0, 0.7))], [[0], [0]]) == pytest.approx(5 / 6)
    assert value([found((0, 0.9), (0, 0.8)), found((0, 0.7))], [[0, 0], [0]]) == pytest.approx(1)
    # never found: 0; and the mean over the classes
    assert value([found((0, 0.9)), found()], [[0], [1]]) == pytest.approx(0.5)
    # the envelope: a right one below a wrong one lifts nothing above it
    assert value([found((0, 0.2)), found((0, 0.9))], [[0], []]) == pytest.approx(0.5)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match="1 pictures and 2 lists"):
        ObjectPrecision([found()], [[0], [1]])
    with pytest.raises(ValueError, match="no prompt names"):
        ObjectPrecision([found((0, 0.5))], [[]])


def test_the_interval_covers_and_the_difference_is_paired():
    generator = torch.Generator().manual_seed(0)
    named = [[int(i)] for i in torch.randint(3, (200,), generator=generator)]
    hits = torch.rand(200, generator=generator)
    good = [found((n[0] if h < 0.8 else (n[0] + 1) % 3, float(h))) for n, h in zip(named, hits, strict=True)]
    # the same with a tenth of the pictures' objects lost
    worse = [f if i % 10 else found() for i, f in enumerate(good)]
    a, b = (object_precision(pictures, named, resamples=400) for pictures in (good, worse))
    assert a[0].low < a[0].mean < a[0].high
    change = object_precision_difference(b, a)
    assert change.mean == pytest.approx(b[0].mean - a[0].mean) and change.high < 0
    assert change.high - change.low < (a[0].high - a[0].low)
    same = object_precision_difference(a, object_precision(good, named, resamples=400))
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_a_resample_without_a_class_leaves_it_out():
    precision = ObjectPrecision([found((0, 0.9)), found()], [[0], [1]])
    weights = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert precision.mean(weights).tolist() == [1.0, 0.0]
