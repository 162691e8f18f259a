"""A full UNet under Ray Train and ZeRO: killed, started again by Ray, and gone on with by another number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from hypersd_ray.config.base import RunError
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.trainer import keeping, run
from hypersd_ray.trainer.run import train
from tests.trainer.helpers import folder_of, metrics

pytestmark = pytest.mark.cluster

ONE_STAGE = {"k_list": (1,), "n_list": (8,), "steps_list": (6,)}


def broken(told: Path) -> Callable[[dict[str, Any]], None]:
    """The trainer's loop; the first group of workers breaks down at step 3, the second gives up at step 5.

    `told` gets a line from rank 0 each time a checkpoint is looked at: whether it took its own share.
    """
    path = str(told)

    def loop_that_breaks(arguments: dict[str, Any]) -> None:
        from pathlib import Path

        from hypersd_ray.config.base import RunError
        from hypersd_ray.models.zero import ZeroRoles
        from hypersd_ray.trainer import loop

        told, inner, load_own = Path(path), loop.Worker._after_step, ZeroRoles.load_own

        def after_step(worker: Any, metrics: Any) -> None:
            inner(worker, metrics)
            resumed, step = told.exists(), worker.training.progress.step
            if step == 3 and not resumed:
                raise RuntimeError("broken on purpose")
            if step == 5:
                raise RunError("given up on purpose")

        def tell(roles: ZeroRoles, folder: Path) -> bool:
            own = load_own(roles, folder)
            with told.open("a") as file:
                file.write(f"{own}\n")
            return own

        loop.Worker._after_step = after_step  # type: ignore[method-assign]
        ZeroRoles.load_own = tell  # type: ignore[method-assign]
        loop.train_loop(arguments)

    return loop_that_breaks


def test_a_full_unet_is_resumed_by_as_many_workers_and_by_one(cluster, make_config, teacher, tmp_path, monkeypatch):
    two = make_config(
        "zero", full_unet=True, zero={"stage": 2, "bucket": 20_000}, distill=ONE_STAGE,
        optim={"accumulation": 2, "lr": 1e-4}, run={"workers": 2, "checkpoint_every": 2},
    )  # fmt: skip
    monkeypatch.setattr(run, "train_loop", broken(tmp_path / "told"))
    with pytest.raises(RunError, match="given up on purpose"):
        train(two)
    assert (tmp_path / "told").read_text().split() == ["True", "True"]  # the second group, each rank its share
    checkpoint = folder_of(two) / "checkpoint_00000004"
    own = {path.name for path in (checkpoint / "zero2-float32-2-workers" / "student" / "zero").iterdir()}
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)} < own

    monkeypatch.undo()
    one = two.model_copy(
        update={"zero": two.zero.model_copy(update={"stage": 3}), "run": two.run.model_copy(update={"workers": 1})}
    )
    result = train(one)
    assert result.metrics["stage"] == 1 and result.metrics["skipped"] == 0
    steps = [row["step"] for row in metrics(two)]
    assert steps == [1, 2, 3, 3, 4, 5, 5, 6]
    last = Path(result.folder) / "checkpoint_00000006"
    ema, student = (load_file(last / f"{role}.safetensors") for role in ("ema", "student"))
    made = UNet2DConditionModel.from_pretrained(Path(result.folder) / "unet-k1").state_dict()
    base = load_unet(read_base(str(teacher)), torch.float32, "cpu").state_dict()
    assert all(torch.equal(made[name], student[name]) for name in made)
    assert all(not torch.equal(made[name], base[name]) for name in made if name.endswith("to_q.weight"))
    assert any(not torch.equal(ema[name], student[name]) for name in ema)


def test_the_quality_of_shared_out_weights_is_measured_by_all_workers(cluster, make_config):
    config = make_config(
        "measured", full_unet=True, zero={"stage": 3, "bucket": 20_000}, distill=ONE_STAGE | {"steps_list": (2,)},
        measure={"prompts": ("a cat", "a dog"), "steps": (1,), "reference_steps": 2}, run={"workers": 2},
    )  # fmt: skip
    result = train(config)  # a rank that left the others alone with the network would never come back
    (record,) = keeping.read_quality(result.folder)
    assert math.isfinite(record["objective"]) and result.metrics["stage"] == 1
