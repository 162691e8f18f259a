"""What `ray job submit --working-dir .` uploads, packed by Ray's own function: all that jobs need, and little else."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package, get_excludes_from_ignore_files

ROOT = Path(__file__).parents[2]
MIB = 2**20
CODE, ALL = 2 * MIB, 80 * MIB
"""Limits of the upload without and with the embedded model and data. Ray refuses more than 512 MiB."""
NEEDED = ("hypersd_ray", "jobs", "evaluation", "serve", "pyproject.toml")


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Name -> bytes of each file that is uploaded."""
    package = tmp_path_factory.mktemp("upload") / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        return {entry.filename: entry.compress_size for entry in archive.infolist()}


def test_the_upload_is_small(upload):
    embedded = sum(size for name, size in upload.items() if name.startswith("hypersd_ray/embedded/"))
    whole = sum(upload.values())
    assert whole - embedded < CODE, sorted(upload.items(), key=lambda item: -item[1])[:10]
    assert whole < ALL, f"{whole / MIB:.0f} MiB"


def test_the_upload_has_every_committed_file_that_jobs_need(upload):
    command = ["git", "ls-files", "-z", *NEEDED]
    committed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    needed = {name for name in committed if name and (ROOT / name).is_file()}
    assert len(needed) > 100
    assert not needed - upload.keys()


@pytest.mark.parametrize(
    "path",
    [".git", ".git/objects/00/ab", "runs/sdxl/checkpoint_00000500/weights.safetensors", "data/00000.tar",
     "models/sdxl/unet/diffusion_pytorch_model.safetensors", "tests/conftest.py", "docs/tiny-grid.png", "cluster/aws.yaml",
     "build/lib/x.py", "node_modules/x/index.js", ".venv/bin/python", ".venv-cuda/bin/python", "wandb/run-1/x.wandb",
     "jobs/__pycache__/tscd.cpython-311.pyc", ".pytest_cache/v/x", ".mypy_cache/x.json"],
)  # fmt: skip
def test_what_lies_in_a_checkout_beside_the_code_stays_there(path):
    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    assert any(ignores(ROOT / path) for ignores in ignored)
