"""What an evaluation comes to: every measure of every model with its interval, who is best, the cases, and on what it was made."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image

from evaluation.bootstrap import Interval, bootstrap_interval
from evaluation.harness.judges import FEATURES, OBJECTS, JudgeSpec, card_rows, chosen_judges, load_judge
from evaluation.harness.latency import Latency
from evaluation.harness.lpips import lpips_measure
from evaluation.harness.making import Done
from evaluation.harness.measures import (
    LATENTS,
    Draws,
    Keep,
    Measure,
    Read,
    cmmd_measure,
    fidelity_measure,
    objects_measure,
    reward_measure,
    seed_measure,
    vendi_measure,
)
from evaluation.harness.plan import Plan
from evaluation.harness.prompts import Row, coco_images
from evaluation.harness.sampler import PARTS
from evaluation.harness.store import Store, shards_of
from evaluation.harness.subjects import Cell, base_sha256, by_weights
from evaluation.rewards import named_objects
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.data.sources import find_shards

ROOT = Path(__file__).resolve().parents[2]
SET_RESAMPLES = 200
"""Of measures of the whole set, which are dear."""
DRAWS_VERSION = 1
"""Raise it with a change of what is drawn: draws that were kept before are then worked out again."""
CASES = 6
"""Best and worst pictures kept of each measure."""


def reader(what: Plan) -> Read:
    """Values of all prompts, kept once read."""
    store, files = Store(what.config.out), {spec.name: spec.file for spec in what.specs}
    kept: dict[tuple[str, str], np.ndarray] = {}

    def read(cell: Cell, judge: str) -> np.ndarray:
        if (cell.key, judge) not in kept:
            parts = shards_of(what.rows, what.config.per_shard)
            if judge == LATENTS:
                found = [store.read_latents(cell.key, part) for part in parts]
            else:
                found = [store.read_values(cell.key, part, files.get(judge, judge))[0] for part in parts]
            kept[cell.key, judge] = np.concatenate(found)
        return kept[cell.key, judge]

    return read


def keeper(what: Plan, read: Read, name: str, *about: Any) -> Keep:
    """Draws of a cell's own, kept in the store beside its scores: they take seconds a cell, and a comparison is judged more
    than once. `about` is what they are a function of beside prompts and scores. None with a missing score is kept."""
    store = Store(what.config.out)
    told = [DRAWS_VERSION, what.config.seed, [[row.key, row.prompt] for row in what.rows], *about]
    text = json.dumps(told, default=str).encode()

    def keep(cell: Cell, draws: Callable[[], Draws]) -> Draws:
        scores = read(cell, OBJECTS if name == OBJECTS else FEATURES).tobytes()
        file = f"{name}.{hashlib.sha256(text + scores).hexdigest()[:16]}.draws.npz"
        if file in store.names(cell.key):
            array = np.load(io.BytesIO(store.read(cell.key, file)))
            return Draws(float(array["point"]), torch.from_numpy(array["draws"]), bool(array["centred"]))
        found = draws()
        if not found.missing:
            data = io.BytesIO()
            np.savez(data, point=found.point, draws=found.draws.numpy(), centred=found.centred)
            store.write(cell.key, file, data.getvalue())
        return found

    return keep


def measures(what: Plan, read: Read) -> list[Measure]:
    """The columns."""
    config, found = what.config, []
    by_name = {spec.name: spec for spec in what.specs}
    judges = chosen_judges(config)
    found += [reward_measure(spec) for spec in what.specs if spec.kind == "reward"]
    if OBJECTS in by_name:
        named = named_objects(Path(judges.annotations), Path(judges.captions), [row.prompt for row in what.rows])
        if any(named):
            spec, resamples = by_name[OBJECTS], config.resamples // 2
            keep = keeper(what, read, OBJECTS, spec.sha256, named, resamples)
            found.append(objects_measure(spec, named, resamples, config.seed, keep))
    if what.references:
        found.append(fidelity_measure(what.references, config.reference_steps, config.teacher_guidance))
    if what.between is not None:
        found.append(lpips_measure(what.between))
    if FEATURES in by_name:
        spec = by_name[FEATURES]
        keep = keeper(what, read, "vendi", spec.sha256, SET_RESAMPLES)
        found.append(vendi_measure(spec, SET_RESAMPLES, config.seed, keep))
        if config.images_per_prompt > 1:
            found.append(seed_measure(spec))
        if config.reference_pictures:
            real, where = real_features(config, spec), Path(config.reference_pictures).name
            keep = keeper(
                what, read, "cmmd", spec.sha256, SET_RESAMPLES, config.reference_pictures, real.double().sum().item()
            )
            found.append(cmmd_measure(spec, real, where, SET_RESAMPLES, config.seed, keep))
    return found


def real_features(config: EvaluateConfig, spec: JudgeSpec) -> torch.Tensor:
    """(N, D) of the pictures of `config.reference_pictures`, kept in `out`.

    Raises:
        ConfigError: there are none.
    """
    urls = find_shards((config.reference_pictures,), "webdataset").urls
    store, name = Store(config.out), f"real.{spec.file}.npz"
    where = "real-" + hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
    if name in store.names(where):
        return torch.from_numpy(np.load(io.BytesIO(store.read(where, name)))["values"])
    judge, parts = load_judge(spec), []
    for url in urls:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if member.name.endswith((".png", ".jpg", ".jpeg", ".webp")):
                    picture = np.asarray(Image.open(tar.extractfile(member)).convert("RGB"))  # type: ignore[arg-type]
                    parts.append(judge(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255.0, [""])[0])
    if len(parts) < 2:
        raise ConfigError(f"--reference-pictures {config.reference_pictures}: {len(parts)} pictures, at least 2")
    data = io.BytesIO()
    np.savez_compressed(data, values=np.stack(parts))
    store.write(where, name, data.getvalue())
    return torch.from_numpy(np.stack(parts))


def results(what: Plan, done: Done, speeds: dict[str, Latency]) -> dict[str, Any]:
    """All that the report needs beside the pictures themselves, as JSON."""
    config, read = what.config, reader(what)
    columns = measures(what, read)
    estimates = {
        group: {m.name: e for m in columns if (e := m.estimate(cells, read)) is not None} for group, cells in what.groups.items()
    }  # fmt: skip
    best = ranking(what, columns, estimates)
    rows = []
    for (model, steps), cells in what.groups.items():
        ours, theirs = estimates[model, steps], _baseline_of(what, estimates, steps)
        versus = theirs if model != what.baseline else {}
        rows.append({
            "model": model, "steps": steps, "cells": [cell.key for cell in cells], "how": asdict(cells[0].how),
            "kind": cells[0].kind, "weights": sorted(by_weights(cells)),
            "measures": {n: _finite(e.interval(config.resamples, config.seed)) for n, e in ours.items()},
            "versus": {
                n: _finite(e.minus(versus[n], config.resamples, config.seed)) for n, e in ours.items() if n in versus  # type: ignore[arg-type]
            },
            "missing": {n: e.missing for n, e in ours.items() if e.missing},
            "spread": _spread(columns, cells, read),
            "latency": _latency(speeds.get(cells[0].key), config),
            "cases": {m.name: found for m in columns if (found := _cases(m, cells, what.rows, read))},
        })  # fmt: skip
    return {
        "settings": config.model_dump(mode="json"),
        "prompts": {
            "name": config.prompts, "count": len(what.rows), "images": coco_images(config),
            "sha256": hashlib.sha256("\n".join(f"{r.key}\t{r.prompt}" for r in what.rows).encode()).hexdigest(),
            "first": [[row.key, row.prompt] for row in what.rows[:12]],
        },
        "models": [s.name for s in what.subjects], "baseline": what.baseline, "cards": card_rows([m.card for m in columns]),
        "done": asdict(done), "rows": rows, "ranking": best, "provenance": provenance(config),
    }  # fmt: skip


def ranking(
    what: Plan, columns: Sequence[Measure], estimates: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """measure -> steps -> the best of the models, and those that cannot be told from it: the paired difference's interval
    holds 0. The base model does not take part."""
    config, found = what.config, {}
    for measure in columns:
        sign, of_steps = 1 if measure.card.better == "higher" else -1, {}
        for steps in sorted({n for _, n in estimates}):
            there = {
                model: e[measure.name] for (model, n), e in estimates.items()
                if n == steps and measure.name in e and not _is_base(config, what.groups[model, n][0])
            }  # fmt: skip
            means = {model: sign * e.interval(100, config.seed).mean for model, e in there.items()}
            means = {model: mean for model, mean in means.items() if math.isfinite(mean)}
            if len(means) > 1:
                first = max(means, key=lambda model: means[model])
                gaps = {m: there[m].minus(there[first], config.resamples, config.seed) for m in means if m != first}
                of_steps[str(steps)] = {
                    "best": first,
                    "ties": [m for m, gap in gaps.items() if gap.low <= 0 <= gap.high],
                }
        found[measure.name] = of_steps
    return found


def _is_base(config: EvaluateConfig, cell: Cell) -> bool:
    return cell.kind == "base" and cell.base == str(Path(config.base).resolve())


def _baseline_of(what: Plan, estimates: dict[tuple[str, int], dict[str, Any]], steps: int) -> dict[str, Any]:
    """At as many steps; where the baseline has one number of steps only, that."""
    if not what.baseline:
        return {}
    of = {n: e for (model, n), e in estimates.items() if model == what.baseline}
    return of.get(steps) or (next(iter(of.values())) if len(of) == 1 else {})


def _spread(columns: Sequence[Measure], cells: Sequence[Cell], read: Read) -> dict[str, float]:
    """Standard deviation of the means of models that differ in the seed of their training."""
    weights = [of[0] for of in by_weights(cells).values()]
    if len(weights) < 2:
        return {}
    found = {}
    for measure in columns:
        each = [measure.estimate([cell], read) for cell in weights]
        means = [e.interval(100, 0).mean for e in each if e is not None]
        if len(means) == len(weights) and all(map(math.isfinite, means)):
            found[measure.name] = float(np.std(means, ddof=1))
    return found


def _finite(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}


def _latency(speed: Latency | None, config: EvaluateConfig) -> dict[str, Any] | None:
    """Milliseconds and megabytes."""
    if speed is None:
        return None
    seconds = {part: torch.tensor(speed.seconds[part]) * 1e3 for part in PARTS}
    seconds["whole"] = torch.stack(list(seconds.values())).sum(0)
    several = len(seconds["whole"]) > 1
    return {
        "device": speed.device, "threads": speed.threads,
        "ms": {
            part: _finite(bootstrap_interval(s, resamples=config.resamples) if several else Interval(*[s.item()] * 3))
            for part, s in seconds.items()
        },
        "weights_mb": {part: speed.weights[part] / 1e6 for part in PARTS},
        "activations_mb": {part: speed.activations[part] / 1e6 for part in PARTS},
        "peak_mb": (sum(speed.weights.values()) + max(speed.activations.values())) / 1e6,
    }  # fmt: skip


def _cases(
    measure: Measure, cells: Sequence[Cell], rows: Sequence[Row], read: Read
) -> dict[str, list[tuple[str, str, float]]]:
    """Best and worst pictures of the first cell; nothing where the measure says nothing of single ones."""
    values = measure.cases(cells, read)
    if values is None:
        return {}
    order = [int(i) for i in np.argsort(values) if np.isfinite(values[i])]
    worst_first = order if measure.card.better == "higher" else order[::-1]
    told = lambda i: (rows[i].key, rows[i].prompt, float(values[i]))
    return {"worst": [told(i) for i in worst_first[:CASES]], "best": [told(i) for i in worst_first[::-1][:CASES]]}


def provenance(config: EvaluateConfig) -> dict[str, Any]:
    """Which code, on what."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    packages = ("torch", "diffusers", "transformers", "ray", "numpy")
    return {
        "commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(git("status", "--porcelain")),
        "packages": {name: version(name) for name in packages}, "python": platform.python_version(),
        "device": "GPU" if config.generators.num_gpus else f"CPU {platform.machine()}", "cores": os.cpu_count(),
        "base": Path(config.base).name, "base_sha256": base_sha256(config.base),
    }  # fmt: skip
