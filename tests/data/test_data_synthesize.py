"""Synthesised shards: read by the stream, the same whatever the batch, resumed, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.synthesize import SynthesizeConfig
from hypersd_ray.data.synthesize import ShardMaker, image_seed, read_prompts, synthesize
from tests.helpers.pipelines import build_pipeline

PROMPTS = ["a drawn panda", "a red apple", "a bicycle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_pipeline("sd", tmp_path_factory.mktemp("model") / "micro", micro=True)


@pytest.fixture
def config(model, tmp_path) -> SynthesizeConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, "  ", ""]))
    return SynthesizeConfig(
        model=str(model), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "out"), images_per_prompt=2,
        steps=2, guidance=3.0, per_shard=4, pool=ActorPool(batch_size=2, num_cpus=0.5),
    )  # fmt: skip


def images(folder: Path) -> dict[str, tuple[np.ndarray, str, dict]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {
        key: (np.asarray(Image.open(io.BytesIO(m["png"]))), m["txt"].decode(), json.loads(m["json"]))
        for key, m in found.items()
    }


@pytest.mark.cluster
def test_shards_come_out_and_a_second_run_makes_what_is_missing(ray_cluster, config):
    made = synthesize(config)
    assert (made.shards, made.shards_skipped, made.images) == (2, 0, 6)
    first = images(Path(config.out))
    assert [text for _, text, _ in first.values()] == [p for p in PROMPTS for _ in range(2)]
    pictures = [picture for picture, _, _ in first.values()]
    assert not np.array_equal(pictures[0], pictures[1]), "two images of a prompt differ"
    (Path(config.out) / "00001.tar").unlink()
    again = synthesize(config)
    assert (again.shards, again.shards_skipped, again.images) == (2, 1, 2)
    second = images(Path(config.out))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key][0], second[key][0]) for key in first)
    with pytest.raises(ConfigError, match=r"holds images made with steps=2, not 3: name another folder"):
        synthesize(config.model_copy(update={"steps": 3}))

    from hypersd_ray.config.data import DataConfig
    from hypersd_ray.data.precompute import precompute

    data = DataConfig(shards=f"{config.out}/*.tar", resolution=64, encoder=ActorPool(batch_size=8, num_cpus=0.5))
    encoded = precompute(data, config.model, f"{config.out}-latents")
    assert (encoded.rows, encoded.rejects) == (6, {})


def test_an_image_does_not_depend_on_its_batch(config):
    told = [(prompt, 0) for prompt in PROMPTS]
    whole = ShardMaker(config.model_dump())._generate(told)
    alone = ShardMaker(config.model_dump())._generate(told[1:2])
    difference = np.asarray(whole[1][0]).astype(int) - np.asarray(alone[0][0]).astype(int)
    assert np.abs(difference).max() <= 1
    assert whole[1][1]["seed"] == image_seed(0, PROMPTS[1], 0) != image_seed(0, PROMPTS[1], 1)


def test_prompts_that_cannot_be_read_are_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["a", None, "b"], "url": ["x", "y", "z"]}), tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet")) == ["a", "b"]
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, said in (
        ("b.parquet", "has the columns url"), ("latin.txt", "cannot be read"), ("empty.txt", "holds no prompt"),
        ("gone.txt", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said) as caught:
            read_prompts(str(tmp_path / name))
        assert "\n" not in str(caught.value)
