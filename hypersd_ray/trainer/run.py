"""Run a distillation on a Ray cluster: settle the data, start the workers, show progress, bring back the result."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import ray
import ray.train
import yaml
from packaging.version import Version
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError, UserCallback

from hypersd_ray.actors.placement import Handles, start_evaluators, stop_evaluators
from hypersd_ray.config.base import CombinationError, ConfigError, RunError, Stopped
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.anchor import anchor
from hypersd_ray.data.precompute import rejected, resolve, validate
from hypersd_ray.data.rejects import start_reject_log, told
from hypersd_ray.data.sources import find_shards
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.trainer import elastic, keeping, storage
from hypersd_ray.trainer.kinds import KINDS, AnyConfig, Kind, kind_of
from hypersd_ray.trainer.local import start_local
from hypersd_ray.trainer.loop import LoopArguments, PairSource, train_loop
from hypersd_ray.trainer.pairs import pair_folder
from hypersd_ray.trainer.places import await_places
from hypersd_ray.trainer.progress import encoding_lines, watching
from hypersd_ray.trainer.room import check_actors
from hypersd_ray.trainer.room import most_there_will_be as _most_there_will_be
from hypersd_ray.trainer.stopping import Trainer, stopping

ROOT = Path(__file__).parents[2]
UPLOADED = "_ray_pkg_"
"""How Ray names the folder of a job's uploaded working directory."""
OLDEST_DEEPSPEED = "0.19.8"
"""With which gradient accumulation can be left to the caller."""


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


def check(config: AnyConfig) -> None:
    """All that can be known to be wrong before a cluster starts.

    Raises:
        ConfigError, ValueError: one line.
    """
    check_resolution(config)
    kind = KINDS[kind_of(config)]
    if config.run.precision == "bf16" and config.run.gpus_per_worker == 0:
        raise ConfigError("run.precision=bf16 with run.gpus_per_worker=0: bf16 is for GPUs; set run.precision=fp32")
    check_deepspeed(config)
    check_open_number(config)
    kind.check(config)
    find_pairs(config)
    for name in {"wandb", "mlflow"} & set(config.run.loggers):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.loggers has {name}, which is not installed: pip install 'hypersd-ray[{name}]', or leave it out"
            )
    folder = storage.run_folder(config.run)
    check_same_run(config, folder)
    if config.data.cache == "disk" and find_shards(config.data.patterns, config.data.format).format != "latents":
        validate(config.data, config.teacher, config.data.cache_dir or f"{folder}/latents")
    else:
        resolve(config.data, config.teacher, folder)  # makes nothing here, so it needs no Ray


def check_resolution(config: AnyConfig) -> None:
    """The autoencoder and the UNet can halve a picture of that side as often as they do.

    Raises:
        ConfigError, ValueError: they cannot, or the teacher cannot be read; one line.
    """
    info = read_base(config.teacher)
    side = info.latent_factor * 2 ** (len(info.unet_config["block_out_channels"]) - 1)
    if config.data.resolution % side:
        nearest = max(1, round(config.data.resolution / side)) * side
        raise ConfigError(
            f"data.resolution={config.data.resolution} is not a multiple of {side}, which {config.teacher} needs: the "
            f"nearest is {nearest} (it was made for {info.unet_config['sample_size'] * info.latent_factor})"
        )


def check_deepspeed(config: AnyConfig) -> None:
    """What ZeRO needs is installed.

    Raises:
        ConfigError: what is missing, and the command that installs it.
    """
    if not isinstance(config, TSCDConfig) or config.zero.stage == 0:
        return
    found = importlib.metadata.version("deepspeed") if importlib.util.find_spec("deepspeed") else "not there"
    if found == "not there" or Version(found) < Version(OLDEST_DEEPSPEED):
        raise ConfigError(
            f"zero.stage={config.zero.stage} needs DeepSpeed {OLDEST_DEEPSPEED} or newer, it is {found}: "
            "pip install 'hypersd-ray[zero]', or set zero.stage=0"
        )


def check_open_number(config: AnyConfig) -> None:
    """Ray Train counts a node's whole resources as places for workers when their number is open: nothing else may need some.

    Raises:
        ConfigError: what does, and the setting that mends it.
    """
    if config.run.min_workers is None:
        return
    if _encodes(config):
        raise ConfigError(
            f"run.min_workers={config.run.min_workers} with data that is encoded while it trains: the encoders' places would "
            "be counted as workers'; set data.cache=disk, or encode before (jobs/precompute.py)"
        )
    if isinstance(config, FeedbackConfig | OneStepConfig) and KINDS[kind_of(config)].models(config):
        where = "placement" if isinstance(config, FeedbackConfig) else "feedback.placement"
        taken = {name: getattr(config.placement, name) for name in ("num_gpus", "num_cpus")}
        if name := next((name for name, amount in taken.items() if amount), None):
            raise ConfigError(
                f"run.min_workers={config.run.min_workers} with {where}.{name}={taken[name]:g}: the actors' places would be "
                f"counted as workers'; set {where}.where=local or {where}.{name}=0"
            )


def check_same_run(config: AnyConfig, folder: str) -> None:
    """A run that goes on must be the one that is in its folder.

    Raises:
        ConfigError: the field that differs, and its value there.
    """
    path = f"{folder}/config.yaml"
    if not storage.exists(path):
        return
    kind = KINDS[kind_of(config)]
    another_kind = f"{folder} holds another kind of run: set run.name to start another"
    try:
        values = dict(yaml.safe_load(storage.read_text(path)))
        of_this_kind = _is_of(kind, values)
        there = {name: values[name] for name in ("teacher", "init", "tscd", "first_stage") if name in values}
        moved = {name: getattr(config, name) for name in there if hasattr(config, name)}  # to another place, say
        saved = kind.config.model_validate(values | moved) if of_this_kind else None
    except pydantic.ValidationError:
        raise ConfigError(another_kind) from None
    except (ValueError, KeyError, TypeError, CombinationError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason:.160}): set run.name to start another run") from None
    if not of_this_kind:
        raise ConfigError(another_kind)
    for field in kind.same_run:
        ours, theirs = (functools.reduce(getattr, field.split("."), one) for one in (config, saved))
        theirs = there.get(field, theirs)
        if in_checkout(ours) != in_checkout(theirs):
            raise ConfigError(
                f"{field} differs from the run that is in {folder}: {_difference(ours, theirs)}; "
                "set run.name to start another run"
            )


def _is_of(kind: Kind, values: dict[str, Any]) -> bool:
    """Whether a saved configuration is of `kind`: no other kind's fields are more like its own. Versions may differ."""
    return kind is min(KINDS.values(), key=lambda one: len(one.config.model_fields.keys() ^ values.keys()))


def in_checkout(value: Any) -> Any:
    """A path within the checkout from there on, in lists and dicts too: each upload of a job's working directory lies
    somewhere else."""
    if isinstance(value, dict):
        return {name: in_checkout(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(in_checkout, value))
    return re.sub(rf"^.*/{UPLOADED}\w+/", "", value).removeprefix(f"{ROOT}/") if isinstance(value, str) else value


def _difference(ours: Any, theirs: Any) -> str:
    """What differs, in few words: a model's first field, or the values."""
    if isinstance(ours, pydantic.BaseModel):
        name = next(n for n in type(ours).model_fields if getattr(ours, n) != getattr(theirs, n))
        return f"{name} is {getattr(ours, name)!s:.80}, there {getattr(theirs, name)!s:.80}"
    return f"it is {ours!s:.120}, there {theirs!s:.120}"


def check_resources(config: AnyConfig) -> None:
    """The workers must fit on the cluster, or on what its autoscaler may add.

    Raises:
        ConfigError: the resource that is missing and the setting to change.
    """
    have, most = ray.cluster_resources(), _most_there_will_be()
    for name, each, knob in (
        ("CPU", config.run.cpus_per_worker, "run.cpus_per_worker"),
        ("GPU", config.run.gpus_per_worker, "run.gpus_per_worker"),
    ):
        beside = beside_workers(config)[name]
        wanted = config.run.fewest * (each + beside)
        if wanted <= have.get(name, 0) + 1e-9:
            continue
        needs = f"{config.run.fewest_knob}={config.run.fewest} with {knob}={each:g} need {wanted:g} {name}"
        if beside:
            needs += f", {beside:g} of a worker's for its data (data.reader_cpus, data.encoder; encoded before: jobs/precompute.py)"
        if most is not None and wanted > max(have.get(name, 0), most.get(name, 0)):
            raise ConfigError(
                f"{needs}, the cluster's autoscaler adds nodes up to {most.get(name, 0):g}: lower {config.run.fewest_knob} or {knob}, "
                "or raise max_workers in the cluster's configuration"
            )
        if not os.environ.get("RAY_AUTOSCALING"):
            raise ConfigError(
                f"{needs}, the cluster has {have.get(name, 0):g}: "
                f"lower {config.run.fewest_knob} or {knob}, or set RAY_AUTOSCALING=1 where nodes may still come"
            )
    if os.environ.get("RAY_AUTOSCALING"):
        await_places(config.run, elastic.place_of(config))
    else:
        elastic.check_room(config)


def beside_workers(config: AnyConfig) -> dict[str, float]:
    """What each worker's own reading takes, and its encoders where pictures are encoded while it trains. Ray Data would
    wait for it without a word."""
    data = config.data
    found = {"CPU": data.reader_cpus, "GPU": 0.0}
    if _encodes(config):
        found["CPU"] += data.encoder.min_size * data.encoder.num_cpus
        found["GPU"] += data.encoder.min_size * data.encoder.num_gpus
    return found


def _encodes(config: AnyConfig) -> bool:
    """Pictures are encoded while it trains."""
    data = config.data
    return data.cache == "none" and find_shards(data.patterns, data.format).format != "latents"


def find_pairs(config: AnyConfig) -> PairSource | None:
    """What a one-step run regresses on; None when it does not.

    Raises:
        ConfigError: the folder holds no whole pairs of this teacher.
    """
    if not isinstance(config, OneStepConfig) or config.regression.pairs is None:
        return None
    urls, made = pair_folder(config.regression.pairs, config.teacher)
    return PairSource(urls, made["seed"])


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
    handles = start_evaluators(models, config.placement, config.run.name)
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
    storage.write_text(f"{folder}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    sources = resolve(config.data, config.teacher, folder, encoding_lines())
    data = config.data.model_copy(update={"format": sources.format})
    if config.run.min_workers is not None:
        data = data.model_copy(
            update={"reader_cpus": 0.0}
        )  # a worker's own place has room for them: see elastic.place_of
    pairs = find_pairs(config)
    reject_log = (
        None if sources.format == "latents" else start_reject_log(data, f"{folder}/rejects.jsonl", config.run.name)
    )
    with shared_models(config) as evaluators, watching() as board:
        arguments = LoopArguments(
            kind_of(config), config.model_copy(update={"data": data}).model_dump(), tuple(sources.urls), board,
            reject_log, pairs, evaluators, runs_per_node,
        )  # fmt: skip
        keeping.mend_record(folder)
        try:
            with (
                stopping(board, config.run.stop_patience_s, sign, config.run.name, folder),
                elastic.start_timeout(config.run),
                elastic.room_told(config, board),
            ):
                result = _trainer(config, arguments, callbacks).fit()
        except TrainingFailedError as error:
            _raise_stop_reason(board)
            print(error, file=sys.stderr)
            failures = f"workers failed more often than run.max_failures={config.run.max_failures} allows"
            raise RunError(f"run {config.run.name}: {failures}; the same command goes on from {folder}") from error
        _raise_stop_reason(board)
        left = ray.get(board.left.remote())
        if left is not None:
            raise Stopped(f"run {config.run.name} was told to stop; the same command goes on from {left}")
        was_finished = ray.get(board.was_finished.remote())
    if reject_log is None:
        lost = rejected(sources)
    else:
        lost = told(ray.get(reject_log.summary.remote()), f"{folder}/rejects.jsonl")
    return Result(folder, result.metrics or {}, was_finished, lost)


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
