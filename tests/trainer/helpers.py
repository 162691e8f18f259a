"""Runs as a user starts them, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hypersd_ray.config.tscd import TSCDConfig

ROOT = Path(__file__).parents[2]


def folder_of(config: TSCDConfig) -> Path:
    """The run's folder."""
    return Path(config.run.out) / config.run.name


def write_config(config: TSCDConfig, path: Path) -> None:
    """As a run leaves it in its folder."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))


def job(config: TSCDConfig, path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`python jobs/tscd.py --config FILE` as a process."""
    write_config(config, path)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "tscd.py"), "--config", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=path.parent,
    )  # fmt: skip


def metrics(config: TSCDConfig) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path = folder_of(config) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


PAUSE, CHECKPOINT = 10, "checkpoint_00000009"
"""Where `paused` stops a run (with a checkpoint every 3 steps), and the checkpoint before that."""


def paused(marker: Path) -> Callable[[dict[str, Any]], None]:
    """The trainer's loop, that stops at step PAUSE for as long as it takes to be killed; only the first time.

    Who kills must not race with a run that is fast on one machine and slow on another.
    """
    path, at = str(marker), PAUSE

    def loop_with_a_pause(arguments: dict[str, Any]) -> None:
        import time
        from pathlib import Path

        from hypersd_ray.trainer import loop

        inner = loop.Worker._after_step

        def after_step(worker: Any, metrics: Any) -> None:
            inner(worker, metrics)
            progress = worker.training.progress
            here = worker.clock.global_step(progress.stage, progress.step) == at
            if here and worker.rank == 0 and not Path(path).exists():
                Path(path).touch()
                while True:
                    time.sleep(0.1)

        loop.Worker._after_step = after_step  # type: ignore[method-assign]
        loop.train_loop(arguments)

    return loop_with_a_pause


def is_paused(config: TSCDConfig, marker: Path) -> bool:
    """It stands still, and Ray Train's controller knows of the checkpoint before."""
    snapshot = folder_of(config) / "checkpoint_manager_snapshot.json"
    return marker.exists() and snapshot.exists() and CHECKPOINT in snapshot.read_text()


def drive(config_file: str, marker: str) -> None:
    """What a driver of another process does: `train`, with the pause."""
    from hypersd_ray.trainer import run

    run.train_loop = paused(Path(marker))
    run.train(TSCDConfig.model_validate(yaml.safe_load(Path(config_file).read_text())))


def driver(config: TSCDConfig, path: Path, marker: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`drive` as a process."""
    write_config(config, path)
    code = f"from tests.trainer.helpers import drive; drive({str(path)!r}, {str(marker)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 500.0, process: subprocess.Popen | None = None) -> Any:
    """The condition's first true value."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{condition} did not come true in {seconds:g} s")


def train_workers() -> list[int]:
    """Process ids of Ray Train's workers of this process's Ray, and of no other's."""
    return [pid for pid in _descendants(os.getpid()) if "RayTrainWorker" in _command(pid)]


def kill(pid: int) -> None:
    """As an out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += (task / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in map(int, set(children)):
        yield child
        yield from _descendants(child)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resumed_at(config: TSCDConfig) -> list[int]:
    """The steps at which a later process went on: where the logged steps go back."""
    steps = [line["step"] for line in metrics(config)]
    return [b for a, b in zip(steps, steps[1:], strict=False) if b <= a]
