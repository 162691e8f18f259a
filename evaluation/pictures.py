"""Pictures of a run for a person to look at: same-seed sample grids and loss curves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import ray
import torch

from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning, square_time_ids
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.lora_file import alpha_of, read_lora
from hypersd_ray.models.roles import STUDENT, TEACHER, Plain
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds import AnyConfig, onestep, tscd
from hypersd_ray.trainer.kinds.base import build_roles
from hypersd_ray.trainer.loop import latent_shape
from hypersd_ray.training import samples

TEACHER_STEPS = (1, 2, 4, 8, 25)
CURVES = (
    "consistency", "dmd", "fake_score", "regression", "adversarial", "discriminator", "aes", "percep", "drift",
    "saturation", "diversity", "grad_norm",
)  # fmt: skip
CURVE_GROUPS = ("reward", "watch")
"""First part of the names of scores."""


@torch.no_grad()
def sample_rows(
    config: TSCDConfig, lora: Path | None, prompts: Sequence[str], omega: float, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Pictures uint8 (B, 3, H, W) of teacher and student from the same noise, by row name ("teacher 4", "student 1", ...)."""
    roles, null = build_roles(config, torch.device(device))
    if lora is not None:
        roles.load(STUDENT, read_lora(lora)[0])
    encoders = load_encoders(config.teacher, device=device)
    embeds = encoders.encode_prompts(list(prompts))
    x_T = samples.start_noise(config.run.seed, prompts, latent_shape(config)).to(device)
    ids = square_time_ids(config.data.resolution, len(prompts), device) if encoders.is_sdxl else None
    cond = Conditioning(embeds.prompt_embeds, embeds.pooled, ids)
    rows = {
        f"teacher {n}": samples.teacher_samples(roles, x_T, cond, null.with_time_ids(ids), n, omega)
        for n in TEACHER_STEPS
    }
    if lora is not None:
        found = (onestep if isinstance(config, OneStepConfig) else tscd).samplings(config)
        samplings = sorted(found, key=lambda sampling: sampling.steps)
        rows |= {f"student {how.steps}": samples.student_samples(roles, STUDENT, x_T, cond, how) for how in samplings}
    before = onestep.initial_lora(config) if isinstance(config, OneStepConfig) and not config.full_unet else None
    if before is not None:
        roles.load(STUDENT, before)
        rows |= {f"before {n}": samples.student_samples(roles, STUDENT, x_T, cond, n) for n in (1, 2)}
    return {name: encoders.decode(latents).cpu() for name, latents in rows.items()}


def placed_rows(config: TSCDConfig, lora: str, omega: float) -> dict[str, torch.Tensor]:
    """`sample_rows` of the LoRA at `lora` (any fsspec URL), on a GPU of the cluster where the run has any, else here."""
    return _placed(config, _rows_of, lora, omega)


def placed_feedback_rows(
    config: FeedbackConfig, loras: dict[str, str], prompts: Sequence[str], steps: Sequence[int]
) -> dict[str, torch.Tensor]:
    """`feedback_rows` of the LoRAs at any fsspec URL, on a GPU of the cluster where the run has any, else here."""
    return _placed(config, _feedback_rows_of, loras, prompts, steps)


def _placed(
    config: AnyConfig, rows: Callable[..., dict[str, torch.Tensor]], *arguments: Any
) -> dict[str, torch.Tensor]:
    """rows(config, *arguments, device) where a worker of the run would be."""
    if not config.run.gpus_per_worker:
        return rows(config, *arguments, "cpu")
    config = config.located(storage.absolute)  # a task runs in another directory
    resources = {"num_gpus": config.run.gpus_per_worker, "num_cpus": config.run.cpus_per_worker}
    return ray.get(ray.remote(rows).options(**resources).remote(config, *arguments, "cuda"))


def _rows_of(config: TSCDConfig, lora: str, omega: float, device: str) -> dict[str, torch.Tensor]:
    with storage.local_copy(lora, "lora") as path:
        return sample_rows(config, path, config.run.prompts, omega, device)


def _feedback_rows_of(
    config: FeedbackConfig, loras: dict[str, str], prompts: Sequence[str], steps: Sequence[int], device: str
) -> dict[str, torch.Tensor]:
    with contextlib.ExitStack() as copies:
        local = {name: copies.enter_context(storage.local_copy(url, "lora")) for name, url in loras.items()}
        return feedback_rows(config, local, prompts, steps, device)


@torch.no_grad()
def feedback_rows(
    config: FeedbackConfig, loras: dict[str, Path], prompts: Sequence[str], steps: Sequence[int], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Pictures uint8 (B, 3, H, W) of several LoRAs from the same noise, by row name ("before 1", "after 1", ...)."""
    info, encoders = read_base(config.teacher), load_encoders(config.teacher, device=device)
    embeds = encoders.encode_prompts(list(prompts))
    ids = square_time_ids(config.data.resolution, len(prompts), device) if encoders.is_sdxl else None
    cond, rows = Conditioning(embeds.prompt_embeds, embeds.pooled, ids), {}
    for name, path in loras.items():
        unet = load_unet(info, torch.float32, device)
        tensors, metadata = read_lora(path)
        merge_lora(unet, tensors, alpha_of(tensors, metadata))
        roles = Plain(unet, info.schedule, info.parameterization)
        x_T = samples.start_noise(config.run.seed, prompts, latent_shape(config)).to(device)
        for n in steps:
            rows[f"{name} {n}"] = encoders.decode(samples.student_samples(roles, TEACHER, x_T, cond, n)).cpu()
    return {name: rows[name] for name in sorted(rows, key=lambda name: int(name.split()[-1]))}


def draw_grid(rows: dict[str, torch.Tensor], prompts: Sequence[str], path: Path, title: str) -> None:
    """One line of pictures per row of `rows`, uint8 (columns, 3, H, W), by name ("tscd-k1 1" in 1 step); one column per prompt."""
    columns = len(prompts)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.35 * columns + 1, 1.3 * len(rows) + 0.9), squeeze=False)
    for axis_row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axis_row[0].set_ylabel(_row_label(name), rotation=0, ha="right", va="center", fontsize=9)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title("\n".join(_wrap(prompt, 18)), fontsize=6)
    figure.suptitle("\n".join(_wrap(title, int(13 * figure.get_figwidth()))), fontsize=10)
    figure.tight_layout(pad=0.4, rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110, bbox_inches="tight")  # a narrow grid's names stand out of it
    plt.close(figure)


def _row_label(name: str) -> str:
    """A number at the end is one of steps."""
    last = name.split()[-1]
    return f"{name} step{'s' * (last != '1')}" if last.isdecimal() else name


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines but for torn ones, which a killed process leaves."""
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def draw_curves(metrics: Path, path: Path) -> None:
    """Every loss of `metrics.jsonl` against the step, with the stages' borders."""
    rows = {row["step"]: row for row in _rows(metrics)}  # a resumed run writes a step twice
    steps = sorted(rows)
    names = [n for n in CURVES if any(n in row for row in rows.values())]
    names += sorted({n for row in rows.values() for n in row if n.partition("/")[0] in CURVE_GROUPS})
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 2.1 * len(names)), sharex=True, squeeze=False)
    borders = [s for s, before in zip(steps[1:], steps, strict=False) if rows[s].get("k") != rows[before].get("k")]
    for axis, name in zip(axes[:, 0], names, strict=True):
        points = [(s, rows[s][name]) for s in steps if rows[s].get(name) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_ylabel(name)
        if name in ("consistency", "regression", "grad_norm"):
            axis.set_yscale("log")
        for border in borders:
            axis.axvline(border, color="grey", linestyle=":", linewidth=1)
    for k, first in {rows[s]["k"]: s for s in reversed(steps) if "k" in rows[s]}.items():
        axes[0, 0].annotate(f"k = {k}", (first, 1.02), xycoords=("data", "axes fraction"), fontsize=8)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
