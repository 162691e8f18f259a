"""The stream: every row once an epoch, resumable at any batch, errors reach the consumer."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise, takewhile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypersd_ray.config.data import ActorPool, DataConfig
from hypersd_ray.data.plan import StreamPosition, deal_again
from hypersd_ray.data.precompute import resolve
from hypersd_ray.data.prefetch import Prefetch
from hypersd_ray.data.rejects import TooManyRejectsError
from hypersd_ray.data.stream import LatentStream, cut_pools
from tests.data.data_shards import GOOD_KEYS, png, write_tar


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


def test_other_numbers_of_ranks_read_what_is_left(latents, tiny_model):
    """2 ranks, then 3, then 1: over whole epochs each row as often as any other."""
    config, _ = latents
    urls = resolve(config, tiny_model, "unused").urls
    positions, counts = [StreamPosition()] * 2, Counter()
    for world, takes in ((2, (4, 9)), (3, (2, 0, 5))):
        for rank, count in enumerate(takes):
            taken = take(config, tiny_model, count, rank=rank, world_size=world, position=positions[rank], batch_size=4)
            counts.update(key for batch, _ in taken for key in batch["key"])
            positions[rank] = StreamPosition.from_dict(taken[-1][1].to_dict()) if taken else positions[rank]
        following = {2: 3, 3: 1}[world]
        positions = [
            deal_again(positions, urls, 3, config.shards_per_window, rank, following) for rank in range(following)
        ]
    (last,) = positions
    with open_stream(config, tiny_model, 1, position=last) as stream:
        for batch, position in stream:
            counts.update(batch["key"])
            if position.epoch > last.epoch or (not position.left and position == StreamPosition(last.epoch, 3, 0)):
                break
    assert sorted(counts) == GOOD_KEYS
    assert set(counts.values()) == {last.epoch + 1}


rows_of_shards = st.lists(st.integers(4, 7), min_size=1, max_size=6)


@given(rows=rows_of_shards, worlds=st.lists(st.integers(1, 4), min_size=2, max_size=4), data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_row_is_lost_or_read_twice_whatever_the_numbers_of_ranks(rows, worlds, data):
    """Each change of the number of ranks at any rows of any of them; then all read on to the end of the epoch."""
    urls = [f"s{i}" for i in range(len(rows))]
    per_window, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    kept = DataConfig(shards="x", format="latents", shards_per_window=per_window, shuffle_rows=size)

    def blocks(self, leg):
        for window in self._windows(leg):
            for url in window.urls:
                keys = np.array([f"{url}/{i}" for i in range(rows[int(url[1:])])][window.part :: window.parts])
                if len(keys):
                    yield {"key": keys, "caption": keys, "window": np.full(len(keys), window.index)}

    def read(position, rank, world, count):
        with LatentStream(kept, "", urls, 1, rank, world, 0, position) as stream:
            for batch, after in islice(stream, count):
                counts.update(batch["key"])
                position = after
        return position

    counts, positions, whole = Counter(), [StreamPosition()] * worlds[0], sum(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentStream, "_blocks", blocks)
        for world, following in pairwise([*worlds, 1]):
            for rank in range(world):
                positions[rank] = read(positions[rank], rank, world, data.draw(st.integers(0, 12)))
            positions = [deal_again(positions, urls, 0, per_window, rank, following) for rank in range(following)]
        epoch = positions[0].epoch
        read(positions[0], 0, 1, (epoch + 1) * whole - counts.total())
    assert set(counts.values()) == {epoch + 1} and len(counts) == whole


@pytest.mark.cluster
def test_encoding_while_training_gives_the_precomputed_rows_and_resumes(raw_config, latents, tiny_model):
    config, _ = latents
    raw = take(raw_config, tiny_model, 10)
    # The files of latents sort as their shards do, so both plans are one.
    assert_same(raw, take(config, tiny_model, 10))
    assert_same(
        raw, take(config.model_copy(update={"reader_cpus": 0.0}), tiny_model, 10)
    )  # as where workers hold all cores
    assert_same(take(raw_config, tiny_model, 4, position=raw[5][1]), raw[6:])


@pytest.mark.cluster
def test_errors_reach_the_consumer(ray_cluster, tiny_model, tmp_path):
    members = [m for i in range(8) for m in ((f"{i}.png", png(i) if i < 2 else b"x"), (f"{i}.txt", b"a cat"))]
    path = write_tar(tmp_path / "bad.tar", members)
    bad = DataConfig(shards=str(path), resolution=8, reject_grace=4, encoder=ActorPool(num_cpus=0.5))
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
