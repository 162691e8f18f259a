"""What came out of a sweep: a table, a parallel-coordinates picture, and the best against the base with intervals."""

from __future__ import annotations

import csv
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch

from evaluation.bootstrap import Interval, paired_difference, paired_means, percentiles
from hypersd_ray.config.sweep import LOGARITHMIC, SweepConfig
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.conditioning import square_time_ids
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.lora_file import read_lora
from hypersd_ray.models.roles import STUDENT
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds.base import build_roles
from hypersd_ray.trainer.kinds.tscd import product, samplings
from hypersd_ray.trainer.loop import latent_shape
from hypersd_ray.training.quality import Quality, Yardstick
from hypersd_ray.training.samples import Sampling
from hypersd_ray.tuning.space import held, readable
from hypersd_ray.tuning.sweep import Outcome, Trial, base_run, sweep_folder


def rows(sweep: SweepConfig, outcome: Outcome) -> list[dict[str, Any]]:
    """One a run, the best first: its settings, its objective after each stage, and how far it came."""
    stages, found = sweep.base.stages, []
    for trial in sorted(outcome.trials, key=lambda t: (t.objective(stages), -len(t.stages), t.name)):
        by_stage = {record["stage"]: record["objective"] for record in trial.stages}
        point = {} if trial.name == "base" else {**held(sweep.space), **trial.point}
        values: dict[str, Any] = {"run": trial.name, "state": trial.state} | readable(sweep.base, point)
        found.append(values | {f"objective_k{k}": by_stage.get(i + 1) for i, k in enumerate(sweep.base.distill.k_list)})
    return found


def write_csv(sweep: SweepConfig, outcome: Outcome, path: Path) -> None:
    """`rows` as a file."""
    lines = rows(sweep, outcome)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def table(sweep: SweepConfig, outcome: Outcome) -> str:
    """`rows` in Markdown; less is better."""
    lines = rows(sweep, outcome)

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    head = list(lines[0])
    body = ["| " + " | ".join(cell(row[name]) for name in head) + " |" for row in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


def draw_parallel(sweep: SweepConfig, outcome: Outcome, path: Path) -> None:
    """Each run a line through its settings to its objective; the base is dashed, runs that were stopped are grey."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = rows(sweep, outcome)
    last = f"objective_k{sweep.base.distill.k_list[-1]}"
    axes = [n for n in lines[0] if n not in ("run", "state") and not n.startswith("objective")]
    ranges = {}
    for name in [*axes, last]:
        values = [_height(name, row[name]) for row in lines if row[name] is not None and math.isfinite(row[name])]
        ranges[name] = (min(values, default=0.0), max(values, default=1.0))
    figure = Figure(figsize=(1.5 * (len(axes) + 1), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for row in reversed(lines):
        ended = row[last] is not None and math.isfinite(row[last])
        names = [*axes, last] if ended else axes
        heights = [_share(ranges[n], _height(n, row[n])) for n in names]
        colour: Any = colormaps["viridis_r"](heights[-1]) if ended else "0.75"
        ax.plot(range(len(names)), heights, color=colour, linewidth=2.5 if row["run"] in ("base", outcome.best.name) else 1.2,
                linestyle="--" if row["run"] == "base" else "-", zorder=3 if ended else 1)  # fmt: skip
    for i, name in enumerate([*axes, last]):
        ax.axvline(i, color="0.3", linewidth=0.8, zorder=2)
        for share, va in ((0.0, "top"), (1.0, "bottom")):
            value = ranges[name][round(share)]
            shown = math.exp(value) if name in LOGARITHMIC else value
            ax.text(i, share + (0.02 if share else -0.02), f"{shown:.3g}", ha="center", va=va, fontsize=8)
    ax.set_xticks(range(len(axes) + 1), [*axes, "objective"], fontsize=9)
    ax.set_ylim(-0.1, 1.1)
    ax.set_yticks([])
    ax.tick_params(length=0, pad=12)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(
        f"{sweep.name}: best {outcome.best.name} (less is better); base dashed, stopped runs grey", fontsize=10
    )
    figure.savefig(path)


def _height(name: str, value: float) -> float:
    return math.log(max(value, 1e-12)) if name in LOGARITHMIC else value


def _share(span: tuple[float, float], value: float) -> float:
    low, high = span
    return 0.5 if high == low else (value - low) / (high - low)


def measured(sweep: SweepConfig, trials: list[Trial], prompts: tuple[str, ...]) -> dict[str, Quality]:
    """Each run's last LoRA on `prompts`, all from the same x_T; where a worker would be, for a head may have no cores."""
    run = sweep.base.run
    resources = {"num_cpus": run.cpus_per_worker, "num_gpus": run.gpus_per_worker}
    names = [trial.name for trial in trials]
    return ray.get(ray.remote(_measured).options(**resources).remote(sweep, names, prompts))


def _measured(sweep: SweepConfig, trials: list[str], prompts: tuple[str, ...]) -> dict[str, Quality]:
    config = base_run(sweep)
    device = "cuda" if config.run.gpus_per_worker else "cpu"
    if device == "cpu":  # no trial runs any more
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure = config.measure.model_copy(update={"prompts": prompts})
    roles, _ = build_roles(config, torch.device(device))
    encoders = load_encoders(config.teacher, device=device)
    time_ids = square_time_ids(config.data.resolution, 1, device) if encoders.is_sdxl else None
    yardstick = Yardstick(measure, roles, encoders, read_base(config.teacher).path, latent_shape(config), time_ids)
    known = {how.steps: how for how in samplings(config)}  # as the objective was measured
    eta = next(iter(known.values())).eta
    found, folder = {}, sweep_folder(sweep)
    with tempfile.TemporaryDirectory() as temporary:
        for name in trials:
            place = f"{folder}/base/{config.run.name}" if name == "base" else f"{folder}/trials/{name}"
            local = Path(temporary) / f"{name}.safetensors"
            storage.get(f"{place}/{product(config, config.distill.k_list[-1])}", local)
            roles.load(STUDENT, read_lora(local)[0])
            found[name] = yardstick({n: known.get(n, Sampling(n, eta=eta)) for n in measure.steps})
    return found


def compare(sweep: SweepConfig, outcome: Outcome) -> str:
    """The best against the base in Markdown, on the prompts that nothing was chosen by where there are some."""
    base, best = outcome.trials[0], outcome.best
    if best.name == "base":
        return "No trial was better than the base: best.yaml is the base's configuration."
    if sweep.confirm:
        by_name = measured(sweep, [base, best], sweep.confirm)
        where = f"{len(sweep.confirm)} prompts that nothing was chosen by"
    else:
        by_name = {t.name: _recorded(t.stages[-1]) for t in (base, best)}
        where = "the prompts that the best was chosen by, which flatters it"
    lines = [
        f"{best.name} against the base on {where}, same noise; in brackets 95% bootstrap intervals of the paired differences.",
        "",
        "| steps | distance, base | best minus base | CLIP score, base | best minus base |",
        "|---:|---:|---:|---:|---:|",
    ]
    ours, theirs = by_name[best.name], by_name["base"]
    for n in theirs.distance:
        cells = [str(n)]
        for mine, its in ((ours.distance, theirs.distance), (ours.clip, theirs.clip)):
            cells += ["", ""] if n not in its else [f"{sum(its[n]) / len(its[n]):.4g}", _cell(mine[n], its[n])]
        lines.append("| " + " | ".join(cells) + " |")
    i = objective_difference(ours, theirs, sweep.base.measure.clip_weight)
    lines += ["", f"objective (less is better), best minus base: {i:+.4g}"]
    if sweep.warm_start:
        lines += ["", "best.yaml begins, as the best trial did, from the base's first stage (first_stage)."]
    return "\n".join(lines)


def objective_difference(ours: Quality, theirs: Quality, clip_weight: float) -> Interval:
    """Of two students on the same prompts; the teacher's CLIP score cancels out. 95%, the prompts kept together."""

    def log_ratio(a: dict[int, list[float]], b: dict[int, list[float]], least: float) -> torch.Tensor:
        """(1 + resamples,): first that of all prompts."""
        one, other = (torch.tensor([values[n] for n in theirs.distance]) for values in (a, b))
        drawn = zip((one.double().mean(1)[None], other.double().mean(1)[None]), paired_means(one, other), strict=True)
        mine, its = (torch.cat(pair).clamp(min=least).log() for pair in drawn)
        return (mine - its).mean(1)

    values = log_ratio(ours.distance, theirs.distance, 1e-12)
    if theirs.clip and clip_weight:
        values = values - clip_weight * log_ratio(ours.clip, theirs.clip, 1e-6)
    return percentiles(values[0].item(), values[1:])


def _recorded(record: dict[str, Any]) -> Quality:
    distance, clip = ({int(n): v for n, v in record[name].items()} for name in ("distance", "clip"))
    return Quality(distance, clip, record["teacher_clip"])


def _cell(ours: list[float], theirs: list[float]) -> str:
    return f"{paired_difference(torch.tensor(ours), torch.tensor(theirs)):+.4g}"
