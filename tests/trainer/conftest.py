"""One Ray for the module, a micro pipeline, and its latents: 3 shards of 8 rows at 64 pixels."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_ray.config.tscd import TSCDConfig
from tests.helpers.pipelines import CAPTIONS, build_pipeline
from tests.helpers.rays import own_ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray of 4 CPUs, with its dashboard for the sweeps; -> the environment in which a driver of another process joins it."""
    import ray

    # Ray Train's controller looks for new checkpoints this often; what is killed before it looks starts further back.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    temporary = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short: a socket's path has at most 107 characters
    with own_ray(dashboard=True, _temp_dir=temporary):
        yield os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    shutil.rmtree(temporary, ignore_errors=True)
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]


@pytest.fixture(scope="package")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion pipeline folder with the micro UNet. Not to be written to."""
    return build_pipeline("sd", tmp_path_factory.mktemp("teacher") / "micro", micro=True)


@pytest.fixture(scope="package")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 tars of 8 rows, noise at 64 pixels."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(3):
        with tarfile.open(folder / f"{s:05d}.tar", "w") as tar:
            for i in range(8):
                picture = io.BytesIO()
                pixels = np.random.default_rng(100 * s + i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(picture, "PNG")
                for suffix, data in (("png", picture.getvalue()), ("txt", CAPTIONS[(s + i) % len(CAPTIONS)].encode())):
                    info = tarfile.TarInfo(f"{s}-{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="package")
def latents(cluster, shards: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards` encoded. Not to be written to."""
    from hypersd_ray.data.precompute import precompute

    out = tmp_path_factory.mktemp("latents")
    made = precompute(data_config(shards), str(teacher), str(out))
    assert (made.rows, made.rejects) == (24, {})
    return out


def data_config(shards: Path) -> Any:
    """Windows of one shard and pools of 5 rows: every position of a stream is somewhere in the middle."""
    from hypersd_ray.config.data import ActorPool, DataConfig

    pool = ActorPool(batch_size=8, num_cpus=0.5)
    return DataConfig(shards=str(shards), resolution=64, encoder=pool, shards_per_window=1, shuffle_rows=5)


@pytest.fixture
def make_config(teacher: Path, latents: Path, tmp_path: Path) -> Callable[..., TSCDConfig]:
    """make_config(name, section={...}): two stages (k = 2, 1), adversarial in the second, 4 images a step."""

    def make(name: str, shards: Path | None = None, **overrides: Any) -> TSCDConfig:
        values: dict[str, Any] = {
            "teacher": str(teacher),
            "data": data_config(shards or latents),
            "distill": {"k_list": (2, 1), "n_list": (8, 8), "steps_list": (20, 10)},
            "adversarial": {"adv_end": 0.1, "mse_end": 0.5, "warmup_share": 0.2},
            "lora": {"rank": 4},
            "optim": {"lr": 1e-3, "batch": 4, "warmup": 3},
            "run": {"name": name, "out": str(tmp_path / "runs"), "checkpoint_every": 3, "log_every": 1,
                    "prompts": ("a drawn panda on a pink background",)},
        }  # fmt: skip
        for section, value in overrides.items():
            values[section] = values.get(section, {}) | value if isinstance(value, dict) else value
        return TSCDConfig.model_validate(values)

    return make
