"""What the served application is measured against: `Engine.run` in a loop, in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from hypersd_ray.config.base import Strict

PROMPT = "a noto penguin on a yellow background"


class Bare(Strict):
    """`Engine.run` in a loop, in this process; what `throughput` starts. Prints one line of JSON."""

    args: str
    """Settings of the application, as JSON."""
    steps: int = Field(ge=1, le=8)
    """Sampling steps."""
    batch: int = Field(ge=1)
    """Images of a batch."""
    seconds: float = Field(gt=0)
    """How long each of the two parts takes, at least."""


def bare(config: Bare) -> None:
    """Images per second in batches of `batch`, and seconds of one image alone."""
    import torch

    from serve.discovery import read_catalog
    from serve.engine import Engine
    from serve.settings import NO_LORA, Settings
    from serve.work import BatchKey, Shot

    settings = Settings.model_validate(json.loads(config.args))
    catalog = read_catalog(settings.model)
    engine = Engine(settings.model, catalog)
    name = catalog.choose(config.steps)
    lora = None if name == NO_LORA else engine.load_lora(name)
    width, height = map(int, catalog.sizes[0].split("x"))
    key = BatchKey(width, height, config.steps, 0.0, name, 1.0, False)

    def seconds_of(batch: int) -> list[float]:
        taken: list[float] = []
        end = time.monotonic() + config.seconds
        while time.monotonic() < end or len(taken) < 7:
            begun = time.monotonic()
            engine.run(key, [Shot(PROMPT, len(taken) * batch + i) for i in range(batch)], lora)
            taken.append(time.monotonic() - begun)
        return taken[2:]

    single, full = seconds_of(1), seconds_of(config.batch)
    result = {
        "single_s": statistics.median(single),
        "batch_s": statistics.median(full),
        "images_per_s": config.batch * len(full) / sum(full),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def run_bare(
    script: Path, args: dict[str, Any], steps: int, batch: int, seconds: float, threads: int
) -> dict[str, Any]:
    """`bare`, the subcommand of `script`, in a process of its own with so many threads.

    Raises:
        ValueError: it failed; the line is its last.
    """
    command = [
        sys.executable, str(script), "bare", "--args", json.dumps(args), "--steps", str(steps),
        "--batch", str(batch), "--seconds", str(seconds),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[1], env=environment)
    if done.returncode != 0:
        raise ValueError(f"the bare loop failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
