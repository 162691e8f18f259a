"""Precomputing: what is written, resuming, and whose latents they are."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hypersd_ray.config.base import ConfigError
from hypersd_ray.data.images import crop_square
from hypersd_ray.data.precompute import fingerprint, precompute, resolve
from tests.data.data_shards import png


def test_files_marker_and_rejects(latents):
    config, made = latents
    out = Path(config.shards)
    assert (made.shards, made.shards_skipped, made.rows, made.seen) == (6, 0, 59, 72), "12 of the lost shard"
    assert made.rejects == {"unreadable_shard": 12, "broken_image": 1}
    marker = json.loads((out / "latents.json").read_text())
    assert marker["complete"]
    assert marker["rows"] == 59
    assert marker["columns"] == {"latents": [4, 4, 4], "prompt_embeds": [8, 16]}
    assert list(marker["files"].values()) == [12, 12, 12, 12, 11, 0]
    assert sorted(p.name for p in out.iterdir()) == sorted([*marker["files"], "latents.json", "rejects.jsonl"])
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(r["reason"], r["key"]) for r in listed} == {("unreadable_shard", ""), ("broken_image", "4-0")}


def test_latents_are_what_the_encoders_give(latents, tiny_model):
    from hypersd_ray.models.encoders import load_encoders

    config, _ = latents
    table = pq.read_table(next(Path(config.shards).glob("00000-*")))
    assert table.column("key").to_pylist() == [f"0-{i}" for i in range(12)]
    pixels = np.stack([crop_square(Image.open(io.BytesIO(png(i))), 8)[0] for i in range(12)])
    encoders = load_encoders(tiny_model, torch.float32, "cpu")
    for name, expected in (
        ("latents", encoders.encode_images(torch.from_numpy(pixels))),
        ("prompt_embeds", encoders.encode_prompts(table.column("caption").to_pylist()).prompt_embeds),
    ):
        got = torch.from_numpy(table.column(name).combine_chunks().to_numpy_ndarray().copy())
        torch.testing.assert_close(got.float(), expected, atol=2e-3, rtol=2e-3)


def test_a_precomputed_folder_is_not_made_again(raw_config, latents, tiny_model):
    config, made = latents
    idle = precompute(raw_config, tiny_model, config.shards)
    assert (idle.shards_skipped, idle.rows_per_s) == (6, 0)
    assert (idle.rows, idle.seen, idle.rejects) == (made.rows, made.seen, made.rejects)
    disk = raw_config.model_copy(update={"cache": "disk", "cache_dir": config.shards})
    sources = resolve(disk, tiny_model, "unused")
    assert sources == resolve(config, tiny_model, "unused")
    assert (sources.format, len(sources.urls)) == ("latents", 6)


def test_latents_of_another_model_or_resolution_are_refused(raw_config, latents, tiny_model, tmp_path):
    config, _ = latents
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert fingerprint(str(other)) == fingerprint(tiny_model)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match="its latents were made by"):
        resolve(config, str(other), "unused")
    with pytest.raises(ConfigError, match="its latents were made by"):
        precompute(raw_config, str(other), config.shards)
    with pytest.raises(ConfigError, match="made with resolution=8, this run has resolution=16"):
        precompute(raw_config.model_copy(update={"resolution": 16}), tiny_model, config.shards)
    with pytest.raises(ConfigError, match="has no vae/ and text_encoder/"):
        resolve(config, str(tmp_path / "nowhere"), "unused")
    with pytest.raises(ConfigError, match="holds latents already"):
        precompute(config, tiny_model, str(tmp_path / "x"))


@pytest.mark.cluster
def test_resumes_behind_the_last_whole_file(raw_config, latents, tiny_model, tmp_path):
    config, whole = latents
    before = {p.name: p.read_bytes() for p in Path(config.shards).iterdir()}
    out = tmp_path / "out"
    shutil.copytree(config.shards, out)
    # As a kill leaves it: two files are not whole, the marker says so.
    for number in ("00001", "00004"):
        file = next(out.glob(f"{number}-*"))
        file.rename(f"{file}.part")
    marker = json.loads(before["latents.json"])
    (out / "latents.json").write_text(json.dumps({**marker, "complete": False}))
    with pytest.raises(ConfigError, match=r"not complete: run jobs/precompute.py"):
        resolve(config.model_copy(update={"shards": str(out)}), tiny_model, "unused")
    again = precompute(raw_config, tiny_model, str(out))
    assert again.shards_skipped == 4
    assert (again.rows, again.seen, again.rejects) == (whole.rows, whole.seen, whole.rejects)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    marker = (out / "latents.json").stat()
    assert precompute(raw_config, tiny_model, str(out)).shards_skipped == 6
    assert (out / "latents.json").stat() == marker, "runs that share latents do not write it under each other"
