"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard, Weights & Biases, MLflow, Prometheus."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from ray.util.metrics import Gauge
from torch import Tensor

from hypersd_ray.config.preference import PreferenceConfig
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds import AnyConfig

LoggedConfig = AnyConfig | PreferenceConfig
"""Of a run that has logs."""


class Logger(Protocol):
    """One destination."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, counted over all stages."""

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """A picture, uint8 (3, H, W)."""

    def flush(self) -> None:
        """What came so far must outlive this process."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """`metrics.jsonl` in the run's folder: one object a line, `step` in each."""

    def __init__(self, folder: str):
        self.path, self.remote = f"{folder}/metrics.jsonl", storage.is_url(folder)
        self.local = Path(tempfile.mkdtemp()) / "metrics.jsonl" if self.remote else Path(self.path)
        self.local.parent.mkdir(parents=True, exist_ok=True)
        if self.remote and storage.exists(self.path):
            self.local.write_text(storage.read_text(self.path))

        self.unwritten: list[str] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.unwritten.append(json.dumps({"step": step} | numbers) + "\n")
        with storage.tolerant():  # a log does not end a run: with the next line, then
            _append(self.local, "".join(self.unwritten).encode())
            self.unwritten.clear()

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Pictures have no place in JSON."""

    def flush(self) -> None:
        if self.remote and self.local.exists():
            with storage.tolerant():
                storage.put(self.local, self.path)

    def close(self) -> None:
        self.flush()


def _append(path: Path, lines: bytes) -> None:
    """All of `lines` at the file's end, or nothing: a full disk takes a part. A torn line of a killed process stays one."""
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError:
            file.truncate(size)
            raise


class TensorBoard:
    """Event files in the run's `tensorboard` folder; what an earlier process wrote past `step` is hidden.

    While the folder cannot be written nothing is kept: metrics.jsonl has it.
    """

    def __init__(self, folder: str, step: int):
        self.folder, self.purge_step = f"{folder}/tensorboard", step + 1
        self.writer: Any = None

    def _write(self, action: Callable[[Any], object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A writer that failed, now or in its own thread before, is not used again.
        writer, self.writer = self.writer, None
        with storage.tolerant():
            writer = writer or SummaryWriter(self.folder, purge_step=self.purge_step)
            action(writer)
            self.writer = writer

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.purge_step = step
        self._write(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self._write(lambda writer: (writer.add_image(name, image, step), writer.flush()))

    def flush(self) -> None:
        if self.writer is not None:  # a new one would hide what the run has written
            self._write(lambda writer: writer.flush())

    def close(self) -> None:
        if self.writer is not None:
            self._write(lambda writer: writer.close())


class WeightsAndBiases:
    """A wandb run of the same name, resumed when the run is."""

    def __init__(self, config: LoggedConfig):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project="hypersd_ray", id=config.run.name, resume="allow", config=config.model_dump())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.run.log({name: self.wandb.Image(np.asarray(image.permute(1, 2, 0)))}, step=step)

    def flush(self) -> None:
        """wandb's own process sends as it goes."""

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run of the same name, the same one when the run goes on; MLFLOW_TRACKING_URI names the server."""

    def __init__(self, config: LoggedConfig):
        import mlflow

        self.mlflow = mlflow
        experiment = mlflow.set_experiment("hypersd_ray")
        ours = f"tags.hypersd_folder = '{storage.run_folder(config.run)}'"
        found = mlflow.search_runs([experiment.experiment_id], ours, max_results=1, output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=config.run.name, tags={"hypersd_folder": storage.run_folder(config.run)})
        mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.mlflow.log_image(np.asarray(image.permute(1, 2, 0)), f"{name.replace('/', '_')}_{step}.png")

    def flush(self) -> None:
        """Each call above is a request."""

    def close(self) -> None:
        self.mlflow.end_run()


class Prometheus:
    """Gauges that Ray's metrics agent exports as `ray_hypersd_...`, labelled with the run's name.

    What Prometheus needs two labels for: `hypersd_loss_part` (part) and `hypersd_reward` (model, and its role, "train" or
    "watch").
    """

    NAMES: ClassVar[dict[str, str]] = {
        "loss": "The student's loss.",
        "grad_norm": "Norm of its gradient before clipping.",
        "images_per_s": "Images of all workers a second, over the latest steps.",
        "data_wait": "Share of the latest steps' time that went to waiting for data.",
        "reward_seconds": "Time of a step that went to waiting for rewards.",
        "skipped": "Steps left out so far because of NaN or inf.",
        "seconds_left": "Time to the run's end at the latest rate.",
        "k": "Segments of the stage.",
    }
    PARTS = (
        "consistency", "adversarial", "discriminator", "regression", "dmd", "fake_score",
        "aes", "percep", "drift", "drift_structure",
    )  # fmt: skip
    ROLES: ClassVar[dict[str, str]] = {"reward": "train", "watch": "watch"}
    """First part of a metric's name -> the reward's role."""

    def __init__(self, run: str):
        self.gauges = {n: Gauge(f"hypersd_{n}", description=text, tag_keys=("run",)) for n, text in self.NAMES.items()}
        self.step = Gauge("hypersd_step", description="Steps so far, over all stages.", tag_keys=("run",))
        self.part = Gauge("hypersd_loss_part", description="Parts of the loss, unweighted.", tag_keys=("run", "part"))
        self.reward = Gauge("hypersd_reward", description="Mean score.", tag_keys=("run", "model", "role"))
        self.tags = {"run": run}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.step.set(step, tags=self.tags)
        for name, value in values.items():
            kind, _, model = name.partition("/")
            if name in self.gauges:
                self.gauges[name].set(value, tags=self.tags)
            elif name in self.PARTS:
                self.part.set(value, tags=self.tags | {"part": name})
            elif kind in self.ROLES:
                self.reward.set(value, tags=self.tags | {"model": model, "role": self.ROLES[kind]})

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Prometheus holds numbers."""

    def flush(self) -> None:
        """Scraped, not sent."""

    def close(self) -> None:
        """Gauges end with the process."""


class Loggers:
    """All destinations of a run as one."""

    def __init__(self, config: LoggedConfig, step: int = 0):
        """`step` steps are done already, in an earlier process."""
        folder = storage.run_folder(config.run)
        makers: dict[str, Any] = {
            "tensorboard": lambda: TensorBoard(folder, step),
            "wandb": lambda: WeightsAndBiases(config),
            "mlflow": lambda: MLflow(config),
        }
        self.all: Sequence[Logger] = [
            JsonLines(folder),
            Prometheus(config.run.name),
            *(makers[name]() for name in config.run.loggers),
        ]

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """To every destination."""
        for logger in self.all:
            logger.scalars(step, values)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """To every destination."""
        for logger in self.all:
            logger.picture(step, name, image)

    def flush(self) -> None:
        """All destinations."""
        for logger in self.all:
            logger.flush()

    def close(self) -> None:
        """All destinations."""
        for logger in self.all:
            logger.close()
