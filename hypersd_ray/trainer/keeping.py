"""A run's checkpoints in its folder: which is the newest whole one, and how a new one gets there.

Ray Train's own record of checkpoints is not asked where to go on: its controller hears of one up to 2 s late, so a crash in
between would lose it, and it does not know a damaged one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import yaml
from safetensors import SafetensorError

from hypersd_ray.config.base import RunError, Strict
from hypersd_ray.data.files import size
from hypersd_ray.trainer import storage
from hypersd_ray.training.checkpoint import MANIFEST, DamagedCheckpoint, check_whole, load_checkpoint, load_positions
from hypersd_ray.training.distributed import max_over_workers, of_first
from hypersd_ray.training.protocol import Checkpointed

PREFIX, AGAIN = "checkpoint_", "-again"
CONFIG = "config.yaml"
"""A run's configuration, which its driver writes before the workers start."""
START_S = 10.0
"""How long storage may refuse it."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record."""


@dataclass(frozen=True)
class Found:
    """Where a run goes on: the checkpoint's path, the data position of this worker (of all former ones, where their number
    was another: then the data is `dealt_again`), and the names of damaged newer ones."""

    path: str | None
    positions: list[dict[str, Any]]
    dealt_again: bool = False
    damaged: tuple[str, ...] = ()


def names(folder: str) -> list[str]:
    """Of the checkpoints in a run's folder, the newest first."""
    found = [n for n in storage.folders(folder, PREFIX) if n.removeprefix(PREFIX).removesuffix(AGAIN).isdigit()]
    return sorted(found, key=lambda n: (int(n.removeprefix(PREFIX).removesuffix(AGAIN)), n), reverse=True)


def name_of(step: int, damaged: tuple[str, ...] = ()) -> str:
    """Of the checkpoint after `step` steps. A damaged one of that name stays as it is: Ray Train will remove it in its
    turn, and must not remove the new one with it."""
    name = f"{PREFIX}{step:08d}"
    return f"{name}{AGAIN}" if name in damaged else name


def resume(
    folder: str,
    state: Checkpointed,
    rank: int,
    world: int,
    device: torch.device,
    tell: Callable[[str], None],
    patience_s: float,
) -> Found:
    """Load the newest checkpoint of the run's folder that is whole on every worker into `state`. What storage refuses to
    read is not taken for damage: it is tried again for `patience_s` seconds.

    All workers look at rank 0's list: where a network file system keeps listings for a while, theirs may be of another time.

    Raises:
        RunError: there are checkpoints and none is whole, or a worker does not see the folder; on all workers at once.
        StorageError: one cannot be read; perhaps on this worker alone.
        ValueError: one is whole and of another configuration.
    """
    damaged: list[str] = []
    last = ""
    _check_shared(folder, device, patience_s)
    listed = (
        storage.patiently(functools.partial(names, folder), folder, patience_s, storage.READING) if rank == 0 else []
    )
    for name in of_first(listed, device):
        path, error = f"{folder}/{name}", ""
        positions: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            try:
                read = functools.partial(_read, stack, path, rank, world)
                local, manifest, positions = storage.patiently(read, path, patience_s, storage.READING)
            except DamagedCheckpoint as caught:
                error = str(caught)
            # before anything is loaded: a share of a ZeRO state is loaded by all workers or by none
            if not max_over_workers(int(bool(error)), device):
                load_checkpoint(local, state, manifest)
                return Found(path, positions, manifest["world_size"] != world, tuple(damaged))
        damaged.append(name)
        last = last or error
        if rank == 0:
            tell(f"{path} is damaged, going on from the one before: {error or 'another worker cannot read it'}")
    if damaged:
        raise RunError(
            f"none of the {len(damaged)} checkpoints in {folder} is whole ({last or 'another worker says so'}): set run.name to "
            "start another run, or delete them to start this one anew"
        )
    return Found(None, [])


def write_config(folder: str, config: Strict) -> None:
    """Before the workers start. Raises StorageError, soon: nothing has begun that would be lost."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path = f"{folder}/{CONFIG}"
    storage.patiently(functools.partial(storage.write_text, path, text), path, START_S, knob=None)


SEEN_S = 60.0
"""How long a network file system may go on saying that a new file is not there."""


def _check_shared(folder: str, device: torch.device, patience_s: float) -> None:
    """Every worker sees what the driver has written there.

    Raises:
        RunError: one does not; on all workers at once.
        StorageError: one is refused for `patience_s`, which says nothing about what is there.
    """
    path, begun = f"{folder}/{CONFIG}", time.monotonic()

    def seen() -> bool:
        while True:
            try:
                size(path)
            except FileNotFoundError:
                if time.monotonic() - begun >= min(SEEN_S, patience_s):
                    return False
                time.sleep(1.0)
            else:
                return True

    there = storage.patiently(seen, path, patience_s, storage.READING)
    if max_over_workers(int(not there), device):
        raise RunError(
            f"a worker does not find {path}, which the job has written: set run.out to a folder that all nodes share, or to a "
            "URL (s3://, gs://)"
        )


def _read(
    stack: contextlib.ExitStack, path: str, rank: int, world: int
) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A whole checkpoint where it can be loaded from for as long as `stack` lasts, its manifest and the data positions."""
    stack.close()  # an earlier try's copy
    try:
        local = stack.enter_context(storage.local_folder(path))
        return local, check_whole(local), load_positions(local, rank, world)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} has lost a file: {error}") from error


def uploader(
    folder: str, patience_s: float, done: Callable[[], object] = lambda: None
) -> Callable[[ray.train.Checkpoint, str], ray.train.Checkpoint]:
    """Ray Train's `checkpoint_upload_fn`: file by file, the manifests last, and again while the storage refuses; then `done`."""

    def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        target, local = f"{folder}/{name}", Path(checkpoint.path)
        last = lambda p: (p.name == MANIFEST, p.match("manifest*.json"), p)  # that of a worker's own share before it
        files = sorted((p for p in local.rglob("*") if p.is_file()), key=last)
        targets = [(path, f"{target}/{path.relative_to(local).as_posix()}") for path in files]

        def put() -> None:
            try:
                for path, there in targets:
                    storage.put(path, there)
            except Exception:
                for _, there in targets:  # on a full disk half a file is in the way
                    with storage.tolerant():
                        storage.remove(there)
                raise

        storage.patiently(put, target, patience_s)
        done()
        return ray.train.Checkpoint(target)

    return upload


@contextmanager
def local_room() -> Iterator[None]:
    """What is written within the block goes to this node's temporary folder.

    Raises:
        StorageError: that is full, or cannot be written; one line.
    """
    try:
        yield
    except Exception as error:
        if not (storage.is_trouble(error) or isinstance(error, SafetensorError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise storage.StorageError(
            f"a checkpoint cannot be written to {tempfile.gettempdir()} before it goes to run.out ({reason}): make room there, or "
            "set TMPDIR to a larger folder"
        ) from error


def report(
    folder: str,
    name: str,
    values: dict[str, Any],
    save: Callable[[Path], None],
    patience_s: float,
    done: Callable[[], object] = lambda: None,
) -> str:
    """Hand Ray Train `values` and the checkpoint that `save` writes, as `name` in the run's folder; returns its path. All
    workers call it. `done` as in `uploader`.

    Raises:
        StorageError: there is no room for it on this node.
    """
    with tempfile.TemporaryDirectory() as temporary:
        with local_room():
            save(Path(temporary))
        ray.train.report(
            values,
            checkpoint=ray.train.Checkpoint.from_directory(temporary),
            checkpoint_dir_name=name,
            checkpoint_upload_fn=uploader(folder, patience_s, done),
        )
    return f"{folder}/{name}"


def prune(folder: str, keep: int) -> None:
    """Remove what Ray Train does not know of, since it was killed before it heard: it keeps `keep`, and two on the way."""
    with storage.tolerant():
        for name in names(folder)[keep + 2 :]:
            storage.remove(f"{folder}/{name}")


QUALITY = "quality.jsonl"
"""What each stage's end measured, an object a line; a stage that was measured again is there again, the last one counts."""


def append_quality(folder: str, record: dict[str, Any], patience_s: float) -> None:
    """One more stage. Raises StorageError."""
    path = f"{folder}/{QUALITY}"
    before = storage.patiently(
        lambda: storage.read_text(path) if storage.exists(path) else "", path, patience_s, storage.READING
    )
    text = before + json.dumps(record) + "\n"
    storage.patiently(functools.partial(storage.write_text, path, text), path, patience_s)


def read_quality(folder: str) -> list[dict[str, Any]]:
    """One record a stage that ended so far, in the stages' order."""
    path = f"{folder}/{QUALITY}"
    lines = storage.read_text(path).splitlines() if storage.exists(path) else []
    by_stage = {record["stage"]: record for record in map(json.loads, lines)}
    return [by_stage[stage] for stage in sorted(by_stage)]


def mend_record(folder: str) -> None:
    """Drop Ray Train's record where it cannot be read or names a checkpoint that is gone: it would refuse to start."""
    path = f"{folder}/{SNAPSHOT}"
    if not storage.exists(path):
        return
    there = set(storage.folders(folder, PREFIX))
    try:
        known = {r["checkpoint_dir_name"] for r in json.loads(storage.read_text(path))["checkpoint_results"]}
    except (ValueError, KeyError, TypeError):
        known = {""}
    if not known <= there:
        storage.remove(path)
