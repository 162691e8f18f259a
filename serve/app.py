"""The application: `serve run serve.app:build`, or `serve deploy serve/config/dev.yaml`.

On the command line settings are given as `denoiser.max_batch=16 model.base=/models/sd15`.
"""

from typing import Any

import click
import pydantic
import yaml
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.cli import one_line
from serve.access import key_digests
from serve.checkers import checker_class
from serve.denoiser import Denoiser
from serve.discovery import read_catalog
from serve.ingress import Ingress
from serve.settings import DenoiserSettings, Settings
from serve.status import CHECKER, DENOISER


def build(args: dict[str, Any]) -> Application:
    """The application that `args` (the fields of `Settings`) describe.

    Raises:
        click.ClickException: a setting is wrong; `serve run` prints its one line.
    """
    try:
        settings = read_settings(args)
        catalog = read_catalog(settings.model)
        keys = key_digests(settings.ingress)
        kind = checker_class(settings.safety, catalog.base)
    except (ConfigError, CombinationError) as error:
        raise click.ClickException(str(error)) from None
    if not catalog.loras:
        click.echo(
            f"No LoRA in {', '.join(settings.model.loras) or 'model.loras'}: the bare base is served, and its few-step "
            "images are unfinished. `python jobs/tscd.py tiny` makes LoRAs; name their folder in model.loras.",
            err=True,
        )
    logs = LoggingConfig(encoding="JSON", enable_access_log=False)  # the ingress writes one line a request itself
    denoiser = ray_serve.deployment(Denoiser, name=DENOISER).options(
        logging_config=logs,
        max_queued_requests=settings.limits.queued,
        **_replicas(settings.denoiser),
    )
    ingress = ray_serve.deployment(Ingress, name="Ingress").options(
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=1000,  # pages and health answer while images wait; the denoiser's queue is the bounded one
        ray_actor_options={"num_cpus": settings.ingress.cpus},
        logging_config=logs,
    )
    checker, judges = None, False
    if kind is not None:
        own = settings.safety
        checker = (
            ray_serve.deployment(kind, name=CHECKER)
            .options(
                num_replicas=own.replicas,
                max_ongoing_requests=own.ongoing,
                max_queued_requests=own.queued,
                ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
                logging_config=logs,
            )
            .bind(own, catalog.base)
        )
        judges = kind.judges_prompts
    return ingress.bind(settings, catalog, keys, denoiser.bind(settings, catalog), checker, judges)


def read_settings(args: dict[str, Any]) -> Settings:
    """`Settings` of nested or dotted keys; texts are read as YAML.

    Raises:
        ConfigError: one line naming the field, the value and what would be accepted.
    """
    tree: dict[str, Any] = {}
    for name, value in args.items():
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return Settings.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error)) from None


def _replicas(own: DenoiserSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_ongoing_requests": own.max_ongoing,
        "ray_actor_options": {"num_cpus": own.cpus, "num_gpus": own.gpus},
    }
    if own.max_replicas is None:
        return options | {"num_replicas": own.replicas}
    return options | {
        "autoscaling_config": {
            "min_replicas": own.fewest,
            "initial_replicas": max(own.fewest, min(own.replicas, own.max_replicas)),
            "max_replicas": own.max_replicas,
            "target_ongoing_requests": own.target_ongoing,
            "upscale_delay_s": own.upscale_delay_s,
            "downscale_delay_s": own.downscale_delay_s,
        }
    }
