"""Run a distillation on a Ray cluster: settle the data, start the workers, show progress, bring back the result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pydantic
import ray
import ray.train
import yaml
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.precompute import resolve
from hypersd_ray.data.rejects import start_reject_log
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds import KINDS, kind_of
from hypersd_ray.trainer.loop import LoopArguments, PairSource, train_loop
from hypersd_ray.trainer.pairs import pair_folder
from hypersd_ray.trainer.progress import watching

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and the last report of rank 0."""

    folder: str
    metrics: dict


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names; else start one on this machine."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    if "RAY_ADDRESS" not in os.environ:
        # On one's own machine the bar says what there is to say; what the processes print is in Ray's session logs, and
        # what fails comes back as an exception. Level "fatal" is for warnings of Ray's C++ side about its own actors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # At least 4 logical CPUs: a reader, an encoder and a worker must be able to stand side by side.
        ray.init(
            num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, logging_level="ERROR", log_to_driver=False
        )
        return
    inherited = (
        bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
        and "working_dir" in os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]
    )
    ray.init(logging_level="WARNING", runtime_env=None if inherited else {"working_dir": str(ROOT)})


def check(config: TSCDConfig) -> None:
    """All that can be known to be wrong before a cluster starts.

    Raises:
        ConfigError, ValueError: one line.
    """
    read_base(config.teacher)
    kind = KINDS[kind_of(config)]
    if config.run.precision == "bf16" and config.run.gpus_per_worker == 0:
        raise ConfigError("run.precision=bf16 with run.gpus_per_worker=0: bf16 is for GPUs; set run.precision=fp32")
    kind.check(config)
    find_pairs(config)
    saved_path = f"{storage.run_folder(config.run)}/config.yaml"
    if not storage.exists(saved_path):
        return
    try:
        saved = kind.config.model_validate(yaml.safe_load(storage.read_text(saved_path)))
    except CombinationError as error:
        raise ConfigError(f"{saved_path}: {error}; set run.name to start another run") from None
    except pydantic.ValidationError:
        raise ConfigError(
            f"{storage.run_folder(config.run)} holds another kind of run: set run.name to start another"
        ) from None
    for field in kind.same_run:
        if getattr(saved, field) != getattr(config, field):
            raise ConfigError(
                f"{field} differs from the run that is in {storage.run_folder(config.run)} "
                f"({getattr(saved, field)!s:.80} there): set run.name to start another run"
            )


def check_resources(config: TSCDConfig) -> None:
    """The workers must fit on the cluster, or on what its autoscaler may add.

    Raises:
        ConfigError: the resource that is missing and the setting to change.
    """
    have = ray.cluster_resources()
    for name, each, knob in (
        ("CPU", config.run.cpus_per_worker, "run.cpus_per_worker"),
        ("GPU", config.run.gpus_per_worker, "run.gpus_per_worker"),
    ):
        wanted = config.run.workers * each
        if wanted > have.get(name, 0) and not os.environ.get("RAY_AUTOSCALING"):
            raise ConfigError(
                f"run.workers={config.run.workers} with {knob}={each} need {wanted:g} {name}, the cluster has {have.get(name, 0):g}: "
                f"lower run.workers or {knob}, or set RAY_AUTOSCALING=1 where nodes may still come"
            )


def find_pairs(config: TSCDConfig) -> PairSource | None:
    """What a one-step run regresses on; None when it does not.

    Raises:
        ConfigError: the folder holds no whole pairs of this teacher.
    """
    if not isinstance(config, OneStepConfig) or config.regression.pairs is None:
        return None
    urls, made = pair_folder(config.regression.pairs, config.teacher)
    return PairSource(urls, made["seed"])


def train(config: TSCDConfig) -> Result:
    """Run `config` from its beginning or from where the run of that name stands.

    Raises:
        ConfigError, ValueError: something a user can mend.
    """
    check(config)
    connect()
    check_resources(config)
    folder = storage.run_folder(config.run)
    storage.write_text(f"{folder}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    sources = resolve(config.data, config.teacher, folder)
    data = config.data.model_copy(update={"format": sources.format})
    pairs = find_pairs(config)
    reject_log = None if sources.format == "latents" else start_reject_log(data, f"{folder}/rejects.jsonl")
    run = config.run
    with watching() as board:
        arguments = LoopArguments(
            kind_of(config), config.model_copy(update={"data": data}).model_dump(), tuple(sources.urls), board,
            reject_log, pairs,
        )  # fmt: skip
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=vars(arguments),
            scaling_config=ScalingConfig(
                num_workers=run.workers,
                use_gpu=run.gpus_per_worker > 0,
                resources_per_worker={"CPU": run.cpus_per_worker}
                | ({"GPU": run.gpus_per_worker} if run.gpus_per_worker else {}),
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=storage.absolute(run.out),
                failure_config=FailureConfig(max_failures=run.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=run.keep_checkpoints),
            ),
        )
        result = trainer.fit()
    return Result(folder, result.metrics or {})
