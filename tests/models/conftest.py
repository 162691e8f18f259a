"""Tiny pipelines of both families, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pipelines import build_pipeline


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 1.5 pipeline folder; not to be written to."""
    return build_pipeline("sd", tmp_path_factory.mktemp("pipelines") / "tiny-sd15")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline folder; not to be written to."""
    return build_pipeline("sdxl", tmp_path_factory.mktemp("pipelines") / "tiny-sdxl")


@pytest.fixture(scope="session")
def folders(sd_folder, sdxl_folder) -> dict[str, Path]:
    """family -> folder."""
    return {"sd": sd_folder, "sdxl": sdxl_folder}
