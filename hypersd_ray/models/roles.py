"""One UNet, many roles: teacher, student, EMA and the previous stage's student on one frozen base (or full copies).

Shapes: x_t (B, C, h, w); t (B,) our time 1..T; Conditioning of batch B.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersd_ray.diffusion.guidance import guide
from hypersd_ray.diffusion.parameterization import Parameterization, Prediction, to_prediction
from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.diffusion.solver import Denoiser
from hypersd_ray.models.conditioning import Conditioning, concatenate
from hypersd_ray.models.lora import LCM_TARGETS, Adapters

TEACHER, STUDENT, EMA, PREVIOUS = "teacher", "student", "ema", "previous"
FAKE = "fake"
"""The score of the student's own outputs (distribution matching); trained beside the student."""


class Roles:
    """The networks of a distillation run behind one call: `denoiser(role, conditioning)`.

    The epsilon / v / x0 parameterisation and the shift from our time to the network's index are here and nowhere else.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, parameterization: Parameterization):
        self.unet = unet
        self.device = next(unet.parameters()).device
        self.dtype = next(unet.parameters()).dtype
        self.schedule = schedule.to(self.device)
        self.parameterization = parameterization

    # What a subclass decides: which tensors a role has, and how the network comes to play it.
    def playing(self, role: str) -> AbstractContextManager[nn.Module]:
        """Context in which the returned network plays `role`."""
        raise NotImplementedError

    def add(self, role: str, like: str | None = None, trainable: bool = False) -> None:
        """A new role with the tensors of `like` (None: the base)."""
        raise NotImplementedError

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        """The tensors that make `role` differ from the base, by name, in a fixed order."""
        raise NotImplementedError

    def predict(self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """x0 and eps, float32, that `role` predicts at (x_t, t)."""
        with self.playing(role) as network:
            cond = cond.cast(self.dtype)
            output = network(
                x_t.to(self.dtype), t - 1, cond.prompt_embeds, added_cond_kwargs=cond.added_kwargs()
            ).sample
        alpha_t, sigma_t = self.schedule.at(t)
        return to_prediction(output.float(), x_t.float(), alpha_t, sigma_t, self.parameterization)

    def denoiser(self, role: str, cond: Conditioning) -> Denoiser:
        """`role` with its conditioning bound."""
        return lambda x_t, t: self.predict(role, x_t, t, cond)

    def guided(self, role: str, cond: Conditioning, null: Conditioning, omega: Tensor) -> Denoiser:
        """`role` under classifier-free guidance `omega` (B,); conditional and unconditional run as one batch.

        `null` has batch 1; its size conditioning, if any, is `cond`'s.
        """
        batch = len(omega)
        both = concatenate(cond, null.with_time_ids(None).expand(batch).with_time_ids(cond.time_ids))

        def call(x_t: Tensor, t: Tensor) -> Prediction:
            out = self.predict(role, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
            # x0 and eps are affine in the network's output, so guiding both is guiding the output.
            (x0, x0_null), (eps, eps_null) = out.x0.chunk(2), out.eps.chunk(2)
            return Prediction(guide(x0, x0_null, omega), guide(eps, eps_null, omega))

        return call

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """target := source."""
        for a, b in zip(self.named_tensors(target).values(), self.named_tensors(source).values(), strict=True):
            a.copy_(b)

    # Algorithm 1, line 16
    @torch.no_grad()
    def ema_update(self, decay: float) -> None:
        """ema := decay * ema + (1 - decay) * student."""
        averages: list[Tensor] = list(self.named_tensors(EMA).values())
        students: list[Tensor] = list(self.named_tensors(STUDENT).values())
        torch._foreach_lerp_(averages, students, 1 - decay)

    def load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors by name into a role; raises ValueError when they do not fit."""
        raise NotImplementedError

    def gather(self, role: str) -> dict[str, Tensor]:
        """The role's tensors, whole, by name; all workers ask together, and where weights are shared out only rank 0
        gets them."""
        return {name: p.detach() for name, p in self.named_tensors(role).items()}

    def save_own(self, folder: Path) -> None:
        """Beside what `gather` gives, each worker's share as it is, into `folder`; nothing where nothing is shared."""

    def load_own(self, folder: Path) -> bool:
        """Bring back what `save_own` wrote there, moments too; False when it is not there, not whole on some worker, or of
        other shares: on all workers alike."""
        return False

    @property
    def together(self) -> bool:
        """A network must be called by all workers at once, for each holds a share of it."""
        return False

    def checkpoint_activations(self) -> None:
        """From now on keep only each block's input for the backward pass, and compute the block again there.

        A third more work in the student's pass, for memory that hardly grows with the depth; the same numbers.
        """
        raise NotImplementedError


@contextmanager
def _within(surroundings: AbstractContextManager, network: nn.Module) -> Iterator[nn.Module]:
    """The network, as it is called within `surroundings`."""
    with surroundings:
        yield network


class Plain(Roles):
    """The network as it is, whatever role is asked for: sampling without training."""

    def playing(self, role: str) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.unet)


class LoRARoles(Roles):
    """Every role but the teacher is a low-rank adapter: the base is in memory once."""

    def __init__(
        self, unet: UNet2DConditionModel, schedule: Schedule, parameterization: Parameterization,
        rank: int, alpha: float, targets: tuple[str, ...] = LCM_TARGETS, seed: int = 0,
    ):  # fmt: skip
        super().__init__(unet, schedule, parameterization)
        self.adapters = Adapters(unet, rank, alpha, targets)
        self.adapters.add(STUDENT, trainable=True, seed=seed)
        self.add(EMA, like=STUDENT)

    def add(self, role: str, like: str | None = None, trainable: bool = False) -> None:
        if role not in next(iter(self.adapters.layers.values())).A:
            self.adapters.add(role, trainable)
        if like is not None:
            self.copy(like, role)

    def playing(self, role: str) -> AbstractContextManager[nn.Module]:
        return _within(self.adapters.playing(None if role == TEACHER else role), self.unet)

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self.adapters.named_tensors(role)

    def load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        self.adapters.load(role, tensors)

    def checkpoint_activations(self) -> None:
        def run(block: nn.Module, *inputs: Tensor) -> Tensor:
            # The backward pass runs when another role may be played.
            again = self.adapters.playing(self.adapters.switch.role, again=True)
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

        self.unet.enable_gradient_checkpointing(run)


class FullRoles(Roles):
    """Every role but the teacher is a full copy in float32; the same training loop without LoRA."""

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, parameterization: Parameterization):
        super().__init__(unet, schedule, parameterization)
        self.networks: dict[str, UNet2DConditionModel] = {TEACHER: unet.requires_grad_(False)}
        self.add(STUDENT, trainable=True)
        self.add(EMA)

    def add(self, role: str, like: str | None = None, trainable: bool = False) -> None:
        if role not in self.networks:
            self.networks[role] = copy.deepcopy(self.unet).float().requires_grad_(trainable)
        if like is not None:
            self.copy(like, role)

    def playing(self, role: str) -> AbstractContextManager[nn.Module]:
        if self.dtype == torch.float32 or role == TEACHER:
            return nullcontext(self.networks[role])
        return _within(torch.autocast(self.device.type, self.dtype), self.networks[role])

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        return dict(self.networks[role].named_parameters())

    def load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        own = self.named_tensors(role)
        check_fit({name: p.shape for name, p in own.items()}, tensors)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def checkpoint_activations(self) -> None:
        for role in (TEACHER, STUDENT):  # gradients reach an adversarial student through the teacher's features
            self.networks[role].enable_gradient_checkpointing()


def check_fit(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError when names or shapes of a UNet's tensors are others."""
    differ = sorted(shapes.keys() ^ tensors.keys())
    differ += [name for name in shapes if name in tensors and shapes[name] != tensors[name].shape]
    if differ:
        raise ValueError(
            f"UNet tensors do not fit: {len(differ)} differ in name or shape (first {differ[0]}); "
            "is it of the same base model?"
        )
