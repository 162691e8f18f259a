"""The plan is a function: each row once an epoch over all ranks, the same on every call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd_ray.data.plan import StreamPosition, row_order, windows

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@given(shards=sizes, world=sizes, per_window=sizes, rows=st.integers(9, 20), seed=seeds, epoch=st.integers(0, 5))
def test_each_row_once_over_all_ranks_and_no_rank_starves(shards, world, per_window, rows, seed, epoch):
    urls = [f"s{i}" for i in range(shards)]
    read = []
    for rank in range(world):
        mine = [
            (url, i)
            for window in windows(urls, seed, epoch, per_window, rank, world)
            for url in window.urls
            for i in range(rows)[window.part :: window.parts]
        ]
        assert mine
        read += mine
    assert sorted(read) == [(url, i) for url in urls for i in range(rows)]


@given(shards=sizes, world=sizes, per_window=sizes, seed=seeds, epoch=st.integers(0, 5))
def test_windows_are_stateless_numbered_and_bounded(shards, world, per_window, seed, epoch):
    urls = [f"s{i}" for i in range(shards)]
    once = windows(urls, seed, epoch, per_window, 0, world)
    windows(urls, seed, epoch + 1, per_window, 0, world)
    assert windows(urls, seed, epoch, per_window, 0, world) == once
    assert [w.index for w in once] == list(range(len(once)))
    assert all(1 <= len(w.urls) <= per_window for w in once)


def test_epochs_and_seeds_differ():
    urls = [f"s{i}" for i in range(20)]
    orders = [windows(urls, seed, epoch, 20)[0].urls for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3


@given(rows=st.integers(0, 100), pool=sizes, seed=seeds)
def test_row_order_is_a_stateless_permutation(rows, pool, seed):
    order = row_order(rows, seed, 1, 2, pool)
    assert sorted(order) == list(range(rows))
    np.testing.assert_array_equal(order, row_order(rows, seed, 1, 2, pool))


def test_position_survives_json_and_bad_ranks_are_named():
    position = StreamPosition(3, 2, 1)
    assert StreamPosition.from_dict(position.to_dict()) == position
    with pytest.raises(ValueError, match=r"rank=2 is not in 0\.\.1"):
        windows(["a"], 0, 0, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="no shards"):
        windows([], 0, 0, 1)
