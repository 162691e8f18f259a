"""Whether few-step LoRAs follow a ControlNet as their teacher does (paper, Fig. 10): agreement of edges.

    python evaluation/control.py --controlnet runs/controlnet/canny --grid canny.png \\
        --loras hypersd_ray/embedded/loras/tscd-k1.safetensors hypersd_ray/embedded/loras/tscd-k2.safetensors

Held-out pictures give the hints and the captions. Each model draws them with and without the ControlNet from the same x_T;
edges of what it drew, against the hint, give an F1 within one pixel. In brackets 95% bootstrap intervals over the pictures.
The hints' own row has the real pictures after the autoencoder, the most that can be had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from pydantic import Field
from torch import Tensor

from evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from evaluation.output import progress, save_report
from evaluation.quality import check_loras
from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures, to_unit
from hypersd_ray.models.edges import Hint, edge_map
from hypersd_ray.models.samplers import diffusers_scheduler
from hypersd_ray.training.samples import start_noise


class ControlConfig(Strict):
    """The ControlNet, the LoRAs and the pictures."""

    controlnet: Path
    """Folder of the ControlNet; its name says which hints it takes, if `kind` does not."""
    kind: Hint | None = None
    """Hints: "canny" or "scribble"."""
    loras: tuple[Path, ...] = ()
    """LoRA files of the teacher; the teacher itself is always measured."""
    teacher: Path = paths.TEACHER
    """Folder of the base model in diffusers' layout."""
    data: Path = paths.DATA
    """Folder with val-*.tar."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Sampling steps of the LoRAs, by diffusers' TCDScheduler."""
    teacher_steps: int = Field(default=25, ge=1)
    """DDIM steps of the teacher."""
    guidance: float = Field(default=3.0, ge=1)
    """The teacher's guidance scale."""
    pictures: int = Field(default=256, ge=2)
    """Held-out pictures."""
    seed: int = 0
    """x_T and the bootstrap are functions of it."""
    batch: int = Field(default=64, ge=1)
    """Pictures at a time."""
    out: Path | None = None
    """The JSON file that is written; None is runs/control-KIND.json."""
    grid: Path | None = None
    """A picture that is written too: the first pictures' hints and what each model made of them."""
    columns: int = Field(default=10, ge=1)
    """Pictures in it."""


@dataclass(frozen=True)
class Row:
    """Agreement with and without the ControlNet."""

    model: str
    steps: int
    agreement: Interval
    gain: Interval | None


@dataclass(frozen=True)
class Report:
    """What the JSON file holds."""

    settings: dict[str, Any]
    loras: dict[str, dict[str, Any]]
    rows: list[Row] = field(default_factory=list)


def edge_agreement(found: Tensor, wanted: Tensor, tolerance: int = 1) -> Tensor:
    """(B,) F1 of edges within `tolerance` pixels: harmonic mean of how much of `found` is wanted and of `wanted` found.

    Both are maps of `edge_map`, uint8 (B, 3, H, W). 1 where neither has an edge, 0 where one has none.
    """
    a, b = (x[:, :1].float() / 255 for x in (found, wanted))
    near = lambda x: torch.nn.functional.max_pool2d(x, 2 * tolerance + 1, 1, tolerance)
    count = lambda x: x.flatten(1).sum(1)
    right = count(a * near(b)) / count(a).clamp(min=1)
    covered = count(b * near(a)) / count(b).clamp(min=1)
    agreement = 2 * right * covered / (right + covered).clamp(min=1e-9)
    return torch.where((count(a) == 0) & (count(b) == 0), 1.0, agreement)


class Drawing:
    """The pipeline with a ControlNet, the pictures and their hints."""

    def __init__(self, config: ControlConfig, kind: Hint):
        pictures, captions = load_pictures(config.data, "val")
        self.config, self.kind = config, kind
        self.pictures, self.captions = pictures[: config.pictures], captions[: config.pictures]
        self.hints = edge_map(self.pictures, kind)
        net = ControlNetModel.from_pretrained(config.controlnet, local_files_only=True, use_safetensors=True)
        self.pipe = StableDiffusionControlNetPipeline.from_pretrained(
            config.teacher, controlnet=net, safety_checker=None, local_files_only=True, use_safetensors=True
        )
        self.pipe.set_progress_bar_config(disable=True)
        unet = self.pipe.unet.config
        self.x_T = start_noise(config.seed, self.captions, (unet.in_channels, *[unet.sample_size] * 2))

    def as_seen(self) -> Tensor:
        """The real pictures after the autoencoder, uint8."""
        parts = []
        with torch.no_grad():
            for part in self.pictures.split(self.config.batch):
                parts.append(_bytes(self.pipe.vae(to_unit(part)).sample / 2 + 0.5))
        return torch.cat(parts)

    def __call__(self, scheduler: Any, steps: int, guidance: float, scale: float) -> Tensor:
        """Pictures uint8 with the ControlNet at `scale`; 0 is without."""
        self.pipe.scheduler = scheduler
        parts = []
        for i in range(0, len(self.captions), self.config.batch):
            chunk = slice(i, i + self.config.batch)
            drawn = self.pipe(
                prompt=self.captions[chunk], image=self.hints[chunk].float() / 255, latents=self.x_T[chunk],
                num_inference_steps=steps, guidance_scale=guidance, controlnet_conditioning_scale=scale, eta=0.0,
                output_type="pt",
            ).images  # fmt: skip
            parts.append(_bytes(drawn))
        return torch.cat(parts)


def _bytes(pictures: Tensor) -> Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def evaluate(
    config: ControlConfig,
    log: Callable[[str], None] = lambda _: None,
    show: Callable[[str, Tensor], None] = lambda *_: None,
) -> Report:
    """The autoencoder's row, the teacher's, then each LoRA's at every step count. `show` gets the hints and every row's
    pictures with the ControlNet.

    Raises:
        ValueError: a file that is missing or does not fit; one line says which.
    """
    if not (config.controlnet / "config.json").is_file():
        raise ValueError(f"--controlnet {config.controlnet} is not a ControlNet's folder: jobs/controlnet.py makes one")
    kinds: dict[str, Hint] = {"canny": "canny", "scribble": "scribble"}
    kind = kinds.get(config.kind or config.controlnet.name)
    if kind is None:
        raise ValueError(f"--controlnet {config.controlnet}: say which hints it takes, --kind canny or scribble")
    loras, drawing = check_loras(config.loras), Drawing(config, kind)
    report = Report(config.model_dump(mode="json") | {"kind": kind}, loras)

    def agreement(pictures: Tensor) -> Tensor:
        return edge_agreement(edge_map(pictures, kind), drawing.hints)

    def add(model: str, steps: int, scheduler: Any, guidance: float) -> None:
        pictures = drawing(scheduler, steps, guidance, 1.0)
        show(f"{model} {steps}", pictures)
        with_it = agreement(pictures)
        without = agreement(drawing(scheduler, steps, guidance, 0.0))
        gain = paired_difference(with_it, without, seed=config.seed)
        report.rows.append(Row(model, steps, bootstrap_interval(with_it, seed=config.seed), gain))
        log(f"{model}, {steps} steps: edges agree {report.rows[-1].agreement.mean:.3f}, {gain.mean:+.3f}")

    show("hint", drawing.hints)
    own = bootstrap_interval(agreement(drawing.as_seen()), seed=config.seed)
    report.rows.append(Row("real pictures, autoencoded", 0, own, None))
    scheduler = drawing.pipe.scheduler.config
    add("teacher", config.teacher_steps, diffusers_scheduler("ddim", scheduler), config.guidance)
    for name, lora in loras.items():
        drawing.pipe.unload_lora_weights()
        drawing.pipe.load_lora_weights(lora["path"])
        tcd = diffusers_scheduler("tcd", scheduler)
        for steps in config.steps:
            add(name, steps, tcd, 0.0)
    return report


def table(report: Report) -> str:
    """The rows in Markdown."""
    lines = ["| model | steps | edges agree (F1) | gained by the ControlNet |", "|---|---:|---:|---:|"]
    for row in report.rows:
        gain = "" if row.gain is None else f"{row.gain:+.3f}"
        lines.append(f"| {row.model} | {row.steps or ''} | {row.agreement:.3f} | {gain} |")
    return "\n".join(lines)


def out_file(config: ControlConfig, report: Report) -> Path:
    """The JSON file of the report: each kind of hints has its own."""
    return config.out or Path(f"runs/control-{report.settings['kind']}.json")


def main() -> None:
    """Measure, print the table, write the JSON file."""
    config: ControlConfig = read_options(ControlConfig, sys.argv[1:], __doc__ or "")
    seen: dict[str, Tensor] = {}
    report = evaluate(
        config,
        log=progress,
        show=lambda name, pictures: seen.update({name: pictures[: config.columns]}),
    )
    print(table(report))
    out = out_file(config, report)
    save_report(out, asdict(report))
    if config.grid is not None:
        from evaluation.pictures import draw_grid

        captions = load_pictures(config.data, "val")[1][: len(seen["hint"])]
        config.grid.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(seen, captions, config.grid, f"same noise, the same {report.settings['kind']} hints")


if __name__ == "__main__":
    run_job(main)
