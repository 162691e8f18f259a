"""A training step of each kind at a base's published shape, on this device: images/s, model FLOPs utilisation, peak memory.

    python evaluation/step_rate.py --shape sdxl --device cuda --batches 1 4 8
    python evaluation/step_rate.py --shape tiny --device cpu --precision fp32 --batches 8 --peak-tflops 0.1

Random weights, latents and embeddings; no VAE, text encoder or Ray; one worker, so nothing is sent. The settings are the
recipe's (adversarial loss, fake updates, guidance). Model FLOPs are the matrix products of one step of batch 1 without
activation checkpointing, counted by torch as they run, times the batch: what is computed again for memory's sake is not
useful work. Utilisation is those a second over the device's peak, which `--peak-tflops` names where it is not known.

Shapes: latents (B, 4, s, s), prompt embeddings (B, L, D).
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from evaluation.output import progress, save_report
from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.conditioning import Conditioning, square_time_ids
from hypersd_ray.models.roles import FullRoles, LoRARoles, Roles
from hypersd_ray.models.shapes import write_shape
from hypersd_ray.recipes import ONESTEP_RECIPES, RECIPES
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.memory_report import model_of
from hypersd_ray.training.onestep import OneStep
from hypersd_ray.training.tscd import Batch

ShapeName = Literal["tiny", "sd15", "sdxl"]
StepKind = Literal["tscd", "onestep", "full-unet"]
KINDS: tuple[StepKind, ...] = get_args(StepKind)
WARMUP = 2
MFU_AIM = 0.4
"""TSCD's LoRA step on SDXL at 1024 px in bf16."""
PEAK_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "4090": 165.2}
"""Dense bf16 products with float32 sums, of the makers' sheets (H100: SXM); part of CUDA's device name -> 10^12 a second."""


class RateConfig(Strict):
    """Which steps, of what, where."""

    shape: ShapeName = "sdxl"
    """The embedded model's UNet, Stable Diffusion 1.5's or SDXL's."""
    kinds: tuple[StepKind, ...] = KINDS
    """tscd: the LoRA's step, k = 1; onestep: distribution matching with two LoRAs; full-unet: the same with whole UNets."""
    device: str = "cuda"
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the base; whole UNets are float32 and compute in this."""
    batches: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)
    """Images a step, tried one after another; one that is out of memory is said."""
    steps: int = Field(default=5, ge=1)
    """Timed steps, after 2 warm-ups."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass (optim.checkpointing)."""
    adversarial: bool = True
    """With the recipe's discriminator where it has one; without, MSE alone."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """The device's; 0 looks it up by the device's name."""
    out: Path = Path("runs/step_rate.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Rate:
    """One kind at one batch. `tflops`: of the model, in a step; `utilisation`: None where the device's peak is not known."""

    kind: StepKind
    batch: int
    seconds: float
    images_per_s: float
    tflops: float
    utilisation: float | None
    peak_bytes: int | None


def recipe_of(config: RateConfig, kind: StepKind, folder: Path) -> TSCDConfig:
    """The recipe's settings on one worker without accumulation; `folder` gets the shape's JSON files."""
    if config.shape == "tiny":
        teacher = str(paths.TEACHER)
    else:
        write_shape(folder, "sdxl" if config.shape == "sdxl" else "sd")
        teacher = str(folder)
    made: TSCDConfig
    if kind == "tscd":
        made = RECIPES[config.shape](teacher) if config.shape != "tiny" else RECIPES["tiny"]()
        last = made.distill.model_copy(update={"k_list": made.distill.k_list[-1:], "n_list": made.distill.n_list[-1:],
                                               "steps_list": (1_000_000,)})  # fmt: skip
        made = made.model_copy(update={"distill": last})
    else:
        full = kind == "full-unet"
        first, init = () if config.shape == "tiny" else (teacher,), str(paths.LORAS / "tscd-k1.safetensors")
        made = ONESTEP_RECIPES[config.shape](*first, init=init, full_unet=full)
        made = made.model_copy(update={"init": None, "dmd": made.dmd.model_copy(update={"warmup_share": 0.0})})
    changes: dict[str, Any] = {
        "optim": made.optim.model_copy(update={"accumulation": 1, "checkpointing": False}),
        "run": made.run.model_copy(update={"workers": 1, "precision": config.precision}),
        "adversarial": made.adversarial.model_copy(update={"warmup_share": 0.0} if config.adversarial else {"adv_start": 0.0, "adv_end": 0.0}),
    }  # fmt: skip
    return made.model_copy(update=changes)


def inputs_of(settings: TSCDConfig, batch: int, device: torch.device) -> tuple[Batch, Conditioning]:
    """Random latents and embeddings of `batch` rows, and guidance's unconditional input (batch 1)."""
    model, g = model_of(settings), torch.Generator().manual_seed(0)
    unet = model.unet_config

    def conditioning(rows: int) -> Conditioning:
        text = torch.randn(rows, model.tokens, unet["cross_attention_dim"], generator=g).to(device)
        if unet.get("addition_embed_type") != "text_time":
            return Conditioning(text)
        width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        pooled = torch.randn(rows, width, generator=g).to(device)
        return Conditioning(text, pooled, square_time_ids(settings.data.resolution, rows, device))

    x0 = torch.randn(batch, unet["in_channels"], model.size, model.size, generator=g).to(device)
    return Batch(x0, conditioning(batch)), conditioning(1)


def build(settings: TSCDConfig, kind: StepKind, null: Conditioning, device: torch.device) -> Distiller:
    """The project's own state of a run, on a random base."""
    torch.manual_seed(0)
    info = read_base(settings.teacher)
    with device:
        base = UNet2DConditionModel.from_config(info.unet_config)
    # Module's own `to`: diffusers' warns of layers kept in float32, of which there are none.
    nn.Module.to(base.eval(), torch.bfloat16 if settings.run.precision == "bf16" else torch.float32)
    schedule = scaled_linear()
    roles: Roles
    if kind == "full-unet":
        roles = FullRoles(base, schedule, info.parameterization)
    else:
        lora = settings.lora
        roles = LoRARoles(base, schedule, info.parameterization, lora.rank, lora.effective_alpha)
    return OneStep(settings, roles, null) if isinstance(settings, OneStepConfig) else Distiller(settings, roles, null)


class Flops(TorchDispatchMode):
    """Adds up matrix products as they run, backward passes too. (torch's own mode follows modules with hooks that a
    backward pass within a backward pass, `models/low_rank.py`'s, does not survive.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def model_flops(training: Distiller, batch: Batch) -> int:
    """Of one step on `batch`, as it multiplies."""
    with Flops() as counter:
        training.step(batch)
    return counter.total


def peak_of(config: RateConfig) -> float:
    """10^12 FLOPs a second; 0 where nobody said and nobody knows."""
    if config.peak_tflops or not config.device.startswith("cuda") or config.precision != "bf16":
        return config.peak_tflops
    name = torch.cuda.get_device_name(config.device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def measure(config: RateConfig, kind: StepKind, say: Callable[[str], None] = lambda _: None) -> list[Rate]:
    """One kind at every batch that fits.

    Raises:
        ConfigError: not even one image fits.
    """
    device = torch.device(config.device)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    found: list[Rate] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe_of(config, kind, Path(folder))
        one, null = inputs_of(settings, 1, device)
        try:
            training = build(settings, kind, null, device)
            flops = model_flops(training, one)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"kinds={kind} at shape={config.shape} does not fit into {config.device} with one image"
            ) from None
        if config.checkpointing:
            training.roles.checkpoint_activations()
        for batch in config.batches:
            rows, _ = inputs_of(settings, batch, device)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            seconds = []
            try:
                for _ in range(WARMUP + config.steps):
                    wait()
                    begun = time.perf_counter()
                    training.step(rows)
                    wait()
                    seconds.append(time.perf_counter() - begun)
            except torch.OutOfMemoryError:
                say(f"{kind}, batch {batch}: out of memory")
                break
            took = statistics.median(seconds[WARMUP:])
            peak, rate = peak_of(config), flops * batch / 1e12 / took
            found.append(Rate(kind, batch, took, batch / took, flops * batch / 1e12, rate / peak if peak else None,
                              torch.cuda.max_memory_allocated(device) if cuda else None))  # fmt: skip
            say(table(found[-1:]).splitlines()[-1])
    return found


def table(rates: list[Rate]) -> str:
    """In Markdown."""
    lines = [
        "| step | batch | s a step | images/s | model TFLOPs a step | utilisation | peak GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rates:
        share = "-" if r.utilisation is None else f"{r.utilisation:.1%}"
        peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e9:.1f}"
        lines.append(
            f"| {r.kind} | {r.batch} | {r.seconds:.3f} | {r.images_per_s:.2f} | {r.tflops:.3g} | {share} | {peak} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    config = read_options(RateConfig, sys.argv[1:], __doc__ or "", RateConfig())
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={config.device}: torch sees no GPU here; --device cpu with --shape tiny runs anywhere"
        )
    rates: list[Rate] = []
    for kind in config.kinds:
        rates += measure(config, kind, progress)
        gc.collect()
    print(table(rates))
    name = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else "cpu"
    settings = config.model_dump(mode="json") | {"device_name": name, "torch": torch.__version__, "mfu_aim": MFU_AIM}
    save_report(config.out, {"settings": settings, "rates": [asdict(rate) for rate in rates]})


if __name__ == "__main__":
    run_job(main)
