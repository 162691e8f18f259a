"""How fast a run should be on many GPUs, and what would limit it first: arithmetic on named bandwidths, nothing measured.

A step of W workers, the global batch fixed:

    compute      seconds_per_image * ceil(batch / W)
    all-reduce   the gradients as one float32 bucket after the backward pass (training/distributed.py), not overlapped: a
                 ring within each node of g GPUs, 2 (g - 1) / g * bytes / gpu_link, then one over the n nodes,
                 2 (n - 1) / n * bytes / node_link, and latency * 2 log2 W
    checkpoint   its bytes / storage / run.checkpoint_every, rank 0 writes and all wait. The loop writes a checkpoint to /tmp,
                 hashes it and copies it to run.out: `storage` stands for all three

What the images of a second need is beside it: encoders = images/s / encoder_images_s; they limit a run where they need more
than a tenth of all GPUs. So do the reward actors of feedback learning, with the pictures that it makes of each image.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.cli import parse
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import BaseInfo, read_base
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.shapes import write_shape

GIGA = 1e9
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARE = 0.1
"""A part that takes more of a step, or of the GPUs, than this is called a limit."""
TOKENS = 77
"""Of a prompt, as CLIP's text encoders take it."""


@dataclass(frozen=True)
class Hardware:
    """Rates that a plan rests on. The defaults are A100 nodes as in docs/cluster.md; all are assumptions to be replaced by
    one's own measurements (`--plan seconds_per_image=0.2`)."""

    gpus_per_node: int = 8
    gpu_link: float = 235.0
    """GB/s of an all-reduce between GPUs of a node (NVLink's 300 each way, less what NCCL loses)."""
    node_link: float = 45.0
    """GB/s of a node to the others (400 Gbit/s, less a tenth); shared by its GPUs."""
    latency_us: float = 20.0
    """Of one hop of a collective."""
    storage: float = 1.0
    """GB/s at which one worker gets a checkpoint into run.out, with its first copy in /tmp and the hash."""
    data: float = 1.0
    """GB/s that a node reads shards or latents at."""
    seconds_per_image: float = 0.0
    """Of a GPU's training step; 0 takes SDXL's 0.28 (200 GPU-hours a stage of 5,000 steps of 512, the paper's figures),
    or for other bases that by the operations of their UNets' forward pass, as far as known (SD1.5: 0.032). These are TSCD's
    with a LoRA: the full UNet and feedback are given the same unless told otherwise."""
    encoder_images_s: float = 0.0
    """Images a second that one GPU of encoders turns into latents; 0 assumes 20 at 1024 pixels, by area."""
    reward_images_s: float = 60.0
    """Pictures a second that one GPU of reward models scores and differentiates."""


@dataclass(frozen=True)
class Work:
    """What a run moves: trained parameters, bytes of a checkpoint and of a row of latents, global batch, steps between
    checkpoints, and pictures that reward models and SOLO judge for each image of the batch."""

    parameters: int
    checkpoint_bytes: float
    row_bytes: float
    batch: int
    checkpoint_every: int
    judged: int = 0


@dataclass(frozen=True)
class Row:
    """One number of workers. Times in seconds a step; `limits` are the parts above SHARE of it, the largest first."""

    workers: int
    compute: float
    all_reduce: float
    checkpoint: float
    images_s: float
    encoders: int
    rewards: int
    read: float
    """GB/s of latents, all nodes together."""
    limits: tuple[str, ...]

    @property
    def step(self) -> float:
        """Seconds."""
        return self.compute + self.all_reduce + self.checkpoint


def all_reduce_seconds(parameters: int, workers: int, hardware: Hardware) -> float:
    """Of the gradients, float32."""
    if workers == 1:
        return 0.0
    bytes_ = 4.0 * parameters
    in_node = min(workers, hardware.gpus_per_node)
    nodes = math.ceil(workers / hardware.gpus_per_node)
    seconds = 2 * (in_node - 1) / in_node * bytes_ / (hardware.gpu_link * GIGA)
    seconds += 2 * (nodes - 1) / nodes * bytes_ / (hardware.node_link * GIGA)
    return seconds + hardware.latency_us * 1e-6 * 2 * math.log2(workers)


def row(work: Work, hardware: Hardware, workers: int) -> Row:
    """One line of the plan; `hardware` without zeros."""
    compute = hardware.seconds_per_image * math.ceil(work.batch / workers)
    reduce = all_reduce_seconds(work.parameters, workers, hardware)
    checkpoint = work.checkpoint_bytes / (hardware.storage * GIGA) / work.checkpoint_every
    step = compute + reduce + checkpoint
    images_s = work.batch / step
    read = images_s * work.row_bytes / GIGA
    parts = {"all-reduce": reduce / step, "checkpoints": checkpoint / step}
    if work.batch % workers:
        parts["batch too small"] = 1 - work.batch / (workers * math.ceil(work.batch / workers))
    encoders = images_s / hardware.encoder_images_s
    rewards = images_s * work.judged / hardware.reward_images_s
    parts |= {"encoders": encoders / (workers + encoders), "reward actors": rewards / (workers + rewards)}
    nodes = math.ceil(workers / hardware.gpus_per_node)
    if read > hardware.data * nodes:
        parts["reading latents"] = read / (hardware.data * nodes)
    limits = tuple(sorted((n for n, share in parts.items() if share > SHARE), key=lambda n: -parts[n]))
    return Row(
        workers, compute, reduce, checkpoint, images_s, math.ceil(encoders), math.ceil(rewards), read, limits,
    )  # fmt: skip


def parse_hardware(values: Sequence[str]) -> Hardware:
    """`name=number` pairs over the defaults.

    Raises:
        ConfigError: an unknown name, no positive number, or a part of a GPU.
    """
    known = {f.name for f in fields(Hardware)}
    changes: dict[str, Any] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in known:
            raise ConfigError(f"--plan {value}: unknown rate {name!r}; there are {', '.join(sorted(known))}")
        try:
            changes[name] = float(number)
        except ValueError:
            changes[name] = math.nan
        if not changes[name] > 0 or math.isinf(changes[name]):
            raise ConfigError(f"--plan {value}: {name} must be a number above 0")
        if name == "gpus_per_node":
            if changes[name] % 1:
                raise ConfigError(f"--plan {value}: gpus_per_node must be a whole number of at least 1")
            changes[name] = int(changes[name])
    return replace(Hardware(), **changes)


def filled(hardware: Hardware, config: TSCDConfig | FeedbackConfig, info: BaseInfo) -> Hardware:
    """With a rate for each zero.

    Raises:
        ConfigError: a base whose step nobody knows.
    """
    sides = (config.data.resolution / 1024) ** 2
    known = {"sdxl": 0.28 * sides, "sd": 0.032 * 4 * sides}
    if hardware.seconds_per_image == 0:
        if min(info.unet_config["block_out_channels"]) < 320:
            raise ConfigError(
                f"--plan: the step of teacher={info.path.name} is not known; measure it (images_per_s in metrics.jsonl of "
                "one worker) and give --plan seconds_per_image=NUMBER"
            )
        hardware = replace(hardware, seconds_per_image=known[info.family])
    return hardware if hardware.encoder_images_s else replace(hardware, encoder_images_s=20.0 / sides)


def work_of(config: TSCDConfig | FeedbackConfig, info: BaseInfo) -> Work:
    """Counted on the base's own layers; no weight is read."""
    unet_config, heads, judged = info.unet_config, 0, 0
    copies = 4  # the student, its average, two moments
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        if isinstance(config, TSCDConfig) and config.full_unet:
            student = sum(p.numel() for p in unet.parameters())
        else:
            adapters = Adapters(unet, config.lora.rank, config.lora.effective_alpha)
            adapters.add("student", trainable=False)
            student = sum(p.numel() for p in adapters.named_tensors("student").values())
    if isinstance(config, FeedbackConfig):
        copies = 3  # it has no average
        judged = (config.refl.weight > 0) + (config.structure.weight > 0)
    elif config.adversarial.adv_end > 0:
        heads = sum(p.numel() for p in LatentDiscriminator(dict(unet.config), 0, False).parameters())
    side, width = config.data.resolution // info.latent_factor, unet_config["cross_attention_dim"]
    latent = info.latent_channels * side * side + TOKENS * (max(width) if isinstance(width, list) else width)
    pooled = 1280 * 2 + 24 if info.family == "sdxl" else 0
    return Work(
        student + heads,
        4.0 * (copies * student + 3 * heads),
        2.0 * latent + pooled,
        config.optim.batch,
        config.run.checkpoint_every,
        judged,
    )


def limits(rows: Sequence[Row]) -> str:
    """In words: what limits, and from how many GPUs on."""
    begins: dict[str, int] = {}
    for r in rows:
        for name in r.limits:
            begins.setdefault(name, r.workers)
    if begins:
        return "limits: " + "; ".join(f"{name}, from {workers} GPUs" for name, workers in begins.items())
    return f"no part but the step itself takes more than {SHARE:.0%} up to {rows[-1].workers} GPUs"


def plan(config: TSCDConfig | FeedbackConfig, values: Sequence[str] = ()) -> str:
    """The table that `--plan` prints.

    Raises:
        ConfigError, ValueError: a wrong rate, or a teacher that cannot be read.
    """
    info = read_base(config.teacher)
    hardware = filled(parse_hardware(values), config, info)
    work = work_of(config, info)
    rows = [row(work, hardware, w) for w in WORKERS]
    rates = [f.name for f in fields(Hardware) if work.judged or f.name != "reward_images_s"]
    needed = ["encoders", *(["reward actors"] if work.judged else []), "read MB/s"]
    heads = ["GPUs", "images/s", "s/step", "compute", "all-reduce", "checkpoints", *needed, "limited by"]
    lines = [
        f"{work.parameters / 1e6:.1f}M trained parameters: {4 * work.parameters / 1e6:.0f} MB of gradients a step, "
        f"{work.checkpoint_bytes / 1e6:.0f} MB a checkpoint, {work.row_bytes / 1e3:.0f} kB a row of latents",
        "assumed: " + ", ".join(f"{name}={getattr(hardware, name):g}" for name in rates),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---:|" * (len(heads) - 1) + "---|",
    ]
    for r in rows:
        shares = [f"{part / r.step:.1%}" for part in (r.compute, r.all_reduce, r.checkpoint)]
        needs = [
            str(r.encoders),
            *([str(r.rewards)] if work.judged else []),
            f"{r.read * 1000:.0f}",
            ", ".join(r.limits),
        ]
        lines.append("| " + " | ".join([str(r.workers), f"{r.images_s:.1f}", f"{r.step:.3g}", *shares, *needs]) + " |")
    lines += ["", limits(rows)]
    lines.append("encoders: GPUs that encode while it trains (none with latents of jobs/precompute.py)")
    if work.judged:
        lines.append(
            f"reward actors: GPUs that judge {work.judged} picture{'s' * (work.judged > 1)} for each image of the batch"
        )
    return "\n".join([*lines, "Calculated from the assumed rates, not measured."])


def split_plan(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without `--plan [name=number ...]`, and those."""
    at = arguments.index("--plan")
    end = at + 1
    while end < len(arguments) and "=" in arguments[end] and not arguments[end].startswith("-"):
        end += 1
    return [*arguments[:at], *arguments[end:]], list(arguments[at + 1 : end])


def print_plan(
    recipes: Mapping[str, Callable[..., Any]], kind: type[TSCDConfig | FeedbackConfig], arguments: Sequence[str]
) -> None:
    """The plan of the run that `arguments`, with `--plan`, ask for. What the recipes sd15 and sdxl must be told, the teacher or a
    LoRA, may be left out: no weight is read, and no cluster asked for."""
    words, rates = split_plan(arguments)
    recipe = next((word for word in words if word in ("sd15", "sdxl")), None)
    with tempfile.TemporaryDirectory() as folder:
        if recipe is not None:
            write_shape(Path(folder), "sdxl" if recipe == "sdxl" else "sd")
            given = {word.partition("=")[0] for word in words}
            for name, parameter in inspect.signature(recipes[recipe]).parameters.items():
                if parameter.default is parameter.empty and f"--{name}" not in given:
                    words += [f"--{name}", folder]
        print(plan(parse(recipes, kind, "", words), rates))
