"""The tree's layers (docs/design.md): who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hypersd_ray"
MODULES = sorted(p for top in ("hypersd_ray", "evaluation") for p in (ROOT / top).rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))

RAY = {"ray"}
NETWORKS = {"diffusers", "transformers", "safetensors", "peft", "accelerate"}
# room -> (rooms of hypersd_ray it may import, its own counted in; packages from outside that it must not)
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "diffusion": (set(), set()),
    "losses": (set(), set()),
    "config": ({"diffusion", "losses"}, RAY | NETWORKS),
    "models": ({"config", "diffusion", "losses"}, RAY),
    "training": ({"config", "diffusion", "losses", "models"}, RAY),
    "data": ({"config", "diffusion", "losses", "models"}, set()),
    "actors": ({"config", "diffusion", "losses", "models"}, set()),
    "trainer": ({"config", "diffusion", "losses", "models", "training", "data", "actors"}, set()),
    "tuning": ({"config", "diffusion", "losses", "models", "training", "data", "actors", "trainer"}, set()),
    "embedded": ({"diffusion", "losses", "models"}, RAY),
    "recipes": ({"config", "embedded"}, RAY | NETWORKS),
}
TORCH_ONLY = ("diffusion", "losses")


def imported(source: str) -> set[str]:
    """Full names of what a module imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    """`diffusion` of hypersd_ray/diffusion/solver.py, `recipes` of hypersd_ray/recipes/tscd.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrongs(room: str, source: str) -> list[str]:
    """What a module of `room` imports and must not."""
    rooms, outside = LAYERS[room]
    found = []
    for name in sorted(imported(source)):
        top, *rest = name.split(".")
        if top == "hypersd_ray":
            if rest[0] not in rooms | {room}:
                found.append(name)
        elif (
            top in ("evaluation", "jobs", "serve", "tests")
            or top in outside
            or (room in TORCH_ONLY and top != "torch" and top not in sys.stdlib_module_names)
        ):
            found.append(name)
    return found


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.is_relative_to(PACKAGE)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_module_imports_only_what_lies_below_it(path):
    if path == PACKAGE / "__init__.py":
        assert not imported(path.read_text())
        return
    assert room_of(path) in LAYERS, f"{room_of(path)}/ is a new room: give it its place in docs/design.md and here"
    assert wrongs(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("diffusion", "import numpy"),
        ("losses", "from hypersd_ray.config.base import Strict"),
        ("losses", "from hypersd_ray.diffusion.solver import jump"),
        ("models", "from hypersd_ray.training.tscd import Batch"),
        ("models", "def f():\n    import ray.train"),
        ("training", "from ray import train"),
        ("training", "from hypersd_ray import trainer"),
        ("data", "from hypersd_ray.trainer import storage"),
        ("trainer", "from evaluation.pictures import draw_grid"),
        ("config", "import diffusers"),
    ],
)
def test_the_check_sees_a_wrong_import(room, line):
    assert len(wrongs(room, line)) == 1


def test_importing_the_lower_rooms_brings_no_ray():
    """What the sources say is what happens: nothing comes in by a detour."""
    code = (
        "import sys, hypersd_ray.diffusion, hypersd_ray.losses, hypersd_ray.config.tscd, hypersd_ray.recipes\n"
        "print(sorted({'ray', 'diffusers', 'transformers', 'hypersd_ray.models'} & set(sys.modules)))\n"
        "import hypersd_ray.training.distiller, hypersd_ray.training.checkpoint\n"
        "print(sorted({'ray', 'hypersd_ray.trainer', 'hypersd_ray.data'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def dependencies() -> set[str]:
    """Import names of pyproject's dependencies, all extras counted in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    names = {re.split(r"[\[<>=~! ]", w, maxsplit=1)[0].lower().replace("-", "_") for w in wanted}
    return names | {"PIL", "yaml"}  # pillow's and pyyaml's


def test_no_job_shadows_a_module():
    """`python jobs/x.py` puts jobs/ first on the path: a file there wins over a package of its name."""
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} | {"serve", "hypersd_ray"}
    taken = packages | dependencies() | set(sys.stdlib_module_names)
    assert {"ray", "torch", "evaluation", "tests", "json"} <= taken
    assert {p.stem for p in JOBS} & taken == set()
    assert not (ROOT / "jobs" / "__init__.py").exists()


IMPORT_JOBS = (
    "import importlib, importlib.util, sys\n"
    f"for i, path in enumerate({[str(p) for p in JOBS]!r}):\n"
    "    spec = importlib.util.spec_from_file_location(f'job{i}', path)\n"
    "    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)\n"
    "    spec.loader.exec_module(module)\n"
    "print('ray' in sys.modules)\n"
)
"""Jobs as modules: their main is not called. Says whether Ray came with one."""


def test_every_module_and_job_imports():
    """In a fresh process; jobs leave Ray for later than `--help`."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in MODULES]
    code = IMPORT_JOBS + f"for name in {names!r}: importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"


def test_the_jobs_are_there():
    assert {"tscd", "precompute", "pretrain"} <= {p.stem for p in JOBS}
    assert len(MODULES) > 40
