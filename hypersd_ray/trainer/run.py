"""Run a distillation on a Ray cluster: settle the data, start the workers, show progress, bring back the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError, UserCallback

from hypersd_ray.actors.placement import Handles, start_evaluators, stop_evaluators
from hypersd_ray.config.base import RunError, Stopped
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.run import RunConfig
from hypersd_ray.data.anchor import anchor
from hypersd_ray.data.precompute import rejected, resolve
from hypersd_ray.data.rejects import start_reject_log, told
from hypersd_ray.trainer import elastic, keeping, storage
from hypersd_ray.trainer.checks import ROOT, beside_workers, check, check_resources, find_pairs
from hypersd_ray.trainer.kinds import KINDS, AnyConfig, kind_of
from hypersd_ray.trainer.local import start_local, unwatched
from hypersd_ray.trainer.loop import LoopArguments, train_loop
from hypersd_ray.trainer.progress import encoding_lines, shown
from hypersd_ray.trainer.room import check_actors, placement_section
from hypersd_ray.trainer.sole import sole
from hypersd_ray.trainer.stopping import Trainer, stopping


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, the last report of rank 0, whether there was nothing left to do, and what was wrong with
    its data, in a line."""

    folder: str
    metrics: dict
    was_finished: bool = False
    rejected: str = ""


def connect(dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names; else start one on this machine, with its dashboard where
    that is needed."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" not in os.environ:
        start_local(dashboard)
        return
    inherited = (
        bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
        and "working_dir" in os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]
    )
    # What the workers print stays in Ray's logs here too, among it Ray's own tracebacks of what the run survives.
    ray.init(
        logging_level="ERROR",
        log_to_driver=os.environ.get("RAY_LOG_TO_DRIVER") == "1",
        runtime_env=None if inherited else {"working_dir": str(ROOT)},
    )
    anchor()


def absolute_paths(config: AnyConfig) -> AnyConfig:
    """`config` with its local folders as they are from here: workers run in other directories."""
    run = config.run.model_copy(update={"out": storage.out_folder(config.run)})
    return config.located(storage.absolute).model_copy(update={"run": run})


@contextmanager
def shared_models(config: AnyConfig) -> Iterator[Handles | None]:
    """The actors of the run's reward and perception models for as long as the block lasts; None where it has none.

    Raises:
        ConfigError, ValueError: one cannot be placed or loaded; one line.
    """
    models = KINDS[kind_of(config)].models(config)
    if not models:
        yield None
        return
    assert isinstance(config, FeedbackConfig | OneStepConfig)
    handles = start_evaluators(models, config.placement, config.run.name, placement_section(config))
    try:
        yield handles
    finally:
        stop_evaluators(handles)


def train(
    config: AnyConfig,
    callbacks: Sequence[UserCallback] = (),
    runs_per_node: int = 1,
    sign: ray.actor.ActorHandle | None = None,
) -> Result:
    """Run `config` from its beginning or from where the run of that name stands. `callbacks` are Ray Train's;
    `runs_per_node` runs at a time share a node's cores. Signals stop a run of the main thread, a `sign` one of another.

    Raises:
        ConfigError, ValueError: something a user can mend, before anything started.
        RunError: the run started and cannot go on; Stopped: it was told to stop.
    """
    config = absolute_paths(config)
    check(config)
    connect()
    check_resources(config)
    check_actors(config, beside_workers(config))
    folder = storage.run_folder(config.run)
    with sole(config.run, folder) as board:
        keeping.write_config(folder, config)
        sources = resolve(config.data, config.teacher, folder, encoding_lines())
        update: dict[str, Any] = {"format": sources.format}
        if config.run.min_workers is not None:
            update["reader_cpus"] = 0.0  # a worker's own place has room for them: see elastic.place_of
        streamed = config.model_copy(update={"data": config.data.model_copy(update=update)})
        pairs, reject_log = find_pairs(config), None
        if sources.format != "latents":
            reject_log = start_reject_log(streamed.data, f"{folder}/rejects.jsonl", config.run.name)
        with shown(board), shared_models(config) as evaluators, elastic.room_told(config, board):
            arguments = LoopArguments(
                kind_of(config), streamed.model_dump(), tuple(sources.urls), board, reject_log, pairs, evaluators, runs_per_node
            )  # fmt: skip
            metrics = run_trainer(_trainer(config, arguments, callbacks), config.run, folder, board, sign)
        was_finished = ray.get(board.was_finished.remote())
    if reject_log is None:
        lost = rejected(sources)
    else:
        lost = told(ray.get(reject_log.summary.remote()), f"{folder}/rejects.jsonl")
    return Result(folder, metrics, was_finished, lost)


def run_trainer(
    trainer: Trainer,
    run: RunConfig,
    folder: str,
    board: ray.actor.ActorHandle,
    sign: ray.actor.ActorHandle | None = None,
) -> dict[str, Any]:
    """The last report of rank 0, once no step is left. Signals and `sign` as in `train`.

    Raises:
        RunError: the run cannot go on; Stopped: it was told to stop.
    """
    keeping.mend_record(folder)
    try:
        with stopping(board, run.stop_patience_s, sign, run.name, folder), elastic.start_timeout(run), unwatched():
            result = trainer.fit()
    except TrainingFailedError as error:
        _raise_stop_reason(board)
        print(error, file=sys.stderr)
        failures = f"workers failed more often than run.max_failures={run.max_failures} allows"
        raise RunError(f"run {run.name}: {failures}; the same command goes on from {folder}") from error
    _raise_stop_reason(board)
    left = ray.get(board.left.remote())
    if left is not None:
        raise Stopped(f"run {run.name} was told to stop; the same command goes on from {left}")
    return result.metrics or {}


def _raise_stop_reason(board: ray.actor.ActorHandle) -> None:
    reason = ray.get(board.stop_reason.remote())
    if reason is not None:
        raise reason


def _trainer(config: AnyConfig, arguments: LoopArguments, callbacks: Sequence[UserCallback]) -> Trainer:
    run = config.run
    workers: int | tuple[int, int] = run.workers
    internal = list(callbacks)
    if run.min_workers is not None:
        workers = (run.min_workers, run.workers)
        internal.append(elastic.SaveBeforeResize(arguments.board, run.stop_patience_s))
    return Trainer(
        train_loop,
        train_loop_config=vars(arguments),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=run.gpus_per_worker > 0, resources_per_worker={"CPU": 0} | elastic.place_of(config),
            elastic_resize_monitor_interval_s=run.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=storage.out_folder(run),
            callbacks=internal,
            failure_config=FailureConfig(max_failures=run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.keep_checkpoints),
        ),
    )  # fmt: skip
