"""The image: one Ray version everywhere, no root, no secrets, everything that jobs need. It is read, not built, here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement
from pathspec import PathSpec

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(p for p in CLUSTER.rglob("*.yaml"))
DOCKERFILE = CLUSTER / "Dockerfile"
INSTRUCTIONS = {"FROM", "RUN", "ENV", "USER", "WORKDIR", "ARG", "COPY", "LABEL", "EXPOSE", "CMD", "ENTRYPOINT", "SHELL"}


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, its arguments as one line), in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(words[0], words[2]) for line in joined.splitlines() if line.strip() for words in [line.partition(" ")]]


def arguments(name: str) -> list[str]:
    """Of every instruction of that name."""
    return [rest for instruction, rest in instructions() if instruction == name]


def required_ray() -> Requirement:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")


def image_version() -> str:
    """The Ray in the image."""
    (version,) = re.findall(r"RAY_VERSION=(\S+)", DOCKERFILE.read_text())
    return version


def test_the_images_ray_is_the_one_the_project_asks_for():
    assert image_version() in required_ray().specifier
    assert ray.__version__ in required_ray().specifier
    assert '"ray[default,train,tune,data,serve]==$RAY_VERSION"' in DOCKERFILE.read_text()
    extras = set(required_ray().extras)
    assert extras <= {"default", "train", "tune", "data", "serve"}


def test_clusters_get_extras_that_there_are_and_all_that_their_jobs_need():
    there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in (DOCKERFILE, CLUSTER / "local.yaml"):
        (named,) = re.findall(r"""['"]\.\[(.*?)\]['"]""", path.read_text())
        extras = set(named.split(","))
        assert extras <= set(there), path
        assert extras >= {"cloud", "data", "sweep", "zero"}, path


def test_every_cluster_file_names_that_image_and_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tag = f"hypersd-ray:{version}-ray{image_version()}"
    assert len(FILES) == 7
    for path in FILES:
        text = path.read_text()
        assert set(re.findall(r"hypersd-ray:\S+", text)) <= {tag}, path
        assert set(re.findall(r'rayVersion: "(.*?)"', text)) <= {image_version()}, path
    named = [path for path in FILES if tag in path.read_text()]
    assert {path.stem for path in named} == {"aws", "gcp", "raycluster", "rayjob", "rayservice"}
    assert tag in DOCKERFILE.read_text()


def test_the_dockerfile_has_only_instructions_that_there_are():
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "FROM"
    (base,) = arguments("FROM")
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base) and base.split("-")[0].split(":")[1] in python.replace(
        ">=", ""
    )


def test_it_ends_as_another_user_than_root():
    assert arguments("USER") == ["1000:1000"]
    after = instructions()[[name for name, _ in instructions()].index("USER") :]
    assert not any("sudo" in rest or "apt-get" in rest for _, rest in after)
    assert re.search(r"useradd --uid 1000 .* ray\b", " ".join(arguments("RUN")))
    assert any("HOME=/home/ray" in rest for rest in arguments("ENV"))  # `ray up` mounts the token there


@pytest.mark.parametrize("package", ["g++", "ninja-build", "openssh-client", "rsync", "wget"])
def test_it_has_what_deepspeed_ray_up_and_kuberay_need(package):
    (install,) = [rest for rest in arguments("RUN") if "apt-get install" in rest]
    assert package in install.split()


def test_no_secret_goes_into_it():
    for name in ("ENV", "ARG"):
        for rest in arguments(name):
            assert not re.search(r"(?i)(token|secret|password|key)\w*=", rest)
    assert not re.search(r"(?i)hf_\w{8}|AKIA|--build-arg|ADD http", DOCKERFILE.read_text())


def test_the_build_context_is_the_code_and_no_more():
    ignored = PathSpec.from_lines("gitwildmatch", (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines())

    def sent(path: str) -> bool:
        return not ignored.match_file(path)

    for path in ("pyproject.toml", "README.md", "LICENSE", ".rayignore", "jobs/tscd.py", "serve/config/prod.yaml",
                 "hypersd_ray/embedded/teacher/model_index.json", "evaluation/pictures.py"):  # fmt: skip
        assert (ROOT / path).exists() and sent(path), path
    for path in (".git/config", "runs/x/checkpoint", "data/0.tar", ".venv/bin/python", "cluster/aws.yaml", ".env",
                 "tests/conftest.py", "jobs/__pycache__/tscd.pyc", "models/sdxl/x.safetensors"):  # fmt: skip
        assert not sent(path), path
    copied = [word for rest in arguments("COPY") for word in rest.split() if not word.startswith("--")]
    assert all((ROOT / word).exists() for word in copied)


def test_heads_start_where_the_image_has_the_checkout():
    (folder,) = arguments("WORKDIR")
    for name in ("aws", "gcp"):
        assert f"cd {folder} &&" in (CLUSTER / f"{name}.yaml").read_text()
