"""Count what is skipped, list it in a file, stop the job when it is too much."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import ray
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hypersd_ray.config.data import DataConfig


class TooManyRejectsError(ValueError):
    """More rows were rejected than data.max_reject_share allows."""


WHOLE_SHARD = frozenset({"unreadable_shard", "truncated_shard", "no_image_column"})
"""Reasons that are a shard's, not a row's."""


class RejectCounter:
    """Rows seen and rejected, by reason, each shard once; the rejects as JSON lines in a file. Knows no Ray.

    Nobody knows how many rows a lost shard had: it counts as the whole ones do in the mean, what was read of it included.
    A shard is read again in the next epoch, after a worker's death, or by another rank: only its first report counts.
    `path` (None = no file) may be any fsspec URL. An existing file is continued: the shards it already lists are
    counted, but not listed twice. Object stores cannot append: there each report is a file of its own beside `path`,
    rejects-00000.jsonl and so on.
    """

    def __init__(self, path: str | None, max_share: float, grace: int) -> None:
        self.path, self.max_share, self.grace = path, max_share, grace
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self._whole_shards = self._whole_rows = 0
        self._lost: list[tuple[str, int]] = []  # why, and the rows that were read of it
        self._shards: dict[str, dict[str, Any]] = {}
        self._listed, self._parts = set(), 0
        if path is not None:
            files = _files(path)
            self._listed, self._parts = _listed_shards(files), len(files)

    def report(self, shard: str, seen: int, rejects: Sequence[tuple[str, str]]) -> None:
        """Take in one whole shard: rows seen (with the rejected ones) and (reason, key) of each rejected one."""
        if self.count(shard, seen, Counter(reason for reason, _ in rejects)):
            if rejects and shard not in self._listed:
                self._list(shard, rejects)
            return
        known = self._shards[shard]["rejects"]
        lost = [(reason, key) for reason, key in rejects if reason in WHOLE_SHARD]
        if (
            lost and not WHOLE_SHARD & known.keys()
        ):  # it was whole in an earlier epoch: the rows that it kept then are lost
            reason, kept = lost[0][0], self._shards[shard]["seen"] - sum(known.values())
            known[reason] = max(1, kept - (seen - len(rejects)))
            self.reasons[reason] += known[reason]
            self._list(shard, lost[:1])
            self._changed()

    def count(self, shard: str, seen: int, reasons: Mapping[str, int]) -> bool:
        """`report` without listing, for what an earlier run has listed; -> whether the shard is new."""
        if shard in self._shards:
            return False
        self._shards[shard] = {"seen": seen, "rejects": dict(reasons)}
        self.seen += seen
        self.reasons.update(reasons)
        lost = sorted(WHOLE_SHARD & reasons.keys())
        if lost:
            self._lost.append((lost[0], seen))
        else:
            self._whole_shards, self._whole_rows = self._whole_shards + 1, self._whole_rows + seen
        self._changed()
        return True

    def _changed(self) -> None:
        """The counts are others now; for who shows them."""

    def _unread(self) -> Counter[str]:
        """Rows of lost shards that nobody read, by reason."""
        mean = round(self._whole_rows / self._whole_shards) if self._whole_shards else 0
        unread: Counter[str] = Counter()
        for reason, seen in self._lost:
            unread[reason] += max(0, mean - seen)
        return unread

    def _list(self, shard: str, rejects: Sequence[tuple[str, str]]) -> None:
        if self.path is None:
            return
        local = _is_local(self.path)
        with fsspec.open(
            self.path if local else _part(self.path, self._parts), "a" if local else "w", encoding="utf-8"
        ) as file:
            file.writelines(json.dumps({"reason": r, "shard": shard, "key": k}) + "\n" for r, k in rejects)
        self._parts += 1

    def shard(self, shard: str) -> dict[str, Any]:
        """{"seen": rows, "rejects": {reason: rows}} of one reported shard; zeros when it was not reported."""
        return self._shards.get(shard, {"seen": 0, "rejects": {}})

    def summary(self) -> dict[str, Any]:
        """{"seen": rows, "rejected": rows, "rejects": {reason: rows}}, the most frequent reason first; with those that lost
        shards are taken to have had."""
        unread = self._unread()
        reasons = self.reasons + unread
        return {
            "seen": self.seen + unread.total(),
            "rejected": reasons.total(),
            "rejects": dict(reasons.most_common()),
        }

    def verdict(self) -> str | None:
        """What to tell the user when the share is past its limit, else None."""
        total = self.summary()
        seen, rejected = total["seen"], total["rejected"]
        if seen < max(self.grace, 1) or rejected <= self.max_share * seen:
            return None
        reason, count = next(iter(total["rejects"].items()))
        return (
            f"{rejected} of {seen} rows rejected ({rejected / seen:.0%}), more than "
            f"data.max_reject_share={self.max_share}: most often {reason} ({count}), "
            f"listed in {self.path or 'no file'}; mend the data or data.filters, or raise data.max_reject_share"
        )


class GaugedCounter(RejectCounter):
    """A `RejectCounter` whose counts are a gauge of Ray's too: `ray_hypersd_rejected`, by run and reason."""

    def __init__(self, path: str | None, max_share: float, grace: int, run: str) -> None:
        super().__init__(path, max_share, grace)
        self.run = run
        self.gauge = Gauge("hypersd_rejected", description="Rows rejected so far.", tag_keys=("run", "reason"))

    def _changed(self) -> None:
        for reason, rows in self.summary()["rejects"].items():
            self.gauge.set(rows, tags={"run": self.run, "reason": reason})


RejectLog = ray.remote(num_cpus=0)(GaugedCounter)
"""The counter as an actor, shared by the readers of all training workers; it gets one report a shard."""


def start_reject_log(config: DataConfig, path: str | None, run: str = "") -> ray.actor.ActorHandle:
    """Start the log on this node, so that a local `path` is where the user looks; pass the handle to every stream. `run`
    is the name that its gauge has."""
    if path is not None:
        filesystem, name = fsspec.core.url_to_fs(path)
        filesystem.makedirs(name.rpartition("/")[0] or ".", exist_ok=True)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: Any = RejectLog.options(scheduling_strategy=here)
    return options.remote(path, config.max_reject_share, config.reject_grace, run)


def check(log: ray.actor.ActorHandle) -> None:
    """Raise TooManyRejectsError when the share is past its limit.

    The actor only says so: an exception raised there would reach the user inside Ray's traceback.
    """
    verdict: str | None = ray.get(log.verdict.remote())
    if verdict is not None:
        raise TooManyRejectsError(verdict)


def told(summary: Mapping[str, Any], listed: str) -> str:
    """`RejectCounter.summary` in a line for the user; nothing where nothing was rejected."""
    if not summary["rejected"]:
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["rejects"].items())
    return f"{summary['rejected']} of {summary['seen']} rows were rejected ({reasons}), listed in {listed}"


def _is_local(path: str) -> bool:
    return isinstance(fsspec.core.url_to_fs(path)[0], LocalFileSystem)


def _part(path: str, number: int | str) -> str:
    """rejects.jsonl -> rejects-00007.jsonl"""
    stem, dot, suffix = path.rpartition(".")
    return f"{stem}-{number:05d}{dot}{suffix}" if isinstance(number, int) else f"{stem}-{number}{dot}{suffix}"


def _files(path: str) -> list[tuple[AbstractFileSystem, str]]:
    """What was listed before, in order."""
    filesystem, name = fsspec.core.url_to_fs(path)
    names = [name] if _is_local(path) else sorted(filesystem.glob(_part(name, "*")))
    return [(filesystem, found) for found in names if filesystem.exists(found)]


def _listed_shards(files: Sequence[tuple[AbstractFileSystem, str]]) -> set[str]:
    listed = set()
    for filesystem, name in files:
        good = []
        text = filesystem.read_text(name, encoding="utf-8")
        for line in text.splitlines(keepends=True):
            try:
                listed.add(json.loads(line)["shard"])
            except (ValueError, KeyError):
                continue
            good.append(line)
        if not text.endswith("\n") and text:
            # The last run was killed in the middle of a line: what is appended must not join it.
            filesystem.write_text(name, "".join(good), encoding="utf-8")
    return listed
