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

pytestmark = pytest.mark.processes
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
    """Without ZeRO and in each way: the second step has a NaN on rank 1 alone, the third in the discriminator alone."""
    found = []
    for zero in [{}, *WAYS[kind]]:
        training, metrics = training_of(kind, folder, rank, world, **zero), []
        for index in range(STEPS):
            if index == 2 and training.adversary is not None:
                next(training.adversary.network.parameters()).register_hook(lambda g: g * torch.nan)
            metrics.append(step(training, index, bad=index == rank == 1))
        found.append((metrics, state(training)))
    return found


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor], part: str) -> float:
    """The distance between two ends of a part's way, as a share of the way."""
    names = [name for name in theirs if name.startswith(f"{part}/")]
    apart, way = (
        torch.cat([(a[name] - b[name]).flatten() for name in names]).norm()
        for a, b in ((ours, theirs), (theirs, start))
    )
    return float(apart / way)


@pytest.mark.parametrize("kind", WAYS)
def test_every_way_ends_where_plain_training_does(kind, tmp_path):
    first, second = together(_learn, 2, tmp_path, kind)
    plain_metrics, (plain, plain_moments, plain_progress) = first[0]
    assert plain_progress["skipped"] == {"tscd": 2, "onestep": 1}[kind]
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


def _twenty(rank: int, world: int, folder: Path) -> list[Any]:
    """Twenty steps at each stage."""
    found = []
    for stage in range(4):
        training = training_of("onestep", folder, rank, world, stage=stage)
        c = training.config  # no more than the comparison needs: two rows a worker, in one part
        training.config = c.model_copy(
            update={
                "distill": c.distill.model_copy(update={"steps_list": (20,)}),
                "optim": c.optim.model_copy(update={"batch": 2 * world, "accumulation": 1}),
            }
        )
        for index in range(20):
            step(training, index)
        found.append(state(training))
    return found


@pytest.mark.slow
def test_after_twenty_steps_all_stages_are_where_plain_training_is(tmp_path):
    (plain, _, progress), *others = together(_twenty, 2, tmp_path)[0]
    assert progress["skipped"] == 0
    start = snapshot(training_of("onestep", tmp_path, 0, 1))
    for stage, (weights, _, theirs) in enumerate(others, start=1):
        assert theirs == progress
        for part in {name.split("/")[0] for name in plain}:
            assert far(weights, plain, start, part) < 5e-3, (stage, part)


def _break(rank: int, world: int, folder: Path, kind: str, dtype: torch.dtype, zero: dict[str, Any]) -> list[Any]:
    """The run, saved after two steps; its third; and both again from DeepSpeed's checkpoint and from the portable one."""
    whole, saved = training_of(kind, folder, rank, world, dtype, **zero), folder / "saved"
    for index in range(2):
        step(whole, index)
    save_checkpoint(saved, whole, rank)
    whole.roles.save_own(saved)
    found = [state(whole)]
    step(whole, 2)
    found.append(state(whole))
    own = next(saved.glob("zero*-workers"))
    for there in ("whole", "damaged", "gone"):  # DeepSpeed's
        dist.barrier()
        again, taken = training_of(kind, folder, rank, world, dtype, **zero), []
        inner = again.roles.load_own
        again.roles.load_own = lambda folder, inner=inner, taken=taken: taken.append(inner(folder)) or taken[-1]
        load_checkpoint(saved, again)
        assert taken == [there == "whole"]
        found.append(state(again))
        step(again, 2)
        found.append(state(again))
        dist.barrier()
        if rank == 0 and there == "whole":  # what rank 1 alone reads, in its right size
            share = next(own.glob("student/zero/*pp_rank_1_*optim_states.pt"))
            share.write_bytes(share.read_bytes()[:-1] + b"?")
        if rank == 0 and there == "damaged":
            shutil.rmtree(own)
    return found


def _go_on(rank: int, world: int, folder: Path, kind: str, ways: list[dict[str, Any]]) -> list[Any]:
    """From the portable checkpoint, in each way: as it is loaded, and after one more step."""
    found = []
    for zero in ways:
        training = training_of(kind, folder, rank, world, **zero)
        load_checkpoint(folder / "saved", training)
        found.append(state(training))
        step(training, 2)
        found.append(state(training))
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "zero"),
    [
        ("onestep", torch.float32, {"stage": 2}),
        ("tscd", torch.bfloat16, {"stage": 3, "offload": True, "teacher": True}),
    ],
    ids=["onestep-2", "tscd-3"],
)
def test_a_run_of_two_goes_on_with_two_one_and_three(kind, dtype, zero, tmp_path):
    (saved, after, *again), _ = together(_break, 2, tmp_path, kind, dtype, zero)
    assert any(name.endswith("/step") for name in saved[1])
    for expected, got in zip([saved, after] * 3, again, strict=True):  # bit for bit
        assert same(expected[0], got[0]) and same(expected[1], got[1]) and expected[2] == got[2]
    for world in (1, 3):
        loaded, plain, other, ended = together(_go_on, world, tmp_path, kind, [{}, {"stage": 3 - world // 2}])[0]
        for got in (loaded, other):
            assert same(saved[0], got[0]) and same(saved[1], got[1]) and saved[2] == got[2]
        for part in {name.split("/")[0] for name in plain[0]}:
            if not same(*({n: t for n, t in w.items() if n.startswith(f"{part}/")} for w in (plain[0], saved[0]))):
                assert far(ended[0], plain[0], saved[0], part) < 2e-3, (world, part)


def _in_bfloat16(rank: int, world: int, folder: Path) -> list[Any]:
    """Without ZeRO in float32, then each way in bfloat16; a tiny step at last, that bfloat16 would not feel."""
    found = []
    for zero, dtype in [({}, torch.float32), *(({"stage": stage}, torch.bfloat16) for stage in (1, 2, 3))]:
        training = training_of("onestep", folder, rank, world, dtype, **zero)
        for index in range(2):
            step(training, index)
        before = snapshot(training)
        training.config = training.config.model_copy(
            update={"optim": training.config.optim.model_copy(update={"lr": 1e-7})}
        )
        step(training, 2, bad=False)
        found.append((before, snapshot(training)))
    return found


def test_bfloat16_keeps_its_weights_in_float32(tmp_path):
    (plain, _), *others = together(_in_bfloat16, 2, tmp_path)[0]
    start = snapshot(training_of("onestep", tmp_path, 0, 1))
    for before, after in others:
        for part in ("student", "fake"):
            assert far(before, plain, start, part) < 0.4, part  # in plain bfloat16 most steps would be lost
            moved = [(after[n] - t).abs().max() for n, t in before.items() if n.startswith(f"{part}/")]
            assert 0 < float(max(moved)) < 1e-6
