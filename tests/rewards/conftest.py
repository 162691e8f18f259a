"""Small networks of the published classes, and pictures with edges and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.models.rewards.clip import CONFIG, WEIGHTS

SMALL_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 1215, "width": 32, "heads": 4, "layers": 2},
    "quick_gelu": True,
}


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """(8, 3, 32, 32) float in [0, 1], of the embedded world."""
    return load_pictures(paths.DATA, "val")[0][:8].float() / 255


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A small random CLIP in open_clip's layout, with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("evaluators") / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL_CLIP)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": SMALL_CLIP}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((paths.TEACHER / "tokenizer" / name).read_bytes())
    return folder
