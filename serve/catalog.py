"""What is there to serve. Plain data: the ingress, which loads no torch, has it too."""

from __future__ import annotations

from typing import Literal

from hypersd_ray.config.base import Strict
from serve.settings import AUTO_LORA, NO_LORA

Family = Literal["sd", "sdxl"]


class LoRAInfo(Strict):
    """One LoRA file, as far as its metadata tells."""

    name: str
    path: str
    k: int | None = None
    steps: tuple[int, ...] = ()
    eta: float = 0.0
    keeps_guidance: bool = False


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

    @property
    def lora_names(self) -> tuple[str, ...]:
        """Every LoRA's name."""
        return tuple(lora.name for lora in self.loras)

    def choose(self, steps: int) -> str:
        """The LoRA of a request that names none: made for `steps`, else the one for the fewest; the base without any."""
        if self.default_lora != AUTO_LORA:
            return self.default_lora
        if not self.loras:
            return NO_LORA
        exact = [lora for lora in self.loras if lora.k == steps]
        return (exact or sorted(self.loras, key=lambda lora: (lora.k is None, lora.k)))[0].name
