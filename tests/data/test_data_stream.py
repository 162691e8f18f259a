"""The stream: every row once an epoch, resumable at any batch, errors reach the consumer."""

from __future__ import annotations

from itertools import islice, takewhile

import numpy as np
import pytest
import torch
from data_shards import GOOD_KEYS, png, write_tar

from hypersd_ray.config.data import DataConfig, EncoderPool
from hypersd_ray.data.plan import StreamPosition
from hypersd_ray.data.precompute import resolve
from hypersd_ray.data.prefetch import Prefetch
from hypersd_ray.data.rejects import TooManyRejectsError
from hypersd_ray.data.stream import LatentStream, cut_pools


def open_stream(config, model, batch_size=8, rank=0, world_size=1, position=None, seed=3):
    urls = resolve(config, model, "unused").urls
    return LatentStream(config, model, urls, batch_size, rank, world_size, seed, position or StreamPosition())


def take(config, model, count, **options):
    """The first `count` (batch, position)."""
    with open_stream(config, model, **options) as stream:
        return list(islice(stream, count))


def assert_same(got, expected):
    for (a, position_a), (b, position_b) in zip(got, expected, strict=True):
        assert (a["key"], a["caption"], position_a) == (b["key"], b["caption"], position_b)
        assert torch.equal(a["latents"], b["latents"])
        assert torch.equal(a["prompt_embeds"], b["prompt_embeds"])


def test_batches_carry_every_row_once_an_epoch(latents, tiny_model):
    config, _ = latents
    batches = take(config, tiny_model, 16)  # 59 rows an epoch
    first, _ = batches[0]
    assert first["latents"].shape == (8, 4, 4, 4)
    assert first["prompt_embeds"].shape == (8, 8, 16)
    assert first["latents"].dtype == first["prompt_embeds"].dtype == torch.float16
    keys = [key for batch, _ in batches for key in batch["key"]]
    assert sorted(keys[:59]) == sorted(keys[59:118]) == GOOD_KEYS
    assert keys[:59] != keys[59:118]


def test_resuming_anywhere_gives_the_unbroken_stream(latents, tiny_model):
    config, _ = latents
    unbroken = take(config, tiny_model, 20)
    for after in (0, 5, 6, 7):
        position = StreamPosition.from_dict(unbroken[after][1].to_dict())
        assert_same(take(config, tiny_model, 19 - after, position=position), unbroken[after + 1 :])


def test_a_window_that_is_used_up_is_not_read_again(latents, tiny_model):
    config, _ = latents
    positions = [position for _, position in take(config, tiny_model, 59, batch_size=1)]
    assert positions[0] == StreamPosition(0, 0, 1)
    assert [p.window for p in positions if p.row == 0] == [1, 2, 3]


@pytest.mark.parametrize("world", [2, 7])
def test_ranks_share_an_epochs_rows(latents, tiny_model, world):
    # 6 shards: 2 ranks take 3 whole shards each, of 7 ranks each takes every 7th row of each shard.
    config, _ = latents
    keys = []
    for rank in range(world):
        with open_stream(config, tiny_model, 1, rank, world) as stream:
            last_of_epoch = StreamPosition(0, 2 if world == 2 else 3, 0)
            epoch = takewhile(lambda item: item[1].epoch == 0, stream)
            for batch, position in epoch:
                keys += batch["key"]
                if position == last_of_epoch:
                    break
    assert sorted(keys) == GOOD_KEYS


@pytest.mark.cluster
def test_encoding_while_training_gives_the_precomputed_rows_and_resumes(raw_config, latents, tiny_model):
    config, _ = latents
    raw = take(raw_config, tiny_model, 10)
    # The files of latents sort as their shards do, so both plans are one.
    assert_same(raw, take(config, tiny_model, 10))
    assert_same(take(raw_config, tiny_model, 4, position=raw[5][1]), raw[6:])


@pytest.mark.cluster
def test_errors_reach_the_consumer(ray_cluster, tiny_model, tmp_path):
    members = [m for i in range(8) for m in ((f"{i}.png", png(i) if i < 2 else b"x"), (f"{i}.txt", b"a cat"))]
    path = write_tar(tmp_path / "bad.tar", members)
    bad = DataConfig(shards=str(path), resolution=8, reject_grace=4, encoder=EncoderPool(num_cpus=0.5))
    with pytest.raises(TooManyRejectsError, match=r"6 of 8 rows rejected \(75%\).*data.max_reject_share=0.5"):
        take(bad, tiny_model, 1)
    path = write_tar(tmp_path / "none.tar", [("0.txt", b"a cat")])
    none = bad.model_copy(update={"shards": str(path), "reject_grace": 200})
    with pytest.raises(ValueError, match=r"no row for rank 0 of 1 in 1 shards .*missing_image"):
        take(none, tiny_model, 1)


def test_pools_do_not_cross_windows_and_know_the_last():
    rows = {"window": np.array([0] * 7 + [2] * 4 + [3]), "key": np.arange(12)}
    for size in (1, 3, 4, 7, 20):
        for cuts in ([], [5], [7], [3, 4, 11]):
            pieces = zip(*(np.split(column, cuts) for column in rows.values()), strict=True)
            got = list(cut_pools([dict(zip(rows, piece, strict=True)) for piece in pieces], size))
            assert np.concatenate([p.columns["key"] for p in got]).tolist() == list(range(12))
            assert [p.window for p in got if p.last] == [0, 2, 3]
            assert all(len(p) == size for p in got if not p.last)
            assert all(p.start == p.number * size for p in got)


def test_prefetch_runs_ahead_only_so_far_passes_errors_on_and_closes():
    made = []

    def source():
        for i in range(9):
            made.append(i)
            yield i
        raise KeyError("end")

    ahead = Prefetch(source(), 2, "test")
    assert next(ahead) == 0
    assert len(made) <= 3
    assert list(islice(ahead, 8)) == list(range(1, 9))
    for _ in range(2):
        with pytest.raises(KeyError):
            next(ahead)
    endless = Prefetch(iter(int, 1), 2, "test")
    endless.close()
    endless.close()
    assert not endless._thread.is_alive()
    assert len(list(islice(endless, 9))) <= 2
