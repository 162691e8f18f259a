"""Command lines from recipes: `job RECIPE [--recipe-argument ...] [--any.config.field ...]`, or `job --config FILE`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import pydantic
import tyro
import yaml

from hypersd_ray.config.base import CombinationError, ConfigError, RunError

Config = TypeVar("Config", bound=pydantic.BaseModel)

EXTRAS = {
    "webdataset": "data", "optuna": "sweep", "s3fs": "cloud", "gcsfs": "cloud", "wandb": "wandb",
    "mlflow": "mlflow", "cv2": "control", "deepspeed": "zero", "sqlalchemy": "study", "psycopg": "study",
    "torchmetrics": "lpips",
}  # fmt: skip
"""Packages that only some jobs need -> the extra of pyproject.toml that brings them."""

RECIPE_OPTIONS = {
    "budget": "how long to train: a first look, or the recipe of the committed LoRAs",
    "clip": "open_clip's ViT-B-32 of OpenAI, to measure CLIP score by; empty: without",
    "feedback": "the aesthetic predictor and ImageReward judge the single step too",
    "full_unet": "train a full copy of the UNet in place of a LoRA",
    "image_reward_python": "interpreter of the environment that jobs/image_reward_env.py made",
    "init": "what training begins from: a LoRA file, or for jobs/reward.py a reward model",
    "keep_cfg": "the LoRA samples with guidance and negative prompts; one stage in place of four",
    "learn": "train on the reward models, on the structure loss (SOLO), or on both",
    "lora": "LoRA file that feedback learning starts from, as jobs/tscd.py leaves it",
    "method": "published method to train by",
    "mode": "good at 1 to 8 steps, or in the single step alone",
    "models": "folder of the reward models' and SOLO's files",
    "out": "folder that is written",
    "pairs": "preference pairs, parquet: a file or a pattern",
    "prompts": "text file of prompts, one a line, to measure quality on",
    "reward": "ImageReward on transformers' classes, or the authors' package",
    "rewards": "folder of the reward models that judge the single step too; empty: none",
    "shards": "image-text shards: a folder, a file or a pattern, any fsspec URL",
    "steps": "optimiser steps",
    "teacher": "folder of the base model in diffusers' layout",
    "tokenizer": "vocabulary file of the reward model's text tokenizer",
}
"""A recipe's parameter -> what --help says of it; one name means one thing in every recipe."""
PLAN_OPTIONS = """options of the job:
  --plan [NAME=NUMBER ...]  train nothing: print the throughput to 256 GPUs and what limits it; NAME=NUMBER is a rate
                            in place of an assumed one
"""
"""Of --help, where a job has --plan."""


class Parser(argparse.ArgumentParser):
    """One that raises what it has to complain of."""

    def __init__(self, description: str | None = None, epilog: str | None = None):
        super().__init__(description=description, epilog=epilog, add_help=False, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(
    recipes: Mapping[str, Callable[..., Config]],
    kind: type[Config],
    description: str,
    arguments: Sequence[str] | None = None,
    job_options: str = "",
) -> Config:
    """The configuration that a command line asks for.

    A recipe's own parameters become options, read first; every field of its config is an option after that. --help lists
    both, and `job_options`: lines on what the job itself reads before.

    Raises:
        ConfigError, CombinationError: one line naming the field, the value and what would be accepted.
        SystemExit: 0 after --help.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(description)
    parser.add_argument("recipe", nargs="?", help=f"one of {', '.join(recipes)}; its options: RECIPE --help")
    parser.add_argument(
        "--config", metavar="FILE", help="a config.yaml that a run left (or its URL), in place of a recipe"
    )
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.config:
            if known.recipe:
                raise ConfigError(f"both a recipe ({known.recipe}) and --config {known.config}: give one")
            default = _from_file(kind, known.config)
        elif known.recipe in recipes:
            default, rest = _from_recipe(known.recipe, recipes[known.recipe], rest, description, job_options)
        elif known.recipe is None and {"-h", "--help"} & set(rest):
            print(parser.format_help())
            raise SystemExit(0)
        else:
            wrong = f"unknown recipe {known.recipe!r}" if known.recipe else "no recipe given"
            raise ConfigError(f"{wrong}: choose one of {', '.join(recipes)}, or --config FILE")
        about = description if known.config else "Settings of the run; what is given here is in place of the recipe's."
        return read_options(kind, rest, about, default)
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error)) from None


def read_options(kind: Any, arguments: Sequence[str], description: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """`tyro.cli`, with what it complains of as one line in place of a box. `kind` is a config, or a union of subcommands'.

    Raises:
        ConfigError: the option, the value and what would be accepted.
        SystemExit: 0 after --help.
    """
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(kind, default=default, args=arguments, description=description)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), _columns(2000):  # so wide that nothing is wrapped
        try:
            return tyro.cli(kind, default=default, args=arguments, description=description)
        except SystemExit as stop:
            if not stop.code:
                raise
    raise ConfigError(_unboxed(said.getvalue(), kind))


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _unboxed(text: str, kind: Any) -> str:
    """The complaint in a box of tyro's (title, message, rule, hints) as one line; boxes are ASCII where UTF-8 is not."""
    lines = [line.strip(" │╭╮╰╯") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    body: list[str] = []
    for line in lines[1:]:
        rule = bool(line) and set(line) <= {"─", "-"}
        if rule and body:
            break
        if not rule:
            body.append(line)
    message = " ".join(" ".join(body).split())
    if message.startswith("Missing from"):
        return f"these options are required: {', '.join(line.split()[0] for line in body if line.startswith('--'))}"
    if unknown := re.match(r"Unrecognized options: (\S+?)(?:,|$)", message):
        return _unknown_option(unknown[1], kind)
    if wrong := re.match(r"Error parsing (\S+): \d+ validation errors? for \w+ (\S+) (.*?) \[type=", message):
        given = re.search(r"input_value=(.*?), input_type=", message)
        value = f" (given: {given[1]})" if given else ""
        return f"{wrong[1].lstrip('-')}.{wrong[2]}: {wrong[3].removeprefix('Value error, ')}{value}"
    return message.removeprefix("Error parsing ")


def _unknown_option(option: str, kind: Any) -> str:
    if not option.startswith("-"):
        return f"unexpected argument {option!r}: options look like --field VALUE, --help lists them"
    options = list(dict.fromkeys(f"--{name}" for name in _option_names(kind)))  # subcommands may share one
    last = option.rpartition(".")[2].lstrip("-")
    near = difflib.get_close_matches(option, options, n=2, cutoff=0.75)
    near += [o for o in options if o.rpartition(".")[2].lstrip("-") == last and o not in near][:2]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    section = [o for o in options if o.rpartition(".")[0] == option.rpartition(".")[0] and "." in o]
    if section and not near:
        hint = f"there are {', '.join(section)}; "
    return f"unknown option {option}: {hint}--help lists all"


def _option_names(kind: Any) -> Iterator[str]:
    """Dotted names of a config's fields, as tyro spells them; of subcommands' configs, those of each."""
    for command in get_args(kind):
        yield from _option_names(command)
    for name, field in kind.model_fields.items() if hasattr(kind, "model_fields") else ():
        spelled = name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from (f"{spelled}.{inner}" for inner in _option_names(field.annotation))
        else:
            yield spelled


def _from_file(kind: type[Config], path: str) -> Config:
    try:
        values = yaml.safe_load(_text(path))
    except Exception as error:  # each kind of storage has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"--config {path}: {reason:.200}") from None
    return kind.model_validate(values)


def _text(path: str) -> str:
    if "://" not in path:
        return Path(path).read_text()
    import fsspec

    with fsspec.open(path, "rt") as file:
        return file.read()


def _from_recipe(
    name: str, recipe: Callable[..., Config], rest: list[str], description: str, job_options: str
) -> tuple[Config | Any, list[str]]:
    """The recipe's config and the arguments left. Where help is asked for, that of the recipe's options is printed, and
    what the recipe needs may be missing. If there is no config then, tyro lists the settings with their classes' defaults."""
    parser = Parser(description, job_options)
    parser.prog += f" {name}"
    _add_options(parser.add_argument_group(f"options of the recipe {name}"), recipe)
    asked = bool({"-h", "--help"} & set(rest))
    missing = _missing(recipe, rest) if asked else {}
    try:
        own, left = parser.parse_known_args([*rest, *(word for pair in missing.items() for word in pair)])
        config: Config | Any = recipe(**vars(own))
    except (ConfigError, CombinationError, pydantic.ValidationError) as error:
        if not asked:
            raise
        reason = one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)
        reason = f"it needs {', '.join(missing)}" if missing else reason
        print(f"{parser.format_help()}\nThe defaults below are not this recipe's, which cannot be told yet: {reason}\n")
        return tyro.MISSING_NONPROP, ["--help"]
    if asked:
        print(parser.format_help())
    if missing:
        print(
            "Not given, so the defaults below say: "
            + ", ".join(f"{o} {value!r}" for o, value in missing.items())
            + "\n"
        )
    return config, left


def _missing(recipe: Callable[..., Any], given: Sequence[str]) -> dict[str, str]:
    """What the recipe needs and `given` lacks, as option -> a word in its place: a folder that is there for the teacher, which
    configurations look for, else a URL, which they do not."""
    there = {word.partition("=")[0] for word in given}
    names = [n for n, p in inspect.signature(recipe).parameters.items() if p.default is inspect.Parameter.empty]
    options = {f"--{name.replace('_', '-')}": "." if name == "teacher" else f"your://{name}" for name in names}
    return {option: word for option, word in options.items() if option not in there}


def _add_options(group: argparse._ArgumentGroup, recipe: Callable[..., Any]) -> None:
    """An option for each parameter of the recipe."""
    for name, parameter in inspect.signature(recipe, eval_str=True).parameters.items():
        text, option = RECIPE_OPTIONS.get(name, ""), f"--{name.replace('_', '-')}"
        if parameter.annotation is bool:
            group.add_argument(option, dest=name, action="store_true", default=parameter.default, help=text)
            continue
        literal = get_origin(parameter.annotation) is Literal
        required = parameter.default is inspect.Parameter.empty
        group.add_argument(
            option,
            dest=name,
            required=required,
            default=parameter.default,
            choices=get_args(parameter.annotation) if literal else None,
            type=str if literal else parameter.annotation,
            help=f"{text} ({'required' if required else f'default: {parameter.default!r}'})",
        )


def one_line(error: pydantic.ValidationError) -> str:
    """Pydantic's first complaint as `field: what is wrong`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {first.get('input')!r:.60})"
    return f"{field}: {message}{given}" if field else f"{message}{given}"


DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
"""What a disk or a folder is to blame for."""


def run_job(main: Callable[[], Any]) -> None:
    """Call a job's main. What a user did wrong (an extra not installed, too) ends it with one line and exit code 2, a run
    that cannot go on with one line and exit code 1, both without a traceback; else the exit code is what `main` returns."""
    try:
        code = main()
    except RunError as error:
        code = _complain(getattr(error, "cause", None) or error, 1)  # out of a Ray task it is wrapped
    except pydantic.ValidationError as error:
        code = _complain(one_line(error), 2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        code = _complain(f"{error.name} is not installed: pip install 'hypersd-ray[{extra}]'", 2)
    except ImportError as error:
        if not str(error).startswith("Install "):  # fsspec's words for a store whose package is missing
            raise
        code = _complain(f"{error}: pip install 'hypersd-ray[cloud]'", 2)
    except (ValueError, CombinationError) as error:
        code = _complain(getattr(error, "cause", None) or error, 2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        code = _complain(error, 1)
    except KeyboardInterrupt:
        code = _complain("interrupted; the same command goes on where it was", 130)
    except Exception as error:
        if not _ray_died(error):
            raise
        code = _complain(f"Ray itself failed; the same command goes on where it was. Ray says: {error}", 1)
    if code:
        sys.exit(code)


def _ray_died(error: Exception) -> bool:
    """Whether the cluster lost what every run stands on: its own processes, or the node of the driver's actors."""
    ray = sys.modules.get("ray")  # this module is read before a cluster is needed
    if ray is None:
        return False
    lost = ray.exceptions
    return isinstance(
        error,
        (lost.ActorDiedError, lost.NodeDiedError, lost.OwnerDiedError, lost.LocalRayletDiedError, lost.RaySystemError),
    )


def _complain(what: object, code: int) -> int:
    print(f"error: {' '.join(str(what).split())}", file=sys.stderr)
    return code
