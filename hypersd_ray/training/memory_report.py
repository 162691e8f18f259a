"""What `--plan` prints: each way of sharing out a full UNet's training, what a worker holds in it, and the one to take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.config.zero import ZeroConfig
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.training.memory_plan import ACTIVATIONS, COLUMNS, Plan, cheapest, plan, sizes_of, ways

GB = 1e9
RESERVE = 0.08
"""Share of a GPU's memory that no tensor of ours gets: CUDA's context, NCCL's buffers, gaps in the allocator's blocks."""

PUBLISHED_FACTOR = 8
"""Pixels of a picture's side to one of its latents', of SD1.5's and SDXL's autoencoder."""


@dataclass(frozen=True)
class Model:
    """A UNet's config.json, its latents' side, and the tokens of a prompt."""

    unet_config: dict[str, Any]
    size: int
    tokens: int = 77


def model_of(config: TSCDConfig) -> Model:
    """What the teacher's JSON files and the data's resolution say.

    Raises:
        ValueError: it is no pipeline folder.
    """
    info = read_base(config.teacher)
    factor = info.latent_factor if (info.path / "vae" / "config.json").is_file() else PUBLISHED_FACTOR
    text = _json(info.path / "text_encoder" / "config.json")
    return Model(info.unet_config, config.data.resolution // factor, int(text.get("max_position_embeddings", 77)))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def plans_of(config: TSCDConfig, model: Model) -> list[Plan]:
    """All ways of `config`'s workers to train it in full."""
    return [
        plan(config, model.unet_config, model.size, config.run.workers, way, model.tokens) for way in ways(config.zero)
    ]


def said(zero: ZeroConfig) -> str:
    """The options that ask for it."""
    flags = [f"--zero.stage {zero.stage}"]
    flags += [f"--zero.{name}" for name in ("offload", "teacher") if getattr(zero, name)]
    return " ".join(flags)


def table(plans: list[Plan], room: float) -> str:
    """One line a way, in GB; what is over `room` bytes is said."""
    names = [said(made.zero) for made in plans]
    width = max(map(len, names))
    heads = [*COLUMNS, "GPU", "CPU", "sent"]
    lines = [" ".join([" " * width, *(f"{head:>11}" for head in heads)])]
    for name, made in zip(names, plans, strict=True):
        numbers = [*(made.gpu[column] for column in COLUMNS), made.total, made.host, made.moved]
        over = "" if made.total <= room else "  does not fit"
        lines.append(" ".join([f"{name:<{width}}", *(f"{number / GB:>11.3g}" for number in numbers)]) + over)
    return "\n".join(lines)


def report(config: TSCDConfig, model: Model, gpu_memory: float) -> str:
    """The table, and the cheapest way that fits into GPUs of `gpu_memory` GB: it sends the fewest bytes in a step.

    Raises:
        ConfigError: none fits; one line with the least that is needed and the setting to change.
    """
    room = gpu_memory * GB * (1 - RESERVE)
    plans = plans_of(config, model)
    chosen = cheapest(plans, room)
    if chosen is None:
        raise ConfigError(_nothing_fits(config, model, plans, gpu_memory, room))
    optim, workers = config.optim, config.run.workers
    rows = -(-optim.batch // (workers * optim.accumulation))
    numbers = sizes_of(model.unet_config, config.zero).all
    lines = [
        f"UNet of {numbers / 1e6:.1f} million weights, latents {model.size}x{model.size}, {config.run.precision}; "
        f"{workers} workers, each {optim.accumulation} parts of {rows} images a step; "
        f"optim.checkpointing={optim.checkpointing}",
        "GB of a worker: on its GPU by what holds them, in all, in the CPU's memory, and sent in a step",
        "",
        table(plans, room),
        "",
        f"fits into {room / GB:.1f} GB ({gpu_memory:g} less {RESERVE:.0%}) and sends least: {said(chosen.zero)}",
    ]
    return "\n".join(lines)


def _nothing_fits(config: TSCDConfig, model: Model, plans: list[Plan], gpu_memory: float, room: float) -> str:
    """The least of all ways, and what would make it fit."""
    least = min(plans, key=lambda made: made.total)
    short = (
        f"--gpu-memory {gpu_memory:g}: no way fits into {room / GB:.2f} GB; the least is {least.total / GB:.2f} GB "
        f"({said(least.zero)}), {least.gpu[ACTIVATIONS] / GB:.2f} of it activations"
    )
    for knob, changed in _knobs(config):
        again = plan(changed, model.unet_config, model.size, changed.run.workers, least.zero, model.tokens)
        if again.total <= room:
            return f"{short}: set {knob}, it is then {again.total / GB:.2f}"
    return f"{short}: take more GPUs (--gpus), or larger ones (--gpu-memory)"


def _knobs(config: TSCDConfig) -> list[tuple[str, TSCDConfig]]:
    """Settings that save memory, from what costs least: what to say, and the configuration with it."""
    optim, workers = config.optim, config.run.workers
    most = max(optim.accumulation, optim.batch // (workers * config.fewest_rows))
    steps: list[tuple[dict[str, Any], str]] = [
        ({"checkpointing": True}, "--optim.checkpointing"),
        ({"accumulation": most}, f"--optim.accumulation {most}"),
        ({"checkpointing": True, "accumulation": most}, f"--optim.checkpointing --optim.accumulation {most}"),
    ]
    return [
        (knob, config.model_copy(update={"optim": optim.model_copy(update=update)}))
        for update, knob in steps
        if optim.batch % (workers * update.get("accumulation", 1)) == 0
        and any(getattr(optim, name) != value for name, value in update.items())
    ]
