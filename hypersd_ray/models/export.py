"""LoRA files that other programs read: diffusers' own layout and Kohya's (ComfyUI, A1111, Forge), safetensors only.

Shapes: A (r, in) or (r, in, kh, kw); B (out, r) or (out, r, 1, 1); alpha (). A LoRA is a dict of our names, PEFT's:
`{module}.lora_A.weight`, `{module}.lora_B.weight`, `{module}` as in `UNet2DConditionModel.named_modules()`.

Why not `save_lora_weights`: fed with converted names it silently loses two tensors of three once convolutions are
targets, and it forgets alpha. Here the PEFT names go out as they are, and alpha beside them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd_ray.models.checkpoint import FAMILIES, Family

TCD_GRID = 40
"""`original_inference_steps` that puts TCDScheduler's and LCMScheduler's 1, 2, 4, 5 and 8 steps on the training edges (its default of 50
starts the last of 4 steps at 259 in place of 249, and at 8 steps jumps across an edge)."""

_OURS, _EXTRA = "hypersd_ray.", "hypersd_ray.extra."
_PEFT_JSON = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY, read since 0.34
PIPELINES: dict[Family, str] = {family: name for name, family in FAMILIES.items()}
"""family -> diffusers' pipeline class."""
TIMESTEP = "timestep"
"""Key of `LoRAMetadata.extra`: the network's inputs, comma-separated, of a LoRA that was made for those alone."""
GUIDANCE, KEPT = "guidance", "kept"
"""Key and value of `LoRAMetadata.extra` where a LoRA keeps classifier-free guidance and negative prompts."""


@dataclass(frozen=True)
class LoRAMetadata:
    """What a LoRA file says of itself.

    Attributes:
        base_model: the teacher, as a path or a hub name.
        family: "sd" or "sdxl".
        k: segments of the stage it comes from.
        steps: the step counts it is meant for, the recommended one first.
        scheduler: diffusers' class to sample with.
        eta: that scheduler's eta (TCD's gamma, DDIM's eta); 1 for LCM's, which has none to set and puts all noise back.
        rank, alpha: the update is (alpha / rank) B A.
        recipe: the recipe that made it.
        extra: anything else, text to text.
    """

    base_model: str
    family: Family
    k: int
    steps: tuple[int, ...]
    scheduler: str
    eta: float
    rank: int
    alpha: float
    recipe: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The network's inputs that the LoRA was made for alone; () where a sampler chooses them."""
        named = self.extra.get(TIMESTEP, "")
        return tuple(int(t) for t in named.split(",")) if named else ()

    def to_strings(self) -> dict[str, str]:
        """As safetensors' string-to-string metadata, each key under `hypersd_ray.`."""
        own = {
            "base_model": self.base_model,
            "family": self.family,
            "k": str(self.k),
            "steps": ",".join(map(str, self.steps)),
            "scheduler": self.scheduler,
            "eta": repr(float(self.eta)),
            "rank": str(self.rank),
            "alpha": repr(float(self.alpha)),
            "recipe": self.recipe,
        }
        return {_OURS + k: v for k, v in own.items()} | {_EXTRA + k: v for k, v in self.extra.items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> LoRAMetadata | None:
        """The inverse of `to_strings`; None when `strings` holds nothing of ours.

        Raises:
            ValueError: a field is missing or is not what it should be.
        """
        own = {k.removeprefix(_OURS): v for k, v in strings.items() if k.startswith(_OURS) and not k.startswith(_EXTRA)}
        if not own:
            return None
        try:
            if own["family"] not in PIPELINES:
                raise ValueError(f"family={own['family']!r} is not one of {', '.join(PIPELINES)}")
            return cls(
                base_model=own["base_model"],
                family=cast(Family, own["family"]),
                k=int(own["k"]),
                steps=tuple(int(n) for n in own["steps"].split(",")),
                scheduler=own["scheduler"],
                eta=float(own["eta"]),
                rank=int(own["rank"]),
                alpha=float(own["alpha"]),
                recipe=own.get("recipe", ""),
                extra={k.removeprefix(_EXTRA): v for k, v in strings.items() if k.startswith(_EXTRA)},
            )
        except KeyError as error:
            raise ValueError(f"metadata lacks {_OURS}{error.args[0]}") from None


def save_diffusers_lora(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: LoRAMetadata, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the file that `pipe.load_lora_weights(path)` loads, all of it, with its alpha; returns its path.

    Raises:
        ValueError: `tensors` are not pairs of one rank, that of `metadata`; `path` does not end in .safetensors.
    """
    pairs = _pairs(tensors, f"LoRA for {path}")
    _check_rank(pairs, metadata.rank, f"LoRA for {path}")
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
    strings = {_PEFT_JSON: json.dumps({f"unet.{key}": value for key, value in config.items()}, sort_keys=True)}
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
    pairs = _pairs(tensors, f"LoRA for {path}")
    _check_rank(pairs, metadata.rank, f"LoRA for {path}")
    named: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        name = module.replace(".", "_")
        if _module_of(name) != module:
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


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], LoRAMetadata | None]:
    """Read either layout: float32 tensors under our names, and the metadata if the file is one of ours.

    A file without our metadata has its alpha folded into B, so that its tensors are right at alpha = rank.

    Raises:
        ValueError: not a safetensors file, tensors of unknown names, a pair that is not whole, mixed ranks or alphas;
            one line with the file.
    """
    stored, strings = _read(Path(path))
    try:
        metadata = LoRAMetadata.from_strings(strings)
        if all(name.startswith("lora_unet_") for name in stored):
            tensors, alphas = _from_kohya(stored)
        else:
            tensors, alphas = _from_peft(stored, strings)
        pairs = _pairs(tensors, "LoRA")
        ranks = {a.shape[0] for a, _ in pairs.values()}
        if len(ranks) != 1:
            raise ValueError(f"mixed ranks {sorted(ranks)}; one rank for all modules is what can be loaded")
        rank = ranks.pop()
        if metadata is not None:
            _check_rank(pairs, metadata.rank, "metadata")
            # float32 in the tensors, float64 in the metadata
            wrong = {alpha for alpha in alphas.values() if not math.isclose(alpha, metadata.alpha, rel_tol=1e-6)}
            if wrong:
                raise ValueError(f"metadata says alpha {metadata.alpha}, its tensors say {sorted(wrong)}")
            return tensors, metadata
        for module, alpha in alphas.items():
            if alpha != rank:
                tensors[f"{module}.lora_B.weight"] *= alpha / rank
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tensors, None


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA's tensors, of which `read_lora` has seen that it is one."""
    return next(len(t) for name, t in tensors.items() if name.endswith("lora_A.weight"))


def alpha_of(tensors: Mapping[str, Tensor], metadata: LoRAMetadata | None) -> float:
    """The alpha of what `read_lora` gave: a file without our metadata has its scale in its tensors, so it is the rank."""
    return float(rank_of(tensors)) if metadata is None else metadata.alpha


def read_metadata(path: str | Path) -> LoRAMetadata | None:
    """What a file says of itself, as `read_lora` has it, without reading its tensors.

    Raises:
        ValueError: not a safetensors file, or metadata of ours that is not whole; one line with the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return LoRAMetadata.from_strings(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], alpha: float) -> None:
    """W := W + (alpha / rank) B A, in place, for each module of `tensors`; `unet` is bare, without adapters.

    Raises:
        ValueError: a module is not in `unet`, or its shape is another.
    """
    for module, (a, b) in _pairs(tensors, "LoRA").items():
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


# Identifiers of UNet2DConditionModel that hold an underscore, and the words between them: Kohya's name of a module
# writes "." as "_", so only this list says where the dots were.
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2",
)  # fmt: skip
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")


def _module_of(name: str) -> str | None:
    """`down_blocks_0_resnets_1_conv1` -> `down_blocks.0.resnets.1.conv1`; None when a word is not a UNet's."""
    words, position = [], 0
    while position < len(name):
        match = _WORD.match(name, position)
        if match is None:
            return None
        words.append(match[1])
        position = match.end()
    return ".".join(words)


def _from_kohya(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Our names, and alpha by module."""
    kinds = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": ""}
    tensors, alphas = {}, {}
    for name, tensor in stored.items():
        kohya, _, kind = name.removeprefix("lora_unet_").partition(".")
        module = _module_of(kohya)
        if module is None or kind not in kinds:
            raise ValueError(
                f"unknown tensor {name}; Kohya's are lora_unet_*.lora_down.weight, .lora_up.weight, .alpha"
            )
        if kind == "alpha":
            alphas[module] = tensor.item()
        else:
            tensors[f"{module}.{kinds[kind]}"] = tensor.float()
    return tensors, alphas


def _from_peft(stored: dict[str, Tensor], strings: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Our names, and alpha by module where diffusers' metadata tells it."""
    tensors = {}
    for name, tensor in stored.items():
        if not (name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise ValueError(f"unknown tensor {name}; diffusers' are unet.*.lora_A.weight and unet.*.lora_B.weight")
        tensors[name.removeprefix("unet.")] = tensor.float()
    config = json.loads(strings.get(_PEFT_JSON, "{}"))
    # Each of these changes the scale per module or the formula: reading past them would load another LoRA.
    beyond = [k for k in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if config.get(f"unet.{k}")]
    if beyond:
        raise ValueError(f"{_PEFT_JSON} sets {', '.join(beyond)}; only plain LoRA can be read")
    if "unet.lora_alpha" not in config:
        return tensors, {}
    return tensors, {name.rpartition(".lora_")[0]: float(config["unet.lora_alpha"]) for name in tensors}


def _pairs(tensors: Mapping[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (A, B), in the order given. Raises ValueError for a tensor without its partner, or none at all."""
    pairs = {}
    for name in tensors:
        module, _, kind = name.rpartition(".lora_")
        partner = f"{module}.lora_{'B' if kind == 'A.weight' else 'A'}.weight"
        if kind not in ("A.weight", "B.weight") or partner not in tensors:
            raise ValueError(f"{what}: tensor {name} has no partner {partner}")
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{what}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not multiply")
        pairs[module] = (a, b)
    if not pairs:
        raise ValueError(f"{what}: holds no tensors")
    return pairs


def _check_rank(pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, what: str) -> None:
    for module, (a, _) in pairs.items():
        if a.shape[0] != rank:
            raise ValueError(f"{what}: {module} has rank {a.shape[0]}, the metadata says {rank}: set metadata's rank")


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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {str(error).splitlines()[0]}") from None
