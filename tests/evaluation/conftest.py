"""Tiny pipelines, prompts and LoRAs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.models.roles import STUDENT
from tests.helpers.pipelines import CAPTIONS, build_pipeline, randomize, tiny_unet


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """family -> a tiny pipeline folder; not to be written to."""
    root = tmp_path_factory.mktemp("pipelines")
    return {"sd": build_pipeline("sd", root / "sd"), "sdxl": build_pipeline("sdxl", root / "sdxl")}


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    """Six prompts, one of them twice."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*CAPTIONS[:6], CAPTIONS[0], ""]))
    return path


@pytest.fixture
def make_lora(folders, tmp_path) -> Callable[..., Path]:
    """make_lora(family, size, **extra) -> a LoRA file of rank 4 and alpha 2; size 0 leaves B at zero."""

    def make(family: str = "sd", size: float = 0.05, **extra: str) -> Path:
        adapters = Adapters(tiny_unet(family), rank=4, alpha=2.0)
        adapters.add(STUDENT, trainable=False)
        if size:
            randomize(adapters, STUDENT, seed=1, size=size)
        metadata = LoRAMetadata(
            base_model=str(folders[family]), family=read_base(folders[family]).family, k=4, steps=(4, 8),
            scheduler="TCDScheduler", eta=0.0, rank=4, alpha=2.0, extra=extra,
        )  # fmt: skip
        tensors = {name: p.detach() for name, p in adapters.named_tensors(STUDENT).items()}
        return save_diffusers_lora(
            tensors, tmp_path / f"{'-'.join([family, str(size), *extra.values()])}.safetensors", metadata
        )

    return make
