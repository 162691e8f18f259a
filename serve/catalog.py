"""What is there to serve. Plain data: the ingress, which loads no torch, has it too."""

from __future__ import annotations

import math
from typing import Literal, get_args

from hypersd_ray.config.base import Strict
from serve.settings import AUTO_LORA, NO_LORA

Family = Literal["sd", "sdxl"]
Scheduler = Literal["TCDScheduler", "DDIMScheduler", "LCMScheduler"]
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)
"""diffusers' classes that a LoRA may be made for; the bare base is sampled by the first."""


class LoRAInfo(Strict):
    """One LoRA file, as far as its metadata tells."""

    name: str
    path: str
    k: int | None = None
    steps: tuple[int, ...] = ()
    eta: float = 0.0
    keeps_guidance: bool = False
    scheduler: Scheduler = "TCDScheduler"
    timesteps: tuple[int, ...] = ()
    """The network's inputs that it was made for alone, one a step; () where the sampler chooses them."""

    @property
    def sampler(self) -> Scheduler:
        """What it is sampled with: named timesteps are LCM's, whatever the file says."""
        return "LCMScheduler" if self.timesteps else self.scheduler

    def plays(self, steps: int) -> bool:
        """Whether it can be sampled in so many steps."""
        return not self.timesteps or len(self.timesteps) == steps


class Catalog(Strict):
    """What the API offers."""

    id: str
    aliases: tuple[str, ...]
    base: str
    family: Family
    sizes: tuple[str, ...]
    loras: tuple[LoRAInfo, ...]
    default_lora: str
    controlnets: dict[str, str]
    created: int
    examples: tuple[str, ...] = ()

    def lora(self, name: str) -> LoRAInfo | None:
        """The LoRA of that name, if there is one."""
        return next((lora for lora in self.loras if lora.name == name), None)

    def sampler(self, name: str) -> Scheduler:
        """What the LoRA of that name, or the bare base, is sampled with."""
        lora = self.lora(name)
        return "TCDScheduler" if lora is None else lora.sampler

    @property
    def lora_names(self) -> tuple[str, ...]:
        """Every LoRA's name."""
        return tuple(lora.name for lora in self.loras)

    def choose(self, steps: int, guided: bool = False) -> str:
        """The LoRA of a request that names none: of those with the k nearest to `steps`, by the ratio; the base without any.

        Of two at the same ratio it is the larger k: its path has the finer segments. A file that tells no k comes last.

        One that keeps guidance is for requests that ask for some (`guided`); the others cannot have any.
        """
        if self.default_lora != AUTO_LORA:
            return self.default_lora
        able = [lora for lora in self.loras if lora.plays(steps)]
        able = [lora for lora in able if lora.keeps_guidance == guided] or able
        if not able:
            return NO_LORA
        return min(able, key=lambda lora: (abs(math.log(lora.k / steps)), -lora.k) if lora.k else (math.inf, 0)).name
