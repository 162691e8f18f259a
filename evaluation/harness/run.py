"""A whole evaluation: find what is missing, make and judge it, and say what it comes to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from evaluation.bootstrap import Interval, bootstrap_interval
from evaluation.harness import latency, lpips
from evaluation.harness.judges import FEATURES, OBJECTS, JudgeSpec, card_rows, chosen_judges, judge_specs, load_judge
from evaluation.harness.lpips import lpips_measure
from evaluation.harness.making import Done, make, tasks
from evaluation.harness.measures import (
    LATENTS,
    Measure,
    Read,
    cmmd_measure,
    fidelity_measure,
    objects_measure,
    reward_measure,
    seed_measure,
    vendi_measure,
)
from evaluation.harness.prompts import Row
from evaluation.harness.sampler import PARTS, Sampler
from evaluation.harness.store import Store, shard_name, shards_of
from evaluation.harness.subjects import TEACHER, Cell, Subject, teacher
from evaluation.rewards import named_objects
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import EncoderPool
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.trainer.run import connect

ROOT = Path(__file__).resolve().parents[2]
Log = Callable[[str], None]
SET_RESAMPLES = 200
"""Of measures of the whole set, which are dear."""
CASES = 6
"""Best and worst pictures kept of each measure."""


@dataclass(frozen=True)
class Plan:
    """What an evaluation consists of, before anything is made."""

    config: EvaluateConfig
    rows: list[Row]
    subjects: list[Subject]
    baseline: str
    specs: list[JudgeSpec]
    groups: dict[tuple[str, int], list[Cell]]
    references: dict[int, Cell]
    between: JudgeSpec | None = None

    @property
    def cells(self) -> list[Cell]:
        """All that are judged."""
        return [cell for cells in self.groups.values() for cell in cells]


def plan(
    config: EvaluateConfig,
    rows: list[Row],
    subjects: Sequence[Subject],
    baseline: Subject | None = None,
    only: Sequence[str] = (),
) -> Plan:
    """Which cells there are. Subjects of one name are one model, trained from several seeds. `only` these judges; none: all.

    Raises:
        ConfigError: judges' files are missing; two models that are not one have a name.
    """
    seeds = range(config.seed, config.seed + config.images_per_prompt)
    dtype = config.generators.dtype
    groups: dict[tuple[str, int], list[Cell]] = {}
    for subject in [*([baseline] if baseline else []), *subjects]:
        for seed in seeds:
            for cell in subject.cells(seed, dtype):
                of = groups.setdefault((subject.name, cell.steps), [])
                if cell.key not in {c.key for c in of}:
                    of.append(cell)
    references: dict[int, Cell] = {}
    if config.reference_steps:
        whole = teacher(config, [config.reference_steps])
        references = {seed: whole.cells(seed, dtype)[0] for seed in seeds}
    specs = [spec for spec in judge_specs(chosen_judges(config)) if not only or spec.name in only]
    between = next((spec for spec in specs if spec.kind == "pairs"), None)
    if between is not None and config.images_per_prompt < 2:
        raise ConfigError(
            "--judges.lpips compares pictures of one prompt: --images-per-prompt 2 or more, or leave it out"
        )
    names = list({subject.name: subject for subject in subjects}.values())
    single = [spec for spec in specs if spec is not between]
    return Plan(config, rows, names, baseline.name if baseline else "", single, groups, references, between)


def evaluate(what: Plan, log: Log = lambda _: None) -> dict[str, Any]:
    """Make what is missing and return the results (see `results`). Ray is joined, or started, when there is something to make."""
    config = what.config
    done = make_all(what, log)
    if what.between is not None:
        compare_pairs(what, what.between, log)
    speeds = latencies(what, log) if config.latency_repeats else {}
    return results(what, done, speeds)


def make_all(what: Plan, log: Log = lambda _: None) -> Done:
    """Pictures and judgements that are missing."""
    config, store = what.config, Store(what.config.out)
    todo = tasks(store, what.cells, what.rows, what.specs, config.per_shard)
    ours = {cell.key for cell in what.cells}
    only = [cell for cell in what.references.values() if cell.key not in ours]
    todo += tasks(store, only, what.rows, [], config.per_shard)
    whole = (len(ours) + len(only)) * len(shards_of(what.rows, config.per_shard))
    log(f"{whole - len(todo)} of {whole} shards are there, {len(todo)} to be made or judged")

    def progress(done: int, of: int, made: int) -> None:
        if done % max(1, of // 20) == 0 or done == of:
            log(f"shard {done}/{of}, {made} pictures made")

    local = config.where == "local"
    done = make(config.out, todo, what.specs, config.generators, config.scorers, progress, local)
    for name, count in done.failures.items():
        log(
            f"judge {name} failed on {count} pictures, first {done.first_failures[name]}; the same command asks it again"
        )
    return done


def compare_pairs(what: Plan, spec: JudgeSpec, log: Log = lambda _: None) -> None:
    """The judge of pairs, where a scorer would be, on what it has not seen."""
    config, store = what.config, Store(what.config.out)
    groups = [of for cells in what.groups.values() for of in lpips.pairs_of(cells).values()]
    todo = lpips.missing_pairs(store, groups, what.rows, spec, config.per_shard)
    if not todo:
        return
    log(f"LPIPS of {len(todo)} models and numbers of steps")
    pool, rows = config.scorers, [(row.key, row.prompt) for row in what.rows]
    arguments = [[cell.to_json() for cell in cells] for cells in todo]
    device = "cuda" if pool.num_gpus else "cpu"
    given = (store.out, arguments, rows, asdict(spec), config.per_shard, device, pool.batch_size)
    if config.where == "local":
        lpips.measure_pairs(*given)
    else:
        _on_a_node(pool, lpips.measure_pairs, given)


def latencies(what: Plan, log: Log = lambda _: None) -> dict[str, latency.Latency]:
    """Cell key -> of the first cell of each group, measured where a generator would be, one after the other."""
    config, store = what.config, Store(what.config.out)
    pool = config.generators
    device = "cuda" if pool.num_gpus else "cpu"
    firsts = [cells[0] for cells in what.groups.values()]
    name = f"latency-{device}.json"
    todo = [cell for cell in firsts if name not in store.names(cell.key)]
    if todo:
        log(f"latency of {len(todo)} models and numbers of steps")
        arguments = [cell.to_json() for cell in todo]
        rows = [(row.key, row.prompt) for row in what.rows[: config.latency_repeats]]
        given = (store.out, arguments, rows, config.latency_repeats, device, name)
        if config.where == "local":
            _latencies(*given)
        else:
            _on_a_node(pool, _latencies, given)
    return {cell.key: latency.Latency(**json.loads(store.read(cell.key, name))) for cell in firsts}


def _on_a_node(pool: EncoderPool, work: Callable[..., None], given: tuple) -> None:
    connect()
    options: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus or None}
    if pool.label_selector:
        options["label_selector"] = pool.label_selector
    ray.get(ray.remote(work).options(**options).remote(*given))


def _latencies(out: str, cells: list[str], rows: list[tuple[str, str]], repeats: int, device: str, name: str) -> None:
    store, sampler, base = Store(out), None, ""
    for cell in map(Cell.from_json, cells):
        if sampler is None or base != cell.base:
            sampler, base = Sampler(cell.base, device, cell.dtype), cell.base
        store.write(cell.key, name, latency.measure(sampler, cell, [Row(*r) for r in rows], repeats).to_json().encode())


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


def measures(what: Plan) -> list[Measure]:
    """The columns."""
    config, found = what.config, []
    by_name = {spec.name: spec for spec in what.specs}
    judges = chosen_judges(config)
    found += [reward_measure(spec) for spec in what.specs if spec.kind == "reward"]
    if OBJECTS in by_name:
        named = named_objects(Path(judges.annotations), Path(judges.captions), [row.prompt for row in what.rows])
        if any(named):
            found.append(objects_measure(by_name[OBJECTS], named, config.resamples // 2, config.seed))
    if what.references:
        found.append(fidelity_measure(what.references, config.reference_steps, config.teacher_guidance))
    if what.between is not None:
        found.append(lpips_measure(what.between))
    if FEATURES in by_name:
        spec = by_name[FEATURES]
        found.append(vendi_measure(spec, SET_RESAMPLES, config.seed))
        if config.images_per_prompt > 1:
            found.append(seed_measure(spec))
        if config.reference_pictures:
            real = real_features(config, spec)
            found.append(cmmd_measure(spec, real, Path(config.reference_pictures).name, SET_RESAMPLES, config.seed))
    return found


def real_features(config: EvaluateConfig, spec: JudgeSpec) -> torch.Tensor:
    """(N, D) of the pictures of `config.reference_pictures`, kept in `out`.

    Raises:
        ConfigError: there are none.
    """
    import tarfile

    from PIL import Image

    from hypersd_ray.data.sources import find_shards

    urls = find_shards((config.reference_pictures,), "webdataset").urls
    store, name = Store(config.out), f"real.{spec.file}.npz"
    where = "real-" + hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
    if name in store.names(where):
        import io

        return torch.from_numpy(np.load(io.BytesIO(store.read(where, name)))["values"])
    judge, parts = load_judge(spec), []
    for url in urls:
        with store.fs.open(url, "rb") as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if member.name.endswith((".png", ".jpg", ".jpeg", ".webp")):
                    picture = np.asarray(Image.open(tar.extractfile(member)).convert("RGB"))  # type: ignore[arg-type]
                    parts.append(judge(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255.0, [""])[0])
    if len(parts) < 2:
        raise ConfigError(f"--reference-pictures {config.reference_pictures}: {len(parts)} pictures, at least 2")
    import io

    data = io.BytesIO()
    np.savez_compressed(data, values=np.stack(parts))
    store.write(where, name, data.getvalue())
    return torch.from_numpy(np.stack(parts))


def results(what: Plan, done: Done, speeds: dict[str, latency.Latency]) -> dict[str, Any]:
    """All that the report needs beside the pictures themselves, as JSON."""
    config, read, columns = what.config, reader(what), measures(what)
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
            "kind": cells[0].kind, "weights": sorted({cell.weights_sha256 for cell in cells}),
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
            "name": config.prompts, "count": len(what.rows),
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
    weights = list({cell.weights_sha256: cell for cell in cells}.values())
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


def _latency(speed: latency.Latency | None, config: EvaluateConfig) -> dict[str, Any] | None:
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


def shard_of(rows: Sequence[Row], per_shard: int, key: str) -> tuple[str, list[Row]]:
    """The shard that holds a row, and its rows."""
    part = next(p for p in shards_of(rows, per_shard) if any(row.key == key for row in p))
    return shard_name(part), part


def provenance(config: EvaluateConfig) -> dict[str, Any]:
    """Which code, on what."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    packages = ("torch", "diffusers", "transformers", "ray", "numpy")
    return {
        "commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(git("status", "--porcelain")),
        "packages": {name: version(name) for name in packages}, "python": platform.python_version(),
        "device": "GPU" if config.generators.num_gpus else f"CPU {platform.machine()}", "cores": os.cpu_count(),
        "base": Path(config.base).name,
    }  # fmt: skip


def is_teacher(name: str) -> bool:
    """Whether a row is the base model's."""
    return name == TEACHER
