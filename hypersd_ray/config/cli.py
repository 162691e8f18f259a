"""Command lines from recipes: `job RECIPE [--recipe-argument ...] [--any.config.field ...]`, or `job --config FILE`."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import pydantic
import tyro
import yaml

from hypersd_ray.config.base import CombinationError, ConfigError

Config = TypeVar("Config", bound=pydantic.BaseModel)


def parse(
    recipes: Mapping[str, Callable[..., Config]],
    kind: type[Config],
    description: str,
    arguments: Sequence[str] | None = None,
) -> Config:
    """The configuration that a command line asks for.

    A recipe's own parameters become options, read first; every field of its config is an option after that.

    Raises:
        ConfigError: one line naming the field, the value and what would be accepted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.config:
            if known.recipe:
                raise ConfigError(f"both a recipe ({known.recipe}) and --config {known.config}: give one")
            default = _from_file(kind, Path(known.config))
        elif known.recipe in recipes:
            rest.remove(known.recipe) if known.recipe in rest else None
            default, rest = _from_recipe(recipes[known.recipe], rest, description)
        else:
            wrong = f"unknown recipe {known.recipe!r}" if known.recipe else "no recipe given"
            raise ConfigError(f"{wrong}: choose one of {', '.join(recipes)}, or --config FILE")
        return tyro.cli(kind, default=default, args=rest, description=description)
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error)) from None


def _from_file(kind: type[Config], path: Path) -> Config:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except (FileNotFoundError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}") from None


def _from_recipe(recipe: Callable[..., Config], rest: list[str], description: str) -> tuple[Config, list[str]]:
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    signature = inspect.signature(recipe, eval_str=True)
    for name, parameter in signature.parameters.items():
        literal = get_origin(parameter.annotation) is Literal
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            required=parameter.default is inspect.Parameter.empty,
            default=parameter.default,
            choices=get_args(parameter.annotation) if literal else None,
            type=str if literal else parameter.annotation,
        )
    own, rest = parser.parse_known_args(rest)
    return recipe(**vars(own)), rest


def one_line(error: pydantic.ValidationError) -> str:
    """Pydantic's first complaint as `field: what is wrong`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {first.get('input')!r:.60})"
    return f"{field}: {message}{given}" if field else f"{message}{given}"


def run_job(main: Callable[[], None]) -> None:
    """Call a job's main; what a user did wrong ends it with one line and exit code 2, without a traceback."""
    try:
        main()
    except (ConfigError, CombinationError, pydantic.ValidationError) as error:
        text = one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)
        raise SystemExit(f"error: {text}") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
