"""What is wrong with a run before it starts: in its settings, in its folder, with the room on the cluster."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pydantic
import yaml
from packaging.version import Version

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.precompute import resolve, validate
from hypersd_ray.data.sources import find_shards
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.trainer import elastic, storage
from hypersd_ray.trainer.kinds import KINDS, AnyConfig, Kind, kind_of
from hypersd_ray.trainer.loop import PairSource
from hypersd_ray.trainer.pairs import pair_folder
from hypersd_ray.trainer.places import await_places
from hypersd_ray.trainer.room import check_pool, placement_section, require, takes

ROOT = Path(__file__).parents[2]
UPLOADED = "_ray_pkg_"
"""How Ray names the folder of a job's uploaded working directory."""
OLDEST_DEEPSPEED = "0.19.8"
"""With which gradient accumulation can be left to the caller."""


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
        where = placement_section(config)
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
    run, beside = config.run, beside_workers(config)
    for name, each, knob in takes(run, "run"):
        needs = f"{run.fewest_knob}={run.fewest} with {knob}={each:g}"
        if beside[name]:
            needs += f" and {beside[name]:g} for each one's data (data.reader_cpus, data.encoder; encoded before: jobs/precompute.py)"
        require(needs, {name: run.fewest * (each + beside[name])}, f"{run.fewest_knob} or {knob}")
    if encodes_before(config.data):
        check_pool(config.data.encoder, "data.encoder", config.data.reader_cpus)
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
    return config.data.cache == "none" and not _encoded(config.data)


def encodes_before(data: DataConfig) -> bool:
    """Pictures are encoded before it trains."""
    return data.cache == "disk" and not _encoded(data)


def _encoded(data: DataConfig) -> bool:
    return find_shards(data.patterns, data.format).format == "latents"


def find_pairs(config: AnyConfig) -> PairSource | None:
    """What a one-step run regresses on; None when it does not.

    Raises:
        ConfigError: the folder holds no whole pairs of this teacher.
    """
    if not isinstance(config, OneStepConfig) or config.regression.pairs is None:
        return None
    urls, made = pair_folder(config.regression.pairs, config.teacher)
    return PairSource(urls, made["seed"])
