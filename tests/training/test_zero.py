"""ZeRO over gloo: whatever is shared out, the numbers are those of plain training, and any number of workers goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hypersd_ray.training.checkpoint import load_checkpoint, save_checkpoint
from hypersd_ray.training.distiller import Distiller
from tests.helpers.distil import same, snapshot
from tests.training.zero_parts import step, together, training_of

pytestmark = pytest.mark.cluster
STEPS = 4
WAYS: dict[str, list[dict[str, Any]]] = {
    "tscd": [
        {"stage": 1},
        {"stage": 2},
        {"stage": 2, "offload": True},
        {"stage": 3},
        {"stage": 3, "offload": True, "teacher": True},
    ],
    "onestep": [{"stage": 1, "offload": True}, {"stage": 2}, {"stage": 3}],
}


def state(training: Distiller) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Weights, moments, progress."""
    return snapshot(training), snapshot(training, moments=True), dict(vars(training.progress))


def _learn(rank: int, world: int, folder: Path, kind: str) -> list[Any]:
    """Without ZeRO and in each way: the second step has a NaN on rank 1 alone."""
    found = []
    for zero in [{}, *WAYS[kind]]:
        training = training_of(kind, folder, rank, world, **zero)
        metrics = [step(training, index, bad=index == rank == 1) for index in range(STEPS)]
        found.append((metrics, state(training)))
    return found


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor], part: str) -> float:
    """The distance between two ends of a part's way, as a share of the way."""
    names = [name for name in theirs if name.startswith(f"{part}/")]
    apart, way = (
        torch.cat([(a[name] - b[name]).flatten() for name in names]).norm() for a, b in ((ours, theirs), (theirs, start))
    )
    return float(apart / way)


@pytest.mark.parametrize("kind", WAYS)
def test_every_way_ends_where_plain_training_does(kind, tmp_path):
    first, second = together(_learn, 2, tmp_path, kind)
    plain_metrics, (plain, plain_moments, plain_progress) = first[0]
    assert plain_progress["skipped"] == 1
    start = snapshot(training_of(kind, tmp_path, 0, 1))
    for way, (metrics, (weights, moments, progress)), (_, (none, _, others_progress)) in zip(
        WAYS[kind], first[1:], second[1:], strict=True
    ):
        assert progress == others_progress == plain_progress, way  # the NaN stopped both workers
        # What is shared out is gathered on rank 0 alone; the discriminator is not.
        assert {name.split("/")[0] for name in none} <= {"discriminator"}
        assert weights.keys() == plain.keys() and moments.keys() == plain_moments.keys()
        for part in {name.split("/")[0] for name in plain} - {"discriminator"}:
            # Adam divides by the gradient's own size: where that is next to nothing the sum's rounding shows.
            assert far(weights, plain, start, part) < 2e-3, (way, part)
        for name in plain_moments:
            torch.testing.assert_close(moments[name], plain_moments[name], rtol=1e-2, atol=1e-5)
        for ours, theirs in zip(metrics, plain_metrics, strict=True):
            for name in theirs.keys() - {"grad_norm"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, nan_ok=True), (way, name)
            if theirs["grad_norm"] == theirs["grad_norm"]:
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
