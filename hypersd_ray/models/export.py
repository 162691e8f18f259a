"""LoRA files for other programs, in diffusers' own layout and Kohya's (ComfyUI, A1111, Forge), safetensors only; how they
are sampled; and a LoRA merged into a UNet. Names and shapes as in lora_file.py.

Why not `save_lora_weights`: fed with converted names it silently loses two tensors of three once convolutions are
targets, and it forgets alpha. Here the PEFT names go out as they are, and alpha beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from hypersd_ray.models.checkpoint import FAMILIES, Family
from hypersd_ray.models.lora_file import GUIDANCE, KEPT, PEFT_JSON, LoRAMetadata, check_rank, module_of, pairs_of
from hypersd_ray.models.samplers import TCD_GRID

PIPELINES: dict[Family, str] = {family: name for name, family in FAMILIES.items()}
"""family -> diffusers' pipeline class."""


def save_diffusers_lora(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: LoRAMetadata, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the file that `pipe.load_lora_weights(path)` loads, all of it, with its alpha; returns its path.

    Raises:
        ValueError: `tensors` are not pairs of one rank, that of `metadata`; `path` does not end in .safetensors.
    """
    pairs = pairs_of(tensors, f"LoRA for {path}")
    check_rank(pairs, metadata.rank, f"LoRA for {path}")
    # What diffusers hands to peft.LoraConfig, under the component's prefix (its `_create_lora_config`).
    config = {
        "r": metadata.rank,
        "lora_alpha": float(metadata.alpha),
        "target_modules": list(pairs),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
    }
    strings = {PEFT_JSON: json.dumps({f"unet.{key}": value for key, value in config.items()}, sort_keys=True)}
    named = {}
    for module, (a, b) in pairs.items():
        named[f"unet.{module}.lora_A.weight"], named[f"unet.{module}.lora_B.weight"] = a, b
    return _write(named, path, metadata.to_strings() | _model_spec(metadata) | strings, dtype)


def save_kohya_lora(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: LoRAMetadata, dtype: torch.dtype = torch.float32
) -> Path:
    """Write Kohya's layout, `lora_unet_{module with underscores}.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    SDXL's modules keep diffusers' names too (down_blocks, not input_blocks), as the released LCM and Hyper-SD LoRAs do:
    diffusers, ComfyUI and Forge read both. Returns the path.

    Raises:
        ValueError: as `save_diffusers_lora`, and for a module that Kohya's underscores cannot name without doubt.
    """
    pairs = pairs_of(tensors, f"LoRA for {path}")
    check_rank(pairs, metadata.rank, f"LoRA for {path}")
    named: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        name = module.replace(".", "_")
        if module_of(name) != module:
            raise ValueError(f"LoRA for {path}: module {module} has no name in Kohya's layout; save_diffusers_lora has")
        named[f"lora_unet_{name}.lora_down.weight"], named[f"lora_unet_{name}.lora_up.weight"] = a, b
        named[f"lora_unet_{name}.alpha"] = torch.tensor(float(metadata.alpha))
    # No `lora_adapter_metadata` here: diffusers refuses a file that has both it and alpha tensors.
    alpha, rank = repr(float(metadata.alpha)), str(metadata.rank)
    strings = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}),
        "ss_base_model_version": "sdxl_base_v1-0" if metadata.family == "sdxl" else "sd_v1",
        "ss_sd_model_name": Path(metadata.base_model).name,
    }
    return _write(named, path, metadata.to_strings() | _model_spec(metadata) | strings, dtype)


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], alpha: float) -> None:
    """W := W + (alpha / rank) B A, in place, for each module of `tensors`; `unet` is bare, without adapters.

    Raises:
        ValueError: a module is not in `unet`, or its shape is another.
    """
    for module, (a, b) in pairs_of(tensors, "LoRA").items():
        try:
            weight = cast(Tensor, unet.get_submodule(module).weight)
        except AttributeError:
            raise ValueError(f"LoRA module {module} is not in this UNet: is it of the same base model?") from None
        update = (alpha / a.shape[0]) * (b.float().flatten(1) @ a.float().flatten(1))
        if (len(update), *a.shape[1:]) != tuple(weight.shape):
            raise ValueError(
                f"LoRA of {module} is for weight {(len(update), *a.shape[1:])}, this UNet's is {tuple(weight.shape)}: "
                "is it of the same base model?"
            )
        weight.copy_(weight.float() + update.view(weight.shape).to(weight.device))


def save_unet(unet: UNet2DConditionModel, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a folder for `UNet2DConditionModel.from_pretrained`; `dtype` casts, None keeps. Returns the folder."""
    wrapped = [name for name in unet.state_dict() if ".base." in name]
    assert not wrapped, f"merge the adapters into a bare UNet first (merge_lora): {wrapped[0]}"
    state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in unet.state_dict().items()}
    unet.save_config(folder)
    save_file(state, Path(folder) / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return Path(folder)


def usage(path: str | Path, metadata: LoRAMetadata, base: str | Path | None = None) -> str:
    """Python that loads the LoRA at `path` into a pipeline and samples as it was meant: an import and three lines.

    `base` is where the base model lies on this machine; None takes the metadata's `base_model`, perhaps only a name.
    """
    pipeline, scheduler = PIPELINES[metadata.family], metadata.scheduler
    where = repr(str(base or metadata.base_model))
    grid, call = sampling_arguments(scheduler, metadata.steps[0], metadata.timesteps, metadata.eta, metadata.extra)
    return "\n".join(
        (
            f"from diffusers import {pipeline}, {scheduler}",
            f"pipe = {pipeline}.from_pretrained({where}, "
            f'scheduler={scheduler}.from_pretrained({where}, subfolder="scheduler"{grid}))',
            f"pipe.load_lora_weights({str(path)!r})",
            f'image = pipe("a prompt", {call}).images[0]',
        )
    )


def sampling_arguments(
    scheduler: str, steps: int, timesteps: Sequence[int], eta: float, extra: Mapping[str, str]
) -> tuple[str, str]:
    """What diffusers' scheduler is made with, and its pipeline called with, for a student to be sampled as it was made."""
    grid = {
        "TCDScheduler": f", original_inference_steps={TCD_GRID}",
        "LCMScheduler": "" if timesteps else f", original_inference_steps={TCD_GRID}",
        # clip_sample is on by default, and latents are not within [-1, 1]
        "DDIMScheduler": ', timestep_spacing="trailing", clip_sample=False',
    }.get(scheduler, "")
    noise = f", eta={eta}" if scheduler in ("TCDScheduler", "DDIMScheduler") else ""
    at = f", timesteps={list(timesteps)}" if timesteps else ""
    scale = 3 if extra.get(GUIDANCE) == KEPT else 0
    return grid, f"num_inference_steps={steps}{at}, guidance_scale={scale}{noise}"


def _model_spec(metadata: LoRAMetadata) -> dict[str, str]:
    """Stability's ModelSpec fields, which file browsers show."""
    architecture = "stable-diffusion-xl-v1-base" if metadata.family == "sdxl" else "stable-diffusion-v1"
    best = f"{metadata.steps[0]} step{'s' if metadata.steps[0] > 1 else ''}"
    guidance = "guidance as usual" if metadata.extra.get(GUIDANCE) == KEPT else "no guidance"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{Path(metadata.base_model).name} in {best}",
        "modelspec.description": f"{best} with {metadata.scheduler}, eta {metadata.eta}, {guidance}",
    }


def _write(named: dict[str, Tensor], path: str | Path, strings: dict[str, str], dtype: torch.dtype) -> Path:
    """The file, whole or not at all."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA file must end in .safetensors, loaders take others for pickles")
    path.parent.mkdir(parents=True, exist_ok=True)
    # alpha stays float32: an alpha such as 12.3 has no half-precision value.
    dtypes = {name: torch.float32 if name.endswith(".alpha") else dtype for name in named}
    stored = {name: tensor.detach().to("cpu", dtypes[name]).contiguous() for name, tensor in named.items()}
    part = path.with_name(f"{path.name}.part")
    save_file(stored, part, metadata=strings | {"format": "pt"})
    os.replace(part, path)
    return path
