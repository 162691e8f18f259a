"""A comparison's methods, each a training or a chain of them: whether they can be compared, their rates, what they are made of."""

from __future__ import annotations

import hashlib
import inspect
import json

from evaluation.harness.judges import TITLES
from evaluation.harness.pieces import Piece
from evaluation.harness.subjects import base_sha256
from evaluation.harness.telling import learns_from
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.config.evaluate import JudgesConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.compare import TRAININGS


def check(config: CompareConfig, judges: JudgesConfig) -> None:
    """Whether its methods can be trained and compared; `judges` are those that there are.

    Raises:
        ConfigError: an unknown method, a budget too small for one, a judge that may not choose, another teacher.
    """
    unknown = [m for m in config.methods if m not in TRAININGS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]}: choose of {', '.join(TRAININGS)}")
    if config.select not in TITLES:
        raise ConfigError(f"--select {config.select} gives no score to a picture: one of {', '.join(TITLES)}")
    if not getattr(judges, config.select, ""):
        raise ConfigError(
            f"--select {config.select} has no weights here: give --judges.{config.select.replace('_', '-')}"
        )
    for method in config.methods:
        try:
            TRAININGS[method](budget=config.budget)
        except ConfigError as error:
            raise ConfigError(f"--budget {config.budget} with method {method}: {error}") from None
        if config.select in learns_from(method, config.budget, judges):
            raise ConfigError(
                f"--select {config.select}: {method} learns from that judge, and its rate would be chosen by what it was "
                "trained on; select another, such as clip_score"
            )
    if base_sha256(config.teacher) != base_sha256(str(paths.TEACHER)):
        raise ConfigError(
            f"--teacher {config.teacher}: the recipes of a comparison (hypersd_ray/recipes/methods.py) train the embedded "
            "model; leave it out, or write recipes of that teacher"
        )


def default_lr(method: str) -> float:
    """The method's own learning rate."""
    return inspect.signature(TRAININGS[method]).parameters["lr"].default


def sweep(config: CompareConfig, method: str) -> list[Piece]:
    """A piece a rate."""
    # %g is the run's name: two rates must not share it, nor one have two
    rates = [float(f"{factor * default_lr(method):.4g}") for factor in config.rates]
    return [Piece(method, rate, config.seeds[0]) for rate in rates]


def chain_hash(method: str, budget: int) -> str:
    """Of all that a method's configurations say but rate, seed and where the checkout lies."""
    chain = TRAININGS[method](budget=budget, lr=1e-3)  # the same one whatever the method's own is
    lora = str(paths.LORAS / "tscd-k1.safetensors")
    configs = [chain.first, *(link.config(lora) for link in chain.then)]
    links = [[link.above, link.steps] for link in chain.then]
    text = json.dumps([[c.model_dump(mode="json") for c in configs], links, chain.serves], sort_keys=True)
    return hashlib.sha256(text.replace(str(paths.ROOT), "").encode()).hexdigest()[:16]


def serving(serves: dict[int, str], steps: int) -> str | None:
    """Made for `steps`, or the next fewer, or the fewest."""
    return serves[max((n for n in serves if n <= steps), default=min(serves))] if serves else None
