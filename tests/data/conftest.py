"""Shards with flaws, a tiny real diffusers pipeline with random weights, one small Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hypersd_ray.config.data import ActorPool, DataConfig
from hypersd_ray.data.precompute import Summary, precompute
from tests.data.data_shards import WORDS, row, write_tar
from tests.helpers.rays import own_ray


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 6 tars of 12 rows; of 00004 the first image is broken, 00005 is no tar at all."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(6):
        write_tar(folder / f"{s:05d}.tar", [m for i in range(12) for m in row(f"{s}-{i}", 100 * s + i)])
    broken = folder / "00004.tar"
    broken.write_bytes(broken.read_bytes().replace(b"IHDR", b"XXXX", 1))
    (folder / "00005.tar").write_bytes(b"no tar " * 300)
    return str(folder)


@pytest.fixture(scope="session")
def raw_config(shards: str) -> DataConfig:
    """`shards` read in windows of 2 shards and pools of 10 rows, encoded 5 at a time."""
    pool = ActorPool(batch_size=5, num_cpus=0.5)
    return DataConfig(shards=shards, resolution=8, encoder=pool, shards_per_window=2, shuffle_rows=10)


@pytest.fixture(scope="package")
def latents(
    ray_cluster: None, raw_config: DataConfig, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DataConfig, Summary]:
    """`raw_config` that reads its precomputed latents, and what precomputing returned. Do not write into them."""
    out = str(tmp_path_factory.mktemp("latents"))
    made = precompute(raw_config, tiny_model, out)
    return raw_config.model_copy(update={"shards": out}), made


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """One Ray for all tests of this folder."""
    with own_ray():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Stable Diffusion pipeline folder with random weights: 8x8 pixels a latent's 4x4, D = 16, L = 8."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    vae.save_pretrained(root / "vae")
    vocabulary = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)])}
    (root / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=8)
    tokenizer.save_pretrained(root / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(root / "text_encoder")
    for name, content in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
        "unet/config.json": {"in_channels": 4},
    }.items():  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return str(root)
