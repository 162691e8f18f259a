"""ZeRO on two workers over gloo: whatever is shared out, the numbers are those of plain training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distil import snapshot
from tests.training.zero_parts import step, together, training_of

pytestmark = pytest.mark.cluster
STEPS = 4


def _learn(rank: int, world: int, folder: Path, kind: str) -> dict[int, Any]:
    found = {}
    for stage in range(4):
        training = training_of(kind, folder, rank, world, stage)
        metrics = [step(training, index) for index in range(STEPS)]
        found[stage] = (metrics, snapshot(training), snapshot(training, moments=True), vars(training.progress))
    return found


@pytest.mark.parametrize("kind", ["tscd", "onestep"])
def test_every_stage_gives_the_weights_of_none(kind, tmp_path):
    first, second = together(_learn, 2, tmp_path, kind)
    plain_metrics, plain, plain_moments, _ = first[0]
    for stage in (1, 2, 3):
        metrics, weights, moments, progress = first[stage]
        assert progress == second[stage][3] and progress["skipped"] == 0 and progress["step"] == STEPS
        assert not second[stage][1]  # what is shared out is gathered on rank 0 alone
        assert weights.keys() == plain.keys() and moments.keys() == plain_moments.keys()
        for name in plain:
            torch.testing.assert_close(weights[name], plain[name], rtol=1e-3, atol=1e-5, msg=f"{stage} {name}")
        for name in plain_moments:
            torch.testing.assert_close(moments[name], plain_moments[name], rtol=1e-2, atol=1e-6)
        for ours, theirs in zip(metrics, plain_metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
