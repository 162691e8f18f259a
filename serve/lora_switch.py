"""One UNet, one LoRA at a time: the update is merged into the weights and taken out again exactly.

Merged, a LoRA costs nothing per step; the base's weights are kept beside, so that switching back is a copy and no
rounding adds up over a million switches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.lora_file import alpha_of, read_lora


@dataclass(frozen=True, eq=False)
class HotLoRA:
    """A LoRA in the device's memory; `tensors` by PEFT's names, float32."""

    name: str
    tensors: Mapping[str, Tensor]
    alpha: float


def load_hot_lora(name: str, path: str, device: torch.device) -> HotLoRA:
    """Read a LoRA file onto `device`.

    Raises:
        ValueError: it is not a LoRA that can be read.
    """
    tensors, metadata = read_lora(path)
    return HotLoRA(name, {n: t.to(device) for n, t in tensors.items()}, alpha_of(tensors, metadata))


class LoRASwitch:
    """Which LoRA, at which scale, is in `unet`'s weights now. Not for several threads at once."""

    def __init__(self, unet: UNet2DConditionModel):
        self.unet = unet
        self.current: tuple[HotLoRA, float] | None = None
        self._base: dict[str, Tensor] = {}  # module -> its weight without any LoRA, kept from the first time it changes

    def use(self, lora: HotLoRA | None, scale: float = 1.0) -> bool:
        """Put `lora` into the weights, whatever was there before goes; whether anything had to change.

        Raises:
            ValueError: the LoRA is not of this UNet; the weights are the base's then.
        """
        wanted = None if lora is None or scale == 0 else (lora, scale)
        if self._is(wanted):
            return False
        self._restore()
        if wanted is not None:
            assert lora is not None
            self._keep(lora)
            try:
                merge_lora(self.unet, lora.tensors, lora.alpha * scale)
            except ValueError:
                self._restore(lora)
                raise
            self.current = wanted
        return True

    def _is(self, wanted: tuple[HotLoRA, float] | None) -> bool:
        if wanted is None or self.current is None:
            return wanted is self.current
        return wanted[0] is self.current[0] and wanted[1] == self.current[1]

    def _modules(self, lora: HotLoRA) -> list[str]:
        return [n.removesuffix(".lora_A.weight") for n in lora.tensors if n.endswith(".lora_A.weight")]

    def _keep(self, lora: HotLoRA) -> None:
        for module in self._modules(lora):
            if module not in self._base:
                try:
                    weight = cast(Tensor, self.unet.get_submodule(module).weight)
                except AttributeError:
                    continue  # merge_lora says what is wrong
                self._base[module] = weight.detach().clone()

    @torch.no_grad()
    def _restore(self, lora: HotLoRA | None = None) -> None:
        touched = lora or (self.current[0] if self.current else None)
        self.current = None
        for module in self._modules(touched) if touched else ():
            if module in self._base:
                cast(Tensor, self.unet.get_submodule(module).weight).copy_(self._base[module])
