"""A whole evaluation: find what is missing, make and judge it, and say what it comes to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import ray
import torch

from evaluation.harness import latency, lpips
from evaluation.harness.judges import JudgeSpec
from evaluation.harness.making import Done, make, tasks
from evaluation.harness.plan import Plan
from evaluation.harness.prompts import Row
from evaluation.harness.reach import check_reached
from evaluation.harness.results import results
from evaluation.harness.sampler import Sampler
from evaluation.harness.store import Store, shards_of
from evaluation.harness.subjects import Cell
from hypersd_ray.config.data import ActorPool
from hypersd_ray.trainer.run import connect

Log = Callable[[str], None]
T = TypeVar("T")


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
        _on_a_node(what, pool, lpips.measure_pairs, given)


def latencies(what: Plan, log: Log = lambda _: None) -> dict[str, latency.Latency]:
    """Cell key -> of the first cell of each group, measured where a generator would be, one after the other."""
    config, store = what.config, Store(what.config.out)
    pool = config.generators
    device = "cuda" if pool.num_gpus else "cpu"
    firsts = [cells[0] for cells in what.groups.values()]
    rows = [(row.key, row.prompt) for row in what.rows[: config.latency_repeats]]
    given = (store.out, [cell.to_json() for cell in firsts], rows, config.latency_repeats, device)
    here = "RAY_ADDRESS" not in os.environ and not ray.is_initialized()  # Ray would be started on this machine
    name = latency.file_name(device, config.latency_repeats, threads_of(pool)) if here else ""
    if config.where == "local":
        name = _latencies(*given)
    elif not name or any(name not in store.names(cell.key) for cell in firsts):
        log(f"latency of {len(firsts)} models and numbers of steps, where this machine's is not known")
        name = _on_a_node(what, pool, _latencies, given)
    return {cell.key: latency.Latency(**json.loads(store.read(cell.key, name))) for cell in firsts}


def threads_of(pool: ActorPool) -> int:
    """Of an actor of `pool`: Ray gives it as many as it has CPUs, if the environment does not say."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(pool.num_cpus))


def _on_a_node(what: Plan, pool: ActorPool, work: Callable[..., T], given: tuple) -> T:
    connect()
    between = [] if what.between is None else [what.between]
    check_reached(Store(what.config.out), what.cells, between, (pool,))
    options: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus or None}
    if pool.label_selector:
        options["label_selector"] = pool.label_selector
    return ray.get(ray.remote(work).options(**options).remote(*given))


def _latencies(out: str, cells: list[str], rows: list[tuple[str, str]], repeats: int, device: str) -> str:
    """Measure what was not measured on this machine; the name that such files have."""
    store, sampler, base = Store(out), None, ""
    name = latency.file_name(device, repeats, torch.get_num_threads())
    for cell in map(Cell.from_json, cells):
        if name in store.names(cell.key):
            continue
        if sampler is None or base != cell.base:
            sampler, base = Sampler(cell.base, device, cell.dtype), cell.base
        store.write(cell.key, name, latency.measure(sampler, cell, [Row(*r) for r in rows], repeats).to_json().encode())
    return name
