"""The roles of a full UNet's training, shared out over the workers by DeepSpeed ZeRO."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypersd_ray.config.run import OptimConfig
from hypersd_ray.config.zero import ZeroConfig
from hypersd_ray.diffusion.parameterization import Parameterization
from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.models.roles import EMA, STUDENT, TEACHER, Roles, check_fit
from hypersd_ray.models.shards import Followed, Trained, collect, partitioned, placed, scatter


class ZeroRoles(Roles):
    """Every role but the teacher is a full copy, whose float32 weights (and at stage 3 the computing ones) are shared out.

    The EMA is the average of each worker's share with its share of the student, float32 whatever the networks compute
    in; what is computed with is made from it.

    Args:
        base: makes the base's UNet on the CPU in float32, anew at each call.
        student: the student to begin with, float32; taken over. Base and student are the same on all workers.
        schedule, parameterization: the base's.
        dtype: what all networks compute in.
        device: where.
        optim, zero: how student and fake score learn.
    """

    def __init__(
        self, base: Callable[[], UNet2DConditionModel], student: UNet2DConditionModel, schedule: Schedule,
        parameterization: Parameterization, dtype: torch.dtype, device: torch.device, optim: OptimConfig,
        zero: ZeroConfig,
    ):  # fmt: skip
        self.base, self.optim, self.zero, self.checkpointing = base, optim, zero, False
        teacher = placed(base().requires_grad_(False), device, dtype)
        super().__init__(teacher, schedule, parameterization)
        self.teacher: Any = partitioned(teacher, zero, dtype, device) if zero.teacher else teacher
        self.trained: dict[str, Trained] = {STUDENT: Trained(student, optim, zero, dtype, device)}
        self.followed: dict[str, Followed] = {}
        self.flats: dict[str, list[Tensor]] = {STUDENT: self.trained[STUDENT].flats}
        self.add(EMA, like=STUDENT)

    @property
    def together(self) -> bool:
        return self.zero.stage == 3

    def add(self, role: str, like: str | None = None, trainable: bool = False) -> None:
        student = self.trained[STUDENT]
        if role not in self.flats and trainable:
            self.trained[role] = Trained(self._fresh(), self.optim, self.zero, self.dtype, self.device)
            self.flats[role] = self.trained[role].flats
        elif role not in self.flats:
            network = self._fresh()
            self.flats[role] = [torch.zeros_like(flat).requires_grad_(False) for flat in student.flats]
            scatter(dict(network.named_parameters()), student.pieces, self.flats[role])
            self.followed[role] = Followed(network, student)
            self._publish(role)
        if like is not None:
            self.copy(like, role)

    def _fresh(self) -> UNet2DConditionModel:
        network = self.base()
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def playing(self, role: str) -> AbstractContextManager[nn.Module]:
        """In roles that learn, DeepSpeed's engine, which is called as the network is."""
        if role == TEACHER:
            return nullcontext(self.teacher)
        return nullcontext(self.trained[role].engine if role in self.trained else self.followed[role].network)

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        raise TypeError(f"{role} is shared out over the workers: gather() brings it together")

    def _publish(self, role: str) -> None:
        if role in self.trained:
            self.trained[role].publish()
        else:
            self.followed[role].publish(self.flats[role])

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        for theirs, ours in zip(self.flats[source], self.flats[target], strict=True):
            ours.data.copy_(theirs.data)
        self._publish(target)

    # Algorithm 1, line 16
    @torch.no_grad()
    def ema_update(self, decay: float) -> None:
        torch._foreach_lerp_(self.flats[EMA], [flat.data for flat in self.flats[STUDENT]], 1 - decay)
        self._publish(EMA)

    def load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        pieces = self.trained[STUDENT].pieces
        check_fit({name: piece.shape for name, piece in pieces.items()}, tensors)
        scatter(tensors, pieces, self.flats[role])
        self._publish(role)

    def gather(self, role: str) -> dict[str, Tensor]:
        return dict(collect(self.flats[role], self.trained[STUDENT].pieces, self.device))

    def _own(self, folder: Path) -> Path:
        kind = str(self.dtype).removeprefix("torch.")
        return folder / f"zero{self.zero.stage}-{kind}-{dist.get_world_size()}-workers"

    def save_own(self, folder: Path) -> None:
        if not self.zero.native:
            return
        own = self._own(folder)
        for role, trained in self.trained.items():
            trained.save_own(own / role)
        shares = {f"{role}/{i}": flat.cpu() for role in self.followed for i, flat in enumerate(self.flats[role])}
        save_file(shares, own / f"followed-{dist.get_rank():05d}.safetensors")
        write_manifest(own, dist.get_rank())

    def load_own(self, folder: Path) -> bool:
        own = self._own(folder)
        # Each worker looks on its own node, and all must do the same.
        whole = is_whole(own, dist.get_rank(), dist.get_world_size())
        agreed = torch.tensor(float(whole), device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if not bool(agreed):
            return False
        for role, trained in self.trained.items():
            trained.load_own(own / role)
        shares = load_file(own / f"followed-{dist.get_rank():05d}.safetensors")
        for role in self.followed:
            for i, flat in enumerate(self.flats[role]):
                flat.copy_(shares[f"{role}/{i}"])
            self._publish(role)
        return True

    def checkpoint_activations(self) -> None:
        self.checkpointing = True
        networks = [self.unet, *(trained.network for trained in self.trained.values())]
        for network in networks:
            network.enable_gradient_checkpointing()


def _manifest(rank: int) -> str:
    return f"manifest-{rank:05d}.json"


def _writer(name: str) -> int | None:
    """The rank whose share a file is; None of what rank 0 writes for all."""
    found = re.search(r"(?:pp_rank_|followed-)(\d+)", name)
    return int(found[1]) if found else None


def write_manifest(own: Path, rank: int) -> None:
    """What rank `rank` wrote into `own`, byte by byte: sizes and SHA-256. The others may still be writing theirs."""
    there = [p for p in sorted(own.rglob("*")) if not p.name.startswith((".", "manifest-"))]  # .tmp...: on its way
    mine = [p for p in there if p.is_file() and (_writer(p.name) or 0) == rank]
    files = {p.relative_to(own).as_posix(): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in mine}
    (own / _manifest(rank)).write_text(json.dumps(files))


def is_whole(own: Path, rank: int, world: int) -> bool:
    """What all `world` ranks wrote into `own` is there in its full size, and what rank `rank` reads is as it was written."""
    try:
        for writer in range(world):
            for name, written in json.loads((own / _manifest(writer)).read_text()).items():
                if (own / name).stat().st_size != written["size"]:
                    return False
                if _writer(Path(name).name) in (None, rank) and sha256_of(own / name) != written["sha256"]:
                    return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or no manifest of ours
        return False
    return True
