"""Training loops that go wrong at a step, a trace of every sample that was trained, and the table of faults.

A fault is a function (worker, step) called in the training worker before the step is logged and saved; it happens once,
whatever is started again: a file remembers it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tests.trainer.helpers import folder_of

Fault = Callable[[Any, int], None]
TABLE = Path(os.environ.get("CHAOS_TABLE", "runs/chaos.md"))
"""Where the table of faults is written."""


def broken(trace: Path, faults: Mapping[int, Fault], rank: int = 0) -> Callable[[dict[str, Any]], None]:
    """The trainer's loop with `faults` at steps (over all stages) of worker `rank`; `trace` hears of each step."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
    path, by_step, place = str(trace), dict(faults), rank

    def loop_that_breaks(arguments: dict[str, Any]) -> None:
        import json
        import os
        import time
        from pathlib import Path

        import ray.train.torch
        import torch

        from hypersd_ray.data.stream import LatentStream
        from hypersd_ray.trainer import loop

        after_step, following = loop.Worker._after_step, LatentStream.__next__

        def remembered(stream: Any) -> Any:
            item = following(stream)
            stream.latest_keys = item[0]["key"]
            return item

        def watched(worker: Any, metrics: Any) -> bool:
            progress = worker.training.progress
            step = worker.clock.global_step(progress.stage, progress.step)
            line = {"step": step, "rank": worker.rank, "world": worker.world, "keys": worker.stream.latest_keys,
                    "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "time": time.time()}  # fmt: skip
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            done = Path(f"{path}.{step}")
            if worker.rank == place and step in by_step and not done.exists():
                done.write_text(str(time.time()))
                by_step[step](worker, step)
            return after_step(worker, metrics)

        if not torch.cuda.is_available():  # where GPUs are pretended
            ray.train.torch.get_device = lambda: torch.device("cpu")
        LatentStream.__next__ = remembered  # type: ignore[method-assign]
        loop.Worker._after_step = watched  # type: ignore[method-assign]
        loop.train_loop(arguments)

    return loop_that_breaks


@dataclass(frozen=True)
class Story:
    """What a trace tells of a run.

    Attributes:
        keys: (rank, step) -> the samples that count: those of the last time the step was made.
        lost: steps that were made again, in all.
        recovery: seconds from the last step before each restart to the first one after it, the longest.
        restarts: how often a new process went on.
        longest: seconds between two steps of one process, at most.
    """

    keys: dict[tuple[int, int], list[str]]
    lost: int
    recovery: float
    restarts: int
    longest: float


def story(trace: Path) -> Story:
    """Of a trace."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    keys = {(line["rank"], line["step"]): line["keys"] for line in lines}
    first = [line for line in lines if line["rank"] == 0]
    lost, recovery, restarts, longest = 0, 0.0, 0, 0.0
    for before, after in zip(first, first[1:], strict=False):
        if before["pid"] != after["pid"]:
            lost, restarts = lost + before["step"] - after["step"] + 1, restarts + 1
            recovery = max(recovery, after["time"] - before["time"])
        else:
            longest = max(longest, after["time"] - before["time"])
    return Story(keys, lost, recovery, restarts, longest)


def worlds(trace: Path) -> dict[int, list[list[str]]]:
    """step -> its workers' samples, rank by rank, of the last time it was made."""
    made: dict[int, list[dict]] = {}
    for line in map(json.loads, trace.read_text().splitlines()):
        made.setdefault(line["step"], []).append(line)
    found = {}
    for step, lines in made.items():
        world = next(line["world"] for line in reversed(lines) if line["rank"] == 0)
        latest = {line["rank"]: line["keys"] for line in lines if line["world"] == world}
        found[step] = [latest[rank] for rank in range(world)]
    return found


ROWS: list[tuple[str, str, str, str]] = []


def record(
    fault: str, outcome: str, told: Story | None = None, seconds: float | None = None, lost: int | None = None
) -> None:
    """A line of the table; `told` has both figures, where they are not given."""
    if told is not None:
        seconds, lost = told.recovery if seconds is None else seconds, told.lost if lost is None else lost
    ROWS.append((fault, outcome, "" if lost is None else str(lost), "" if seconds is None else f"{seconds:.0f}"))


def write_table() -> None:
    """All lines so far, in Markdown."""
    head = ["| fault | what happened | steps made again | seconds to the next step |", "|---|---|---:|---:|"]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join([*head, *(f"| {' | '.join(row)} |" for row in ROWS)]) + "\n")


def kill_self(worker: Any, step: int) -> None:
    """As an out-of-memory killer does."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def slow(seconds: float) -> Fault:
    """A worker that stands still for a while."""

    def stand(worker: Any, step: int) -> None:
        import time

        time.sleep(seconds)

    return stand


def storage_away(seconds: float) -> Fault:
    """The run's folder is a file for `seconds`: nothing can be written in it, as on a server that is not there."""

    def away(worker: Any, step: int) -> None:
        import threading
        import time
        from pathlib import Path

        folder = Path(worker.folder)
        kept = folder.with_name(f"{folder.name}.kept")
        folder.rename(kept)
        folder.write_text("")

        def back() -> None:
            time.sleep(seconds)
            folder.unlink()
            kept.rename(folder)

        threading.Thread(target=back).start()

    return away


def truncate_newest_and_die(worker: Any, step: int) -> None:
    """The last checkpoint loses its end, and the worker its life."""
    from pathlib import Path

    weights = max(Path(worker.folder).glob("checkpoint_0*")) / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    kill_self(worker, step)


def removing(path: Path) -> Fault:
    """A file is gone."""
    gone = str(path)

    def remove(worker: Any, step: int) -> None:
        from pathlib import Path

        Path(gone).unlink()

    return remove


def checkpoints(config: Any) -> list[str]:
    """Names in the run's folder."""
    return sorted(p.name for p in folder_of(config).glob("checkpoint_0*"))


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False
