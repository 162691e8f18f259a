"""Time and memory of one distillation step: the published LCM-LoRA script's beside ours.

    python evaluation/speed.py step --shape tiny --batch 32
    python evaluation/speed.py step --shape sd15 --batch 1 --dtype bf16 --device cuda

Both do k = 1 with MSE only, on random weights, latents and prompt embeddings; no VAE, text encoder or Ray. Each variant
runs in a process of its own, so that its peak memory is its own, and the two take turns, so that what else the machine
does meets both. Peak memory is what tensors hold at most: models, optimiser, activations. On CUDA the allocator counts
it; on the CPU one more step under the profiler does, and the resident size is shown beside it: VmHWM of the steps less
VmRSS just before the models were built, which has the libraries' buffers and the heap's holes in it too.

Shapes: x0, noise, x_t (B, 4, s, s); prompt embeddings (B, L, D); t, index, w (B,).
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
import torch.nn.functional as F
import tyro
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from pydantic import Field
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from evaluation.output import save_report
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig, LoRAConfig, TSCDConfig
from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.diffusion.segments import TEndRule
from hypersd_ray.embedded.pretrain_unet import SCHEDULER, make_unet
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.lora import LCM_TARGETS
from hypersd_ray.models.roles import LoRARoles
from hypersd_ray.models.shapes import SD15_UNET
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.tscd import Batch

ROOT = Path(__file__).resolve().parents[1]
TIME_AIM, MEMORY_AIM = 0.8, 0.6
"""Ours over the baseline's, at most."""
WARMUP = 2
GRID = 50
"""DDIM steps of the solver, both variants (the script's --num_ddim_timesteps)."""
W_RANGE = (5.0, 15.0)
"""The script's guidance w = omega - 1."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A UNet and the sizes of what it is fed."""

    make: Callable[[], UNet2DConditionModel]
    side: int
    tokens: int
    width: int


SHAPES = {
    "tiny": Shape(make_unet, 8, 24, 96),
    "sd15": Shape(lambda: UNet2DConditionModel(**SD15_UNET), 64, 77, 768),
}


class StepSettings(Strict):
    """Measure both variants in turn, print the table, write JSON."""

    shape: Literal["tiny", "sd15"] = "tiny"
    """The embedded model's UNet and sizes, or Stable Diffusion 1.5's."""
    batch: int = Field(default=32, ge=1)
    """Images a step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: the baseline under autocast, as accelerate's mixed precision does it; ours with a bfloat16 base."""
    device: str = "cpu"
    """Where: cpu, cuda, ..."""
    steps: int = Field(default=10, ge=1)
    """Timed steps of a process, after 2 warm-ups."""
    repeats: int = Field(default=3, ge=1)
    """Processes of each variant; the order alternates."""
    rank: int = Field(default=64, ge=1)
    """LoRA rank, of LCM's 14 target modules."""
    cast_teacher: bool = False
    """With bf16: the baseline's teacher in bfloat16 (the script's --cast_teacher_unet)."""
    threads: int | None = None
    """torch's threads; None leaves torch's own choice (OMP_NUM_THREADS)."""
    out: Path = Path("runs/speed.json")
    """The JSON file that is written."""


class VariantSettings(StepSettings):
    """One variant in this process: what `step` starts. Prints one line of JSON."""

    variant: Literal["baseline", "ours"] = "ours"
    """Which."""


@dataclass(frozen=True)
class Inputs:
    """A batch and the unconditional input of guidance (batch 1)."""

    batch: Batch
    null: Conditioning


def make_inputs(settings: StepSettings) -> Inputs:
    """Random latents and embeddings, a function of nothing but the sizes."""
    shape, generator = SHAPES[settings.shape], torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(settings.device)
    x0 = draw(settings.batch, 4, shape.side, shape.side)
    cond = Conditioning(draw(settings.batch, shape.tokens, shape.width))
    return Inputs(Batch(x0, cond), Conditioning(draw(1, shape.tokens, shape.width)))


def make_base(settings: StepSettings) -> UNet2DConditionModel:
    """A UNet with random weights, the same at every call."""
    torch.manual_seed(0)
    with torch.device(settings.device):  # drawn where it will be: on a CPU a large one takes longer than the steps
        return SHAPES[settings.shape].make()


class LCMScript:
    """The step of diffusers' `train_lcm_distill_lora_sd_wds.py`, its defaults, without data loading and accelerate.

    Two UNets; the student's forward pass first; the teacher's two passes one after the other; the online student as
    target network. Its time indices are the network's: index i is our t = i + 1.
    """

    def __init__(self, settings: StepSettings, teacher: nn.Module, student: UNet2DConditionModel, lr: float = 1e-6):
        self.dtype, device = DTYPES[settings.dtype], settings.device
        self.teacher = teacher.requires_grad_(False)
        if settings.cast_teacher:
            self.teacher.to(self.dtype)
        lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(LCM_TARGETS), lora_dropout=0.0)
        self.student = get_peft_model(student.train(), lora)
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-2)
        acp = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
        self.alpha, self.sigma = acp.sqrt(), (1 - acp).sqrt()
        self.times = torch.arange(1, GRID + 1, device=device) * (len(acp) // GRID) - 1
        self.acp_prev = torch.cat([acp[:1], acp[self.times[:-1]]])

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision where it is asked for."""
        on = self.dtype != torch.float32
        return torch.autocast(self.alpha.device.type, self.dtype) if on else nullcontext()

    def x0_of(self, eps: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """The clean latent that a predicted noise means."""
        return (x_t - _at(self.sigma, t) * eps) / _at(self.alpha, t)

    def consistency(self, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """The online student's jump to clean data, c_skip x_t + c_out x0 (sigma_data 0.5, time scaling 10)."""
        with self.autocast():
            eps = self.student(x_t, t, encoder_hidden_states=embeds).sample.float()
        scaled = t.view(-1, 1, 1, 1) * 10.0
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / (scaled**2 + 0.25).sqrt()
        return c_skip * x_t + c_out * self.x0_of(eps, t, x_t)

    def loss(self, x0: Tensor, cond: Tensor, null: Tensor, index: Tensor, noise: Tensor, w: Tensor) -> Tensor:
        """MSE between the student's jump from grid point `index` and its jump from one solver step below."""
        start = self.times[index]
        before = (start - len(self.alpha) // GRID).clamp(min=0)
        x_t = _at(self.alpha, start) * x0 + _at(self.sigma, start) * noise
        prediction = self.consistency(x_t, start, cond)
        with torch.no_grad():
            x0s, epss = [], []
            for embeds in (cond, null):
                with self.autocast():
                    eps = self.teacher(
                        x_t.to(self.dtype), start, encoder_hidden_states=embeds.to(self.dtype)
                    ).sample.float()
                x0s.append(self.x0_of(eps, start, x_t))
                epss.append(eps)
            w = w.view(-1, 1, 1, 1)
            guided_x0, guided_eps = (a + w * (a - b) for a, b in (x0s, epss))
            acp = self.acp_prev[index].view(-1, 1, 1, 1)
            x_prev = acp.sqrt() * guided_x0 + (1 - acp).sqrt() * guided_eps
            target = self.consistency(x_prev, before, cond)
        return F.mse_loss(prediction, target)

    def step(self, batch: Batch, null: Conditioning, generator: torch.Generator) -> Tensor:
        """One optimiser step; returns the detached loss."""
        size, x0 = len(batch.x0), batch.x0
        index = torch.randint(GRID, (size,), generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        w = (W_RANGE[0] + (W_RANGE[1] - W_RANGE[0]) * torch.rand(size, generator=generator)).to(x0.device)
        embeds = null.prompt_embeds.repeat(size, 1, 1)  # the script encodes the empty prompt once per sample
        loss = self.loss(x0, batch.cond.prompt_embeds, embeds, index, noise, w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def our_config(
    settings: StepSettings, t_end: TEndRule = "uniform", target: Literal["ema", "student"] = "ema"
) -> TSCDConfig:
    """TSCD's last stage, k = 1, with MSE only and the script's guidance range."""
    return TSCDConfig(
        teacher=str(ROOT),  # no file is read: the UNet is given
        data=DataConfig(shards="none"),
        distill=DistillConfig(
            k_list=(1,), n_list=(GRID,), steps_list=(1_000_000,), t_end=t_end, target=target, perturbation=0.0,
            omega_min=W_RANGE[0] + 1, omega_max=W_RANGE[1] + 1,
        ),
        adversarial=AdversarialConfig(adv_end=0.0, mse_end=1.0),
        lora=LoRAConfig(rank=settings.rank),
        optim=OptimConfig(lr=1e-6, batch=settings.batch, weight_decay=1e-2),
        run=RunConfig(precision=settings.dtype),
    )  # fmt: skip


def our_distiller(settings: StepSettings, config: TSCDConfig, null: Conditioning) -> Distiller:
    """The project's own state of a run, on a random base."""
    unet = make_base(settings).to(DTYPES[settings.dtype]).eval()
    roles = LoRARoles(unet, scaled_linear(), "epsilon", config.lora.rank, config.lora.effective_alpha)
    return Distiller(config, roles, null)


def build(settings: VariantSettings, inputs: Inputs) -> Callable[[], Tensor]:
    """A call that makes one step of the variant and returns its loss."""
    if settings.variant == "ours":
        distiller = our_distiller(settings, our_config(settings), inputs.null)
        return lambda: distiller.step(inputs.batch)["loss"]
    script, generator = LCMScript(settings, make_base(settings), make_base(settings)), torch.Generator().manual_seed(0)
    return lambda: script.step(inputs.batch, inputs.null, generator)


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_resident_peak() -> None:
    """VmHWM := VmRSS, so that what building needed for a moment is not the step's."""
    gc.collect()
    with suppress(OSError):  # where it cannot be written, building counts too
        Path("/proc/self/clear_refs").write_text("5")


def _allocated_peak(step: Callable[[], Tensor]) -> int:
    """Most bytes in tensors at any time of one more step on the CPU, as CUDA's max_memory_allocated counts them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    del tensors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    results = profiler.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    return held + max(accumulate(change for _, change in events))


def measure(settings: VariantSettings) -> dict[str, Any]:
    """Build, warm up, time; seconds of each step, peak bytes, the last loss."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    cuda = settings.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    inputs = make_inputs(settings)
    gc.collect()
    before = _status("VmRSS")
    step = build(settings, inputs)
    _forget_resident_peak()
    seconds = []
    for _ in range(WARMUP + settings.steps):
        wait()
        begun = time.perf_counter()
        loss = step()
        wait()
        seconds.append(time.perf_counter() - begun)
    resident = _status("VmHWM") - before
    peak = torch.cuda.max_memory_allocated() if cuda else _allocated_peak(step)
    sizes = {"peak_bytes": peak, "resident_bytes": resident}
    return {"variant": settings.variant, "seconds": seconds[WARMUP:], **sizes, "loss": loss.item()}


def run_variant(settings: StepSettings, variant: str) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        ValueError: it failed; the line is its last.
    """
    given = settings.model_dump(mode="json", exclude={"out", "repeats", "threads", "cast_teacher"})
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()] + [f"--variant={variant}"]
    flags += ["--cast-teacher"] if settings.cast_teacher else []
    flags += [] if settings.threads is None else [f"--threads={settings.threads}"]
    done = subprocess.run([sys.executable, __file__, "variant", *flags], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}; out of memory?"])[-1]
        raise ValueError(f"{variant} at --shape {settings.shape} --batch {settings.batch} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(rounds: list[dict[str, dict[str, Any]]], value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """Both medians, and ours over the baseline's: the median, least and greatest of the rounds."""
    ratios = [value(r["ours"]) / value(r["baseline"]) for r in rounds]
    return {
        "baseline": statistics.median(value(r["baseline"]) for r in rounds),
        "ours": statistics.median(value(r["ours"]) for r in rounds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def compare(settings: StepSettings) -> dict[str, Any]:
    """All rounds and their summary. In odd rounds ours goes first."""
    rounds = []
    for index in range(settings.repeats):
        order = ("baseline", "ours") if index % 2 == 0 else ("ours", "baseline")
        rounds.append({variant: run_variant(settings, variant) for variant in order})
    cuda = settings.device.startswith("cuda")
    return {
        "settings": settings.model_dump(mode="json"),
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": settings.threads or torch.get_num_threads(),
            "load_average": os.getloadavg(),
            "torch": torch.__version__,
        },
        "aims": {"seconds": TIME_AIM, "peak_bytes": MEMORY_AIM},
        "seconds": ratio(rounds, lambda r: statistics.median(r["seconds"])),
        "peak_bytes": ratio(rounds, lambda r: r["peak_bytes"]),
        "resident_bytes": None if cuda else ratio(rounds, lambda r: r["resident_bytes"]),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """The summary in Markdown."""
    s, aims = result["settings"], result["aims"]
    head = f"{s['shape']}, batch {s['batch']}, {s['dtype']}, {s['device']}"
    lines = [f"| {head} | LCM-LoRA script | ours | ratio [rounds' range] | aim |", "|---|---:|---:|---:|---:|"]
    units = {
        "seconds": ("step, ms", 1e-3),
        "peak_bytes": ("peak memory, MB", 1e6),
        "resident_bytes": ("resident, MB", 1e6),
    }
    for key, (name, unit) in units.items():
        if row := result[key]:
            sizes = f"{row['baseline'] / unit:.0f} | {row['ours'] / unit:.0f}"
            spread = f"{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
            lines.append(f"| {name} | {sizes} | {spread} | {aims.get(key, '')} |")
    return "\n".join(lines)


Command = (
    Annotated[StepSettings, tyro.conf.subcommand("step")] | Annotated[VariantSettings, tyro.conf.subcommand("variant")]
)


def main() -> None:
    """Dispatch on the subcommand."""
    settings: Command = read_options(Command, sys.argv[1:], __doc__ or "")
    if isinstance(settings, VariantSettings):
        print(json.dumps(measure(settings)))
        return
    result = compare(settings)
    print(table(result))
    save_report(settings.out, result)


if __name__ == "__main__":
    run_job(main)
