"""How near few-step samples come to the teacher's own long trajectory, and whether they are as sharp.

    python evaluation/quality.py --loras runs/tscd/lora/tscd-k8.safetensors ... --steps 1 2 4 8 --sampler tcd

Every row starts from the same x_T, a function of (seed, prompt). The reference is where the teacher's 50 DDIM steps at
guidance 3 end. Two numbers a row, means over the prompts:

    distance    ||x - reference||^2 per element / variance of the reference latents: 0 is the teacher itself, a constant
                latent is at 1. diffusers' TCD, and DDIM with set_alpha_to_one=False, stop one time step short of clean
                data, which alone costs sigma_1^2 / variance = 0.00085 on SD1.5's schedule at variance 1
    sharpness   norm of the decoded picture's gradient / the reference's: an average is a blur (below 1), noise above 1

Shapes: latents (P, C, h, w), pictures uint8 (P, 3, H, W), per-prompt numbers (P,); P prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from torch import Tensor

from evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from evaluation.harness.prompts import held_out_prompts
from evaluation.output import progress, save_report
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded import paths
from hypersd_ray.models.cards import read_sampling
from hypersd_ray.models.checkpoint import load_component, read_base
from hypersd_ray.models.conditioning import Conditioning, square_time_ids
from hypersd_ray.models.encoders import Encoders
from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.models.lora_file import read_lora
from hypersd_ray.models.roles import TEACHER, Plain
from hypersd_ray.models.samplers import TCD_GRID, diffusers_scheduler
from hypersd_ray.training import samples
from hypersd_ray.training.quality import kept, latent_distance, teacher_sha256
from hypersd_ray.training.randomness import generator_of


class QualityConfig(Strict):
    """Fidelity of few-step LoRAs to their teacher."""

    loras: tuple[Path, ...] = ()
    """LoRA files (diffusers' or Kohya's layout) of the teacher; without one only the teacher is measured."""
    teacher: Path = paths.TEACHER
    """Folder of the base model in diffusers' layout."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Sampling steps of the rows."""
    sampler: Literal["tcd", "ddim", "edges"] = "tcd"
    """How the LoRAs are sampled: "tcd" diffusers' TCDScheduler, "ddim" its DDIMScheduler (trailing), both in a
    pipeline with load_lora_weights as a user would; "edges" this project's own sampler on the training edges."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """TCD's gamma: how much noise each step puts back."""
    start: int | None = Field(default=None, ge=0, le=999)
    """The network's input in a single step, set by hand for all LoRAs; None is what a LoRA's file names (800 where it was
    made for that alone, and then no other number of steps gets a row), else the sampler's own 999. A step from a named
    input is diffusers' LCMScheduler(timesteps=[start]), or "edges"."""
    prompts: int = Field(default=512, ge=2)
    """How many prompts: the first distinct ones."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; without it the captions of the embedded model's held-out pictures."""
    guidance: float = Field(default=3.0, ge=1)
    """The teacher's guidance scale, as uncond + guidance (cond - uncond)."""
    reference_steps: int = Field(default=50, ge=1, le=1000)
    """DDIM steps of the reference."""
    seed: int = 0
    """x_T and the bootstrap are functions of it."""
    batch: int = Field(default=64, ge=1)
    """Prompts sampled at a time."""
    device: str = "cpu"
    """Where: cpu, cuda, ..."""
    cache: Path = Path("runs/quality-cache")
    """Folder where reference latents are kept; a name that exists is read, not made again."""
    out: Path = Path("runs/quality.json")
    """The JSON file that is written."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `versus_teacher`: distance minus the teacher's at as many steps, prompt by prompt;
    `inputs`: the network's, where the sampler's own are not used."""

    model: str
    steps: int
    distance: Interval
    sharpness: Interval
    versus_teacher: Interval | None = None
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the JSON file holds."""

    settings: dict[str, Any]
    teacher_sha256: str
    prompts_sha256: str
    loras: dict[str, dict[str, Any]]
    latent_variance: float
    rows: list[Row] = field(default_factory=list)


def read_prompts(config: QualityConfig) -> list[str]:
    """The prompts that `config` asks for: distinct, at most `config.prompts`.

    Raises:
        ValueError: a file that is missing, or holds fewer than the 2 prompts that an interval needs.
    """
    if config.prompts_file is None:
        return held_out_prompts(paths.DATA, config.prompts)
    try:
        lines = [line.strip() for line in config.prompts_file.read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"--prompts-file {config.prompts_file} cannot be read: {error.strerror}") from None
    prompts = list(dict.fromkeys(line for line in lines if line))[: config.prompts]
    if len(prompts) < 2:
        raise ValueError(
            f"--prompts-file {config.prompts_file} has {len(prompts)} distinct prompts: write at least 2, one a line"
        )
    return prompts


def check_sampling(config: QualityConfig) -> None:
    """Fields that are each right and do not go together.

    Raises:
        ValueError: step counts that the sampler cannot take, an eta that it does not know.
    """
    limit = TCD_GRID if config.sampler == "tcd" else 1000
    if not config.steps or min(config.steps) < 1 or max(config.steps) > limit:
        raise ValueError(
            f"--steps {config.steps}: at least one, each within 1..{limit} with --sampler {config.sampler}"
        )
    if config.start is not None and 1 not in config.steps:
        raise ValueError(
            f"--start {config.start} with --steps {config.steps}: it is for a single step; add 1 to --steps"
        )
    if config.eta > 0 and config.sampler == "ddim":
        raise ValueError(f"--eta {config.eta} with --sampler ddim, whose eta is another thing: use tcd, or eta 0")


class Subject:
    """The pipeline that is measured and the x_T that all rows share.

    Raises:
        ValueError: the teacher's folder is not a pipeline that can be loaded.
    """

    def __init__(self, config: QualityConfig, prompts: Sequence[str]):
        self.config, self.prompts, self.info = config, list(prompts), read_base(config.teacher)
        checker: dict[str, Any] = (
            {"safety_checker": None} if self.info.family == "sd" else {}
        )  # it would see latents only
        try:
            self.pipe = DiffusionPipeline.from_pretrained(
                config.teacher, local_files_only=True, use_safetensors=True, **checker
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--teacher {config.teacher} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.pipe.to(config.device)
        self.pipe.set_progress_bar_config(disable=True)
        pipe, two = self.pipe, self.info.family == "sdxl"
        self.encoders = Encoders(
            [pipe.tokenizer, pipe.tokenizer_2] if two else [pipe.tokenizer],
            [pipe.text_encoder, pipe.text_encoder_2] if two else [pipe.text_encoder],
            pipe.vae, self.info.zero_null_prompt, config.device,
        )  # fmt: skip
        self.base = pipe.unet.eval()
        self._use(self.base)
        self.shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
        self.side = self.shape[-1] * self.info.latent_factor
        self.named: tuple[int, ...] = ()

    def _use(self, unet: UNet2DConditionModel) -> None:
        """Sample with `unet`, and whatever LoRA diffusers has put on it."""
        self.pipe.unet = unet
        self.roles = Plain(unet, self.info.schedule, self.info.parameterization)

    def inputs(self, steps: int) -> tuple[int, ...]:
        """What the network is told in the steps of the LoRA that is loaded; () leaves it to the sampler."""
        start = self.config.start
        if start is not None and steps == 1:
            return (start,)
        return self.named if len(self.named) == steps else ()

    def can(self, steps: int) -> bool:
        """Whether the LoRA that is loaded samples in that many steps: one made for certain inputs has no others."""
        return not self.named or bool(self.inputs(steps))

    def _chunks(self, sample: Callable[[list[str], Tensor, Conditioning], Tensor]) -> Tensor:
        """`sample` over all prompts in batches, on the CPU."""
        parts = []
        for first in range(0, len(self.prompts), self.config.batch):
            chunk = self.prompts[first : first + self.config.batch]
            x_T = samples.start_noise(self.config.seed, chunk, self.shape).to(self.config.device)
            embeds = self.encoders.encode_prompts(chunk)
            cond = Conditioning(embeds.prompt_embeds, embeds.pooled, self._time_ids(len(chunk)))
            parts.append(sample(chunk, x_T, cond).float().cpu())
        return torch.cat(parts)

    def _time_ids(self, batch: int) -> Tensor | None:
        """SDXL's size conditioning, the pipeline's own default; None for SD1.5."""
        return square_time_ids(self.side, batch, self.config.device) if self.info.family == "sdxl" else None

    def teacher(self, steps: int) -> Tensor:
        """The teacher's latents (P, C, h, w) by `steps` guided DDIM steps."""
        null = self.encoders.null_conditioning()
        return self._chunks(
            lambda _, x_T, cond: samples.teacher_samples(
                self.roles, x_T, cond, null.with_time_ids(cond.time_ids), steps, self.config.guidance
            )
        )

    def student(self, steps: int, sampler: str) -> Tensor:
        """Latents (P, C, h, w) of the pipeline as it is now (with the LoRA that is loaded), without guidance."""
        eta, seed, inputs = self.config.eta, self.config.seed, self.inputs(steps)
        if sampler == "edges" and inputs:
            # Several steps to clean data have all noise put back between them; after the last none is.
            how = samples.Sampling(steps, (*(t + 1 for t in inputs), 0), eta=1.0 if steps > 1 else 0.0)
            return self._chunks(lambda _, x_T, cond: samples.student_samples(self.roles, TEACHER, x_T, cond, how, seed))
        if sampler == "edges":
            return self._chunks(
                lambda chunk, x_T, cond: samples.student_samples(
                    self.roles, TEACHER, x_T, cond, samples.Sampling(steps, eta=eta), seed, chunk
                )
            )
        named = "lcm" if inputs else sampler
        self.pipe.scheduler = diffusers_scheduler(named, self.pipe.scheduler.config, inputs)
        told: dict[str, Any] = {"timesteps": list(inputs)} if inputs else {"eta": eta}

        def sample(chunk: list[str], x_T: Tensor, _: Conditioning) -> Tensor:
            # One generator a prompt: its noise does not depend on the batch it is in.
            generators = [generator_of(seed, "eta", prompt) for prompt in chunk]
            return self.pipe(
                prompt=chunk, latents=x_T, num_inference_steps=steps, guidance_scale=0.0,
                generator=generators, output_type="latent", **told,
            ).images  # fmt: skip

        return self._chunks(sample)

    def load_lora(self, path: Path) -> None:
        """As a user does; the LoRA or UNet before it goes. Raises ValueError when it is not of this base."""
        self._use(self.base)
        self.pipe.unload_lora_weights()
        metadata = read_lora(path)[1]
        self.named = () if metadata is None else metadata.timesteps
        try:
            self.pipe.load_lora_weights(str(path))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"--loras {path} does not fit {self.config.teacher}: {str(error).splitlines()[0]}"
            ) from error

    def load_unet(self, folder: Path) -> None:
        """A distilled UNet in place of the teacher's. Raises ValueError when it is none, or has another shape."""
        self._use(self.base)
        self.pipe.unload_lora_weights()
        told = read_sampling(folder)
        self.named = () if told is None else told.timesteps
        unet = load_component(UNet2DConditionModel, folder)
        if {n: v.shape for n, v in unet.named_parameters()} != {n: v.shape for n, v in self.base.named_parameters()}:
            raise ValueError(f"--unets {folder} does not fit {self.config.teacher}: its parameters have other shapes")
        self._use(unet.to(self.config.device).eval())

    def gradient_norms(self, latents: Tensor) -> Tensor:
        """(P,) norms of the decoded pictures' differences between neighbours, down and across."""
        return torch.cat([gradient_norm(self.encoders.decode(part)).cpu() for part in latents.split(self.config.batch)])


def gradient_norm(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) -> (B,)."""
    x = pictures.float()
    squares = [d.square().flatten(1).sum(1) for d in (x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1])]
    return (squares[0] + squares[1]).sqrt()


def reference_path(config: QualityConfig, prompts: Sequence[str], teacher: str) -> Path:
    """Where these reference latents are kept: the name depends on teacher, prompts, seed, guidance and steps."""
    key = json.dumps([teacher, list(prompts), config.seed, config.guidance, config.reference_steps])
    return config.cache / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def reference_latents(subject: Subject, path: Path) -> Tensor:
    """The teacher's end points (P, C, h, w), from `path` if it is there, else made and written there."""
    return kept(path, lambda: subject.teacher(subject.config.reference_steps))


def check_loras(loras: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """name -> path, sha256 and metadata of every file, before minutes are spent. Raises ValueError, one line."""
    found: dict[str, dict[str, Any]] = {}
    stems = Counter(path.stem for path in loras)
    for path in loras:
        if not path.is_file():
            raise ValueError(
                f"--loras {path} is not a file: name the .safetensors files that a run left in its lora/ folder"
            )
        metadata = read_lora(path)[1]
        name = path.stem if stems[path.stem] == 1 else str(path)
        found[name] = {"path": str(path), "sha256": sha256_of(path), "metadata": metadata and metadata.to_strings()}
    return found


def evaluate(config: QualityConfig, log: Callable[[str], None] = lambda _: None) -> Report:
    """All rows: the teacher's, then each LoRA's, at every step count; `log` hears of each as it is done.

    Raises:
        ValueError: a file that is missing or does not fit; one line says which.
    """
    check_sampling(config)
    prompts, loras = read_prompts(config), check_loras(config.loras)
    subject = Subject(config, prompts)
    digest = teacher_sha256(config.teacher)
    reference = reference_latents(subject, reference_path(config, prompts, digest))
    sharp = subject.gradient_norms(reference).clamp(min=1.0)  # a flat picture has none: one grey level, not zero
    settings = config.model_dump(mode="json") | {"torch": torch.__version__, "prompts_used": len(prompts)}
    text_hash = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    report = Report(settings, digest, text_hash, loras, reference.var().item())
    teacher: dict[int, Tensor] = {}

    def add(model: str, steps: int, latents: Tensor) -> None:
        distance = latent_distance(latents, reference)
        if model == "teacher":
            teacher[steps], versus = distance, None
        else:
            versus = paired_difference(distance, teacher[steps], seed=config.seed)
        sharpness = bootstrap_interval(subject.gradient_norms(latents) / sharp, seed=config.seed)
        inputs = () if model == "teacher" else subject.inputs(steps)
        report.rows.append(Row(model, steps, bootstrap_interval(distance, seed=config.seed), sharpness, versus, inputs))
        log(f"{name_of(report.rows[-1])}, {steps} steps: distance {report.rows[-1].distance.mean:.4f}")

    for steps in config.steps:
        add("teacher", steps, subject.teacher(steps))
    for name, lora in loras.items():
        subject.load_lora(Path(lora["path"]))
        for steps in filter(subject.can, config.steps):
            add(name, steps, subject.student(steps, config.sampler))
    return report


def name_of(row: Row) -> str:
    """The model, and the network's inputs where they are not the sampler's own."""
    return f"{row.model} from {', '.join(map(str, row.inputs))}" if row.inputs else row.model


def table(report: Report) -> str:
    """The rows in Markdown."""

    def cell(i: Interval | None) -> str:
        return "" if i is None else f"{i:.3g}"

    lines = ["| model | steps | distance | minus teacher's at as many steps | sharpness |", "|---|---:|---:|---:|---:|"]
    for row in report.rows:
        numbers = [cell(row.distance), cell(row.versus_teacher), f"{row.sharpness.mean:.3f}"]
        lines.append(f"| {name_of(row)} | {row.steps} | {' | '.join(numbers)} |")
    s = report.settings
    lines += [
        "",
        f"{s['prompts_used']} prompts, seed {s['seed']}; in brackets 95% bootstrap intervals over the prompts. "
        f"Reference: the teacher's {s['reference_steps']} DDIM steps at guidance {s['guidance']:g}. Teacher rows: "
        f"DDIM (trailing) at that guidance; LoRA rows: {s['sampler']}, eta {s['eta']:g}, no guidance.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    config: QualityConfig = read_options(QualityConfig, sys.argv[1:], __doc__ or "")
    report = evaluate(config, log=progress)
    print(table(report))
    save_report(config.out, asdict(report))


if __name__ == "__main__":
    run_job(main)
