"""The optimiser, and where a run happens: what every kind of run has in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict


class OptimConfig(Strict):
    """The student's optimiser, AdamW."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to a tenth at the stage's end."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up at each stage's start."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Greatest norm of the gradient."""
    batch: int = Field(default=512, ge=1)
    """Images of one step over all workers."""
    accumulation: int = Field(default=1, ge=1)
    """Parts a worker's share of the batch is computed in, to save memory."""
    checkpointing: bool = False
    """Compute each block again in the backward pass rather than keep what it made, to save memory."""


class RunConfig(Strict):
    """Where and on what a run happens."""

    name: str = Field(default="tscd", pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder under `out`; the same name goes on with the same run."""
    out: str = "runs"
    """Folder for runs, or an fsspec URL every node reaches."""
    workers: int = Field(default=1, ge=1)
    """Ray Train workers."""
    min_workers: int | None = Field(default=None, ge=1)
    """The fewest workers that the run goes on with; it grows to `workers` as nodes join. None: always `workers`. A step's
    images stay `optim.batch`, rounded up to equal shares."""
    resize_every_s: float = Field(default=60, gt=0)
    """With `min_workers`: seconds between looks for nodes that came. Another number of workers goes on from a
    checkpoint that is written for it."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each; 0 trains on the CPU."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """CPU cores of each."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of the frozen base; adapters and optimiser are float32."""
    seed: int = 0
    """All randomness is a function of (seed, rank, step)."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures a run survives by starting again from the last checkpoint; -1 is no limit."""
    place_timeout_s: float = Field(default=45, gt=0)
    """Where nodes come by need (RAY_AUTOSCALING): seconds without a place for the workers and without a node on its way,
    after which the job ends."""
    storage_patience_s: float = Field(default=300, ge=0)
    """Seconds for which a checkpoint or product that cannot be written to `out`, or a checkpoint that cannot be read, is
    tried again, before the run stops."""
    stop_patience_s: float = Field(default=60, ge=0)
    """Seconds that a job which is told to stop (SIGTERM, `ray job stop`) waits for the checkpoint of its last step. Ray
    itself waits 3 s: set RAY_JOB_STOP_WAIT_TIME_S at the head to this or more."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps in a row with NaN or inf after which the job stops; fewer are skipped and counted."""
    log_every: int = Field(default=20, ge=1)
    """Steps between log lines."""
    grids_every: int = Field(default=0, ge=0)
    """Steps between sample grids in the logs; 0 is one at the end of each stage."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where metrics go beside the run's metrics.jsonl."""
    prompts: tuple[str, ...] = Field(
        default=(
            "a photo of a cat",
            "a castle by the sea at dusk",
            "a bowl of fruit",
            "a portrait of an old sailor",
        ),
        min_length=1,
    )
    """Prompts of the sample grids."""

    @model_validator(mode="after")
    def _range(self) -> RunConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise CombinationError(f"run.min_workers={self.min_workers} is above run.workers={self.workers}")
        return self

    @property
    def fewest(self) -> int:
        """Workers without which it does not go on."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def fewest_knob(self) -> str:
        """The field that says so."""
        return "run.workers" if self.min_workers is None else "run.min_workers"


def rows_each(batch: int, workers: int, accumulation: int = 1) -> int:
    """Rows of one worker's step, a multiple of `accumulation`.

    Where workers and parts do not divide `batch`, as with `run.min_workers` they need not, a step has more rows than
    `batch`, by less than workers * accumulation.
    """
    return -(-batch // (workers * accumulation)) * accumulation


def check_shares(batch: int, run: RunConfig, optim: OptimConfig, field: str = "optim.batch") -> None:
    """`batch` can be shared out as it is, or the number of workers is open.

    Raises:
        CombinationError: the nearest number that can.
    """
    share = run.workers * optim.accumulation
    if batch % share and run.min_workers is None:
        nearest = max(1, round(batch / share)) * share
        raise CombinationError(
            f"{field}={batch} is not divisible by run.workers * optim.accumulation = {share}; the nearest accepted is {nearest}"
        )
