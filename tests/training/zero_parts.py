"""Runs of the micro UNet under ZeRO, in processes that have a group: what the tests of it share."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.schedule import from_scheduler_config
from hypersd_ray.embedded.text import MAX_TOKENS
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import FullRoles, Roles
from hypersd_ray.models.zero import ZeroRoles
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.onestep import OneStep
from tests.helpers.distil import ADVERSARIAL, make_batch, make_config
from tests.helpers.pipelines import BETAS, micro_unet
from tests.training import onestep_parts

CPU = torch.device("cpu")
BUCKET = 20_000  # a tenth of the micro UNet: several messages


def together(work: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """`work(rank, world, folder, *arguments)` in a group of `world` processes; what each returns."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not forked from this process: after the Rays of other tests it has threads, which a fork would leave in mid-air.
    mp.set_forkserver_preload(["tests.training.test_zero"])
    mp.start_processes(_member, (work, world, str(folder), arguments), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"returned-{rank}.pt", weights_only=False) for rank in range(world)]


def _member(rank: int, work: Callable[..., Any], world: int, folder: str, arguments: tuple) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world, Path(folder), *arguments), f"{folder}/returned-{rank}.pt")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise
    dist.destroy_process_group()


def roles_of(config: TSCDConfig, dtype: torch.dtype = torch.float32) -> Roles:
    """Plain at stage 0. The student starts beside the base, so that no two roles agree."""
    student = micro_unet(seed=1)
    schedule = from_scheduler_config(dict(BETAS))
    if config.zero.stage == 0:
        roles: Roles = FullRoles(micro_unet(), schedule, "epsilon")
        roles.load("student", dict(student.named_parameters()))
        roles.copy("student", "ema")
    else:
        roles = ZeroRoles(micro_unet, student, schedule, "epsilon", dtype, CPU, config.optim, config.zero)
    if config.optim.checkpointing:
        roles.checkpoint_activations()
    return roles


def training_of(
    kind: str, folder: Path, rank: int, world: int, dtype: torch.dtype = torch.float32, **zero: Any
) -> Distiller:
    """`kind` "tscd" or "onestep", over `world` workers, 2 parts of 2 rows each; `zero`: fields of its section.

    The first goes through the teacher's features to the student, the second computes its activations again.
    """
    optim = {"lr": 1e-3, "batch": 12 // world * world, "accumulation": 2, "clip": 0.5, "weight_decay": 0.01}
    common: dict[str, Any] = {"full_unet": True, "zero": {"bucket": BUCKET} | zero, "run": {"workers": world}}
    if kind == "tscd":
        config = make_config(
            folder,
            **common,
            optim=optim,
            distill={"teacher": "previous", "steps_list": (3, 6)},
            adversarial=ADVERSARIAL,
        )
        return Distiller(config, roles_of(config, dtype), Conditioning(torch.full((1, MAX_TOKENS, 32), 0.3)), rank)
    settings = onestep_parts.config(
        folder,
        **common,
        optim=optim | {"checkpointing": True},
        dmd={"guidance": 2.0, "fake_updates": 1},
        consistency_share=0.5,  # of parts of 2 rows
    )
    return OneStep(settings, roles_of(settings, dtype), onestep_parts.null_of(), rank)


def step(training: Distiller, index: int, bad: bool = False) -> dict[str, float]:
    """One step on rows that are a function of rank and `index`; `bad` puts a NaN into this rank's."""
    rows = training.config.optim.batch // training.config.run.workers
    batch = make_batch(100 * index + training.rank, rows)
    if bad:
        batch.x0[-1], batch.cond.prompt_embeds[-1] = torch.nan, torch.nan
    metrics = {name: float(value) for name, value in training.step(batch).items()}
    if training.progress.step == training.steps:
        training.next_stage()
    return metrics
