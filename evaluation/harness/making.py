"""Generators and judges as two pools of Ray Data actors: judging begins with the first pictures.

A row of the dataset is a shard of a cell. Generators write its pictures and pass them on, judges write their values; what
is on disk is not made again. Actors may be on any node; `out` must be where all of them reach it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.data
import torch
from ray.exceptions import RayError

from evaluation.harness.judges import JudgeSpec, load_judge, specs_from_json, specs_to_json, try_judge
from evaluation.harness.prompts import Row
from evaluation.harness.reach import check_reached
from evaluation.harness.sampler import PARTS, Sampler
from evaluation.harness.store import Store, shard_name, shards_of
from evaluation.harness.subjects import Cell
from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.data.pools import actors
from hypersd_ray.trainer.run import connect

IMAGES_IN_FLIGHT = 2
"""Shards that an actor may hold beside the one in work."""


@dataclass(frozen=True)
class Task:
    """A shard of a cell, and the judges that have not seen it."""

    cell: Cell
    rows: list[Row]
    judges: list[str]

    def to_row(self) -> dict[str, str]:
        """For Ray Data."""
        rows = json.dumps([[row.key, row.prompt] for row in self.rows])
        return {"cell": self.cell.to_json(), "rows": rows, "judges": json.dumps(self.judges)}


@dataclass(frozen=True)
class Done:
    """What `make` did: pictures made, pictures that were there and were judged, scores missing by judge, seconds, and the
    first failure of each judge."""

    made: int
    judged: int
    failures: dict[str, int]
    seconds: float
    first_failures: dict[str, str] = field(default_factory=dict)


def tasks(
    store: Store, cells: Sequence[Cell], rows: Sequence[Row], specs: Sequence[JudgeSpec], per_shard: int
) -> list[Task]:
    """What is missing, in an order in which a generator changes its model as seldom as can be."""
    found = []
    for cell in {cell.key: cell for cell in cells}.values():
        names = store.names(cell.key)
        for part in shards_of(rows, per_shard):
            shard = shard_name(part)
            there = f"{shard}.tar" in names
            missing = [
                spec.name for spec in specs
                if f"{shard}.{spec.file}.npz" not in names or f"{shard}.{spec.file}.failed" in names
            ]  # fmt: skip
            if missing or not there:
                found.append(Task(cell, part, missing))
    return found


def make(
    out: str, todo: Sequence[Task], specs: Sequence[JudgeSpec], generators: ActorPool, scorers: ActorPool,
    progress: Callable[[int, int, int], None] | None = None, local: bool = False,
) -> Done:  # fmt: skip
    """Make and judge. `progress(shards done, shards in all, pictures made)`; `local` is in this process, without Ray.

    Raises:
        ConfigError, RunError: weights that do not fit, a folder that not all nodes see, no space; one line. What was done
            is kept.
    """
    if not todo:
        return Done(0, 0, {}, 0.0)
    if not local:
        connect()
    store, cells = Store(out), list({task.cell.key: task.cell for task in todo}.values())
    begun, done, made, judged = time.perf_counter(), 0, 0, 0
    failures: dict[str, int] = {}
    firsts: dict[str, str] = {}
    try:
        if not local:
            check_reached(store, cells, specs, (generators, scorers))
        for cell in cells:
            store.write_cell(cell)
        pools = _here if local else _on_ray
        for row in pools(store.out, todo, specs, generators, scorers):
            if row["error"]:
                _raise(row["error"])
            done, made, judged = done + 1, made + int(row["made"]), judged + int(row["judged"])
            for name, said in json.loads(row["failures"]).items():
                failures[name] = failures.get(name, 0) + len(said)
                firsts.setdefault(name, said[0])
            if progress is not None:
                progress(done, len(todo), made)
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RunError(
            f"an actor failed: {lines[-1].strip()}; what was done is kept, the same command goes on"
        ) from error
    return Done(made, judged, failures, time.perf_counter() - begun, firsts)


def _here(
    out: str, todo: Sequence[Task], specs: Sequence[JudgeSpec], generators: ActorPool, scorers: ActorPool
) -> Iterator[dict[str, Any]]:
    """One of each actor in this process, turn by turn."""
    generator = Generator(out, generators.model_dump())
    scorer = Scorer(out, scorers.model_dump(), specs_to_json(specs))
    for task in todo:
        judged = scorer(generator({name: [value] for name, value in task.to_row().items()}))
        yield {name: values[0] for name, values in judged.items()}


def _on_ray(
    out: str, todo: Sequence[Task], specs: Sequence[JudgeSpec], generators: ActorPool, scorers: ActorPool
) -> Iterator[dict[str, Any]]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [task.to_row() for task in todo]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.execution_options.preserve_order = False
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    made = dataset.map_batches(
        Generator,
        fn_constructor_kwargs={"out": out, "pool": generators.model_dump()},
        batch_size=1,
        **actors(generators, IMAGES_IN_FLIGHT),
    )
    judged = made.map_batches(
        Scorer,
        fn_constructor_kwargs={"out": out, "pool": scorers.model_dump(), "specs": specs_to_json(specs)},
        batch_size=1,
        **actors(scorers, IMAGES_IN_FLIGHT),
    )
    yield from judged.iter_rows()


KINDS = {kind.__name__: kind for kind in (RunError, ConfigError, ValueError)}
"""What an actor may have to say to a user. It travels as a row: Ray would wrap it, and lose what it was."""


def _told(error: Exception) -> str:
    kind = next(name for name, kind in KINDS.items() if isinstance(error, kind))
    return json.dumps([kind, " ".join(str(error).split())])


def _raise(told: str) -> None:
    kind, text = json.loads(told)
    raise KINDS[kind](text)


def _rows(text: str) -> list[Row]:
    return [Row(key, prompt) for key, prompt in json.loads(text)]


def _device(pool: ActorPool) -> str:
    return "cuda" if pool.num_gpus else "cpu"


class Generator:
    """For `map_batches`: a task -> its pictures as bytes, made or read."""

    def __init__(self, out: str, pool: dict[str, Any]):
        self.store, self.pool = Store(out), ActorPool.model_validate(pool)
        self.sampler: tuple[str, Sampler] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [
            self._task(*map(str, task)) for task in zip(batch["cell"], batch["rows"], batch["judges"], strict=True)
        ]
        return {name: [result[name] for result in results] for name in results[0]}

    def _task(self, cell_json: str, rows_json: str, judges: str) -> dict[str, Any]:
        cell, rows, error = Cell.from_json(cell_json), _rows(rows_json), ""
        there = self.store.fs.exists(f"{self.store.folder(cell.key)}/{shard_name(rows)}.tar")
        try:
            pictures = self.store.read_pictures(cell.key, rows) if there else self._make(cell, rows)
        except (RunError, ValueError) as wrong:
            error, pictures = _told(wrong), np.zeros(0, np.uint8)
        return {
            "cell": cell_json, "rows": rows_json, "judges": judges, "made": 0 if there else len(rows), "error": error,
            "pictures": pictures.tobytes(), "shape": json.dumps(pictures.shape),
        }  # fmt: skip

    def _make(self, cell: Cell, rows: list[Row]) -> np.ndarray:
        sampler = self._sampler(cell)
        pictures, latents = [], []
        seconds = dict.fromkeys(PARTS, 0.0)
        for part in shards_of(rows, self.pool.batch_size):
            made = sampler(cell, part)
            pictures.append(made.pictures.numpy())
            latents.append(made.latents.numpy())
            seconds = {name: seconds[name] + made.seconds[name] for name in PARTS}
        whole = np.concatenate(pictures)
        about = {"seconds": seconds, "pictures": len(rows), "batch": self.pool.batch_size, "torch": torch.__version__}
        self.store.write_pictures(cell, rows, whole, np.concatenate(latents), about)
        return whole

    def _sampler(self, cell: Cell) -> Sampler:
        if self.sampler is None or self.sampler[0] != cell.base:
            self.sampler = None  # two bases need not fit together
            self.sampler = cell.base, Sampler(cell.base, _device(self.pool), cell.dtype)
        return self.sampler[1]


class Scorer:
    """For `map_batches`: pictures -> which scores are missing, and why. Judges are loaded with the first that needs them."""

    def __init__(self, out: str, pool: dict[str, Any], specs: str):
        self.store, self.pool = Store(out), ActorPool.model_validate(pool)
        self.specs = {spec.name: spec for spec in specs_from_json(specs)}
        self.judges: dict[str, Any] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = ("cell", "rows", "judges", "pictures", "shape")
        failures, errors = [], []
        for task, error in zip(zip(*(batch[name] for name in columns), strict=True), batch["error"], strict=True):
            failed: dict[str, list[str]] = {}
            if not error:
                try:
                    failed = self._task(*task)
                except (RunError, ValueError) as wrong:
                    error = _told(wrong)
            failures.append(json.dumps(failed))
            errors.append(str(error))
        judged = [len(json.loads(judges)) for judges in batch["judges"]]
        return {"made": list(batch["made"]), "judged": judged, "failures": failures, "error": errors}

    def _task(self, cell_json: str, rows_json: str, judges: str, pictures: bytes, shape: str) -> dict[str, list[str]]:
        cell, rows = Cell.from_json(str(cell_json)), _rows(str(rows_json))
        array = np.frombuffer(pictures, np.uint8).reshape(json.loads(str(shape)))
        images, found = torch.from_numpy(array.copy()).float() / 255, {}
        for name in json.loads(str(judges)):
            try:
                values, failed = try_judge(self._judge(name), images, [r.prompt for r in rows], self.pool.batch_size)
            except RuntimeError as error:
                raise RunError(f"judge {name} {error}; pictures and other scores are kept") from None
            self.store.write_values(cell.key, rows, self.specs[name].file, values, failed)
            if failed:
                found[name] = failed
        return found

    def _judge(self, name: str) -> Any:
        if name not in self.judges:
            self.judges[name] = load_judge(self.specs[name], _device(self.pool), self.pool.dtype)
        return self.judges[name]
