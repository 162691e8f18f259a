"""What is in a LoRA file, diffusers' layout or Kohya's (ComfyUI, A1111, Forge): its tensors and what it says of itself.

Shapes: A (r, in) or (r, in, kh, kw); B (out, r) or (out, r, 1, 1); alpha (). A LoRA is a dict of our names, PEFT's:
`{module}.lora_A.weight`, `{module}.lora_B.weight`, `{module}` as in `UNet2DConditionModel.named_modules()`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersd_ray.models.checkpoint import FAMILIES, Family

_OURS, _EXTRA = "hypersd_ray.", "hypersd_ray.extra."
PEFT_JSON = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY, read since 0.34
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
            if own["family"] not in FAMILIES.values():
                raise ValueError(f"family={own['family']!r} is not one of {', '.join(FAMILIES.values())}")
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
        pairs = pairs_of(tensors, "LoRA")
        rank = one_rank(pairs, "LoRA")
        if metadata is not None:
            check_rank(pairs, metadata.rank, "metadata")
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


def alpha_of(tensors: Mapping[str, Tensor], metadata: LoRAMetadata | None) -> float:
    """The alpha of what `read_lora` gave: a file without our metadata has its scale in its tensors, so it is the rank."""
    return float(rank_of(tensors)) if metadata is None else metadata.alpha


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA's tensors, of which `read_lora` has seen that it is one."""
    return next(len(t) for name, t in tensors.items() if name.endswith("lora_A.weight"))


def pairs_of(tensors: Mapping[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
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


def one_rank(pairs: Mapping[str, tuple[Tensor, Tensor]], what: str) -> int:
    """The rank of all modules. Raises ValueError when there are several."""
    ranks = {len(a) for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise ValueError(f"{what}: mixed ranks {sorted(ranks)}; one rank for all modules is what can be used")
    return ranks.pop()


def check_rank(pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, what: str) -> None:
    """Raises ValueError when a module has another rank."""
    for module, (a, _) in pairs.items():
        if a.shape[0] != rank:
            raise ValueError(f"{what}: {module} has rank {a.shape[0]}, the metadata says {rank}: set metadata's rank")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {str(error).splitlines()[0]}") from None


def _from_kohya(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Our names, and alpha by module."""
    kinds = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": ""}
    tensors, alphas = {}, {}
    for name, tensor in stored.items():
        kohya, _, kind = name.removeprefix("lora_unet_").partition(".")
        module = module_of(kohya)
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
    config = json.loads(strings.get(PEFT_JSON, "{}"))
    # Each of these changes the scale per module or the formula: reading past them would load another LoRA.
    beyond = [k for k in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if config.get(f"unet.{k}")]
    if beyond:
        raise ValueError(f"{PEFT_JSON} sets {', '.join(beyond)}; only plain LoRA can be read")
    if "unet.lora_alpha" not in config:
        return tensors, {}
    return tensors, {name.rpartition(".lora_")[0]: float(config["unet.lora_alpha"]) for name in tensors}


# Identifiers of UNet2DConditionModel that hold an underscore, and the words between them: Kohya's name of a module
# writes "." as "_", so only this list says where the dots were.
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2",
)  # fmt: skip
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")


def module_of(name: str) -> str | None:
    """`down_blocks_0_resnets_1_conv1` -> `down_blocks.0.resnets.1.conv1`; None when a word is not a UNet's."""
    words, position = [], 0
    while position < len(name):
        match = _WORD.match(name, position)
        if match is None:
            return None
        words.append(match[1])
        position = match.end()
    return ".".join(words)
