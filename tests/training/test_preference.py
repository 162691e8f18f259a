"""Preference training: column names, splits, the order of pairs, learning, resuming."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.preference import PreferenceConfig, PreferencePairsConfig
from hypersd_ray.config.run import OptimConfig
from hypersd_ray.data.preferences import PairStream, Position, held_out_pairs, is_held_out, open_batch, read_pairs
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.preferences import write_taste
from hypersd_ray.embedded.pretrain_preference import new_image_reward
from hypersd_ray.models.rewards.image_reward import load_image_reward, save_image_reward
from hypersd_ray.training.preference import PreferenceTraining, freeze_bottom, pairwise_accuracy
from tests.helpers.distil import InMemory, same, snapshot


def png(grey: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(data, "PNG")
    return data.getvalue()


def grey_of(picture) -> int:
    return round(
        open_batch([type("P", (), {"prompt": "", "chosen": picture, "rejected": picture})], 8).chosen.mean().item()
        * 255
    )


def test_pick_a_pic(tmp_path):
    rows = {
        "caption": ["a", "b", "c", "d"], "jpg_0": [png(10), png(20), png(30), png(40)],
        "jpg_1": [png(11), png(21), png(31), png(41)], "label_0": [1.0, 0.0, 0.5, 1.0],
        "has_label": [True, True, True, False],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    pairs = read_pairs(str(tmp_path / "p.parquet"))
    assert [(p.prompt, grey_of(p.chosen), grey_of(p.rejected)) for p in pairs] == [("a", 10, 11), ("b", 21, 20)]


def test_image_reward_db(tmp_path):
    """Ranks 1, 2, 2 of one prompt make two pairs; pictures lie beside the file."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(50 + i))
    rows = [{"prompt_id": "x", "prompt": "a", "rank": r, "image_path": f"{i}.png"} for i, r in enumerate((2, 1, 2))]
    rows.append({"prompt_id": "y", "prompt": "b", "rank": 1, "image_path": "3.png"})
    (tmp_path / "p.json").write_text(json.dumps(rows))
    pairs = read_pairs(str(tmp_path / "p.json"))
    assert [(p.prompt, grey_of(p.chosen), grey_of(p.rejected)) for p in pairs] == [("a", 51, 50), ("a", 51, 52)]


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ConfigError, match=r"has the columns text; known are \(prompt, chosen, rejected\)"):
        read_pairs(str(tmp_path / "p.jsonl"))
    (tmp_path / "p.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"p\.parquet cannot be read"):
        read_pairs(str(tmp_path / "p.parquet"))
    with pytest.raises(ConfigError, match="nothing matches"):
        held_out_pairs(PreferencePairsConfig(train=(str(tmp_path / "q*"),)), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 and 80 pairs of the embedded world, and an untrained model."""
    out = tmp_path_factory.mktemp("reward")
    for split, count in (("train", 420), ("val", 110)):
        images, captions = load_pictures(paths.DATA, split)
        write_taste(images[:count], captions[:count], out / f"{split}.parquet", len(split))
    save_image_reward(new_image_reward(paths.TEACHER), out / "start")
    return out


def make_config(folder, **changes) -> PreferenceConfig:
    pairs = PreferencePairsConfig(
        train=(str(folder / "train.parquet"),), held_out=(str(folder / "val.parquet"),), resolution=32
    )
    settings = dict(
        pairs=pairs, init=str(folder / "start"), freeze=0.0, steps=60,
        optim=OptimConfig(lr=1e-3, batch=16, warmup=5),
    )  # fmt: skip
    return PreferenceConfig(**settings | changes)


def test_pairs_of_two_ranks_are_an_epochs_and_resume(folder):
    config = make_config(folder).pairs
    streams = [PairStream(config, 8, rank, 2, seed=3) for rank in (0, 1)]
    seen = [[next(s) for _ in range(4)] for s in streams]
    alone = PairStream(config, 16, 0, 1, seed=3)
    together, _ = next(alone)
    # the whole world's first 16 pairs, dealt in turn
    assert together.prompts[0::2] == seen[0][0][0].prompts and together.prompts[1::2] == seen[1][0][0].prompts
    again, _ = next(PairStream(config, 8, 0, 2, 3, Position(0, 2)))
    assert torch.equal(again.chosen, seen[0][2][0].chosen) and seen[0][2][1] == Position(0, 3)


def test_prompts_are_on_one_side_only(folder):
    config = PreferencePairsConfig(train=(str(folder / "train.parquet"),), held_out_share=0.3)
    aside = {p.prompt for p in held_out_pairs(config, 10_000)}
    every = [p.prompt for p in read_pairs(config.train[0])]
    assert 0.15 < sum(is_held_out(p, 0.3) for p in every) / len(every) < 0.45
    stream = PairStream(config, 8, 0, 1, 0)
    taken = {prompt for _ in range(10) for prompt in next(stream)[0].prompts}
    assert aside and not aside & taken


def test_it_learns_what_is_preferred(folder):
    """110 steps on the same 16 pairs: from log 2 to knowing them."""
    config = make_config(folder, optim=OptimConfig(lr=5e-4, batch=16, warmup=5))
    training = PreferenceTraining(config, load_image_reward(config.init))
    batch, _ = next(PairStream(config.pairs, 16, 0, 1, 0))
    losses = [float(training.step(batch)["loss"]) for _ in range(110)]
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)  # nothing is known yet
    assert np.mean(losses[-10:]) < 0.3
    hits = pairwise_accuracy(training.model, [batch])
    assert hits.shape == (16,) and hits.mean() > 0.8


def test_resuming_gives_the_same_weights(folder):
    config = make_config(folder, optim=OptimConfig(lr=1e-3, batch=8, accumulation=2))
    batches = [next(s)[0] for s in [PairStream(config.pairs, 8, 0, 1, 0)] for _ in range(3)]
    straight = PreferenceTraining(config, load_image_reward(config.init))
    for batch in batches:
        straight.step(batch)
    first = PreferenceTraining(config, load_image_reward(config.init))
    for batch in batches[:2]:
        first.step(batch)
    kept = InMemory(first)
    second = PreferenceTraining(config, load_image_reward(config.init))
    kept.into(second)
    second.step(batches[2])
    assert same(snapshot(second), snapshot(straight))


def test_freezing(folder):
    model = load_image_reward(str(folder / "start"))
    everything = len(freeze_bottom(model, 0.0))
    half = freeze_bottom(model, 0.5)
    assert 0 < len(half) < everything
    assert not model.vision.encoder.layers[1].self_attn.qkv.weight.requires_grad
    assert model.vision.encoder.layers[2].self_attn.qkv.weight.requires_grad
    assert not model.text.embeddings.word_embeddings.weight.requires_grad and model.head.layers[0].weight.requires_grad
