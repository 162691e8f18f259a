"""Segments and sampled times: the properties every k | N must have, and why Eq. 13 is not taken literally."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypersd_ray.diffusion.segments import check_grid, edges, grid, sample_times, segment_start

RULES = ["uniform", "segment_start", "previous", "two_steps"]


@st.composite
def grids(draw):
    """(T, N, k) with k | N <= T."""
    T = draw(st.integers(1, 1000))
    k = draw(st.integers(1, min(T, 40)))
    return T, k * draw(st.integers(1, T // k)), k


@settings(max_examples=150, deadline=None)
@given(grids(), st.sampled_from(RULES), st.integers(0, 2**31))
def test_sampled_times_keep_their_order(tnk, rule, seed):
    T, N, k = tnk
    check_grid(T, N, k)
    points, cuts = grid(T, N), edges(T, k)
    assert len(set(points)) == N + 1 and len(set(cuts)) == k + 1 and set(cuts) <= set(points)
    times = sample_times(64, T, N, k, rule, torch.Generator().manual_seed(seed), "cpu")
    rows = zip(times.t_n.tolist(), times.t_prev.tolist(), times.t_end.tolist(), times.t_b.tolist(), strict=True)
    for t_n, t_prev, t_end, t_b in rows:
        assert 0 <= t_b <= t_end <= t_prev < t_n <= T
        assert t_b in cuts and t_n <= cuts[cuts.index(t_b) + 1]  # left-open: t_n in (t_b, t_b + T/k], up to rounding
        assert t_n - t_b <= T / k + 1
        n = points.index(t_n)
        assert t_prev == points[n - 1]
        if rule == "segment_start":
            assert t_end == t_b
        if rule == "previous":
            assert t_end == t_prev
        if rule == "two_steps":
            assert t_end == max(points[max(n - 2, 0)], t_b)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.data())
def test_segments_partition_the_times(T, data):
    k = data.draw(st.integers(1, T))
    cuts = edges(T, k)
    t_b = segment_start(torch.arange(1, T + 1), T, k).tolist()
    expected = [low for low, high in zip(cuts, cuts[1:], strict=False) for _ in range(high - low)]
    assert t_b == expected


def test_edges_of_the_paper():
    assert edges(1000, 8) == [0, 125, 250, 375, 500, 625, 750, 875, 1000]
    assert edges(1000, 3) == [0, 333, 667, 1000]
    t_n = torch.tensor([1, 125, 126, 1000])
    assert segment_start(t_n, 1000, 8).tolist() == [0, 0, 125, 875]


@pytest.mark.parametrize("k, reversed_starts", [(8, 8), (4, 4), (2, 2), (1, 1)])
def test_the_printed_formula_leaves_starts_without_an_interval(k, reversed_starts):
    """Why we deviate: T = 1000, s = 20, so 50 starts 20..1000; [t_b, t_n - s] of Eq. 13 as printed is reversed for k
    of them, the first grid point at or above each edge (k = 8: 140, 260, 380, 500, 640, 760, 880, 1000)."""
    T, s = 1000, 20
    starts = range(s, T + 1, s)
    width = math.ceil(T / k)
    bad = [t for t in starts if t // width * width > t - s]
    assert len(starts) == 50 and len(bad) == reversed_starts
    assert T in bad
    ours = segment_start(torch.tensor(list(starts)), T, k)
    # ours on the same starts: an interval always exists once the solver stops at the edge, t_prev = max(t_n - s, t_b)
    assert (ours < torch.tensor(list(starts))).all()


def test_starts_are_covered_uniformly():
    N = 48
    times = sample_times(48_000, 1000, N, 8, "uniform", torch.Generator().manual_seed(0), "cpu")
    counts = torch.bincount(torch.bucketize(times.t_n, torch.tensor(grid(1000, N))), minlength=N + 1)
    assert counts[0] == 0 and counts[1:].min() > 0
    # chi squared with 47 degrees of freedom: mean 47, deviation sqrt(94) = 9.7
    chi2 = ((counts[1:] - 1000) ** 2 / 1000).sum().item()
    assert 47 - 4 * 9.7 < chi2 < 47 + 4 * 9.7


def test_uniform_ends_reach_both_ends_evenly():
    # T = 12, N = 4, k = 1: t_n = 12 has t_prev = 9, so t_end is one of 0..9, each with probability 1/10
    times = sample_times(40_000, 12, 4, 1, "uniform", torch.Generator().manual_seed(0), "cpu")
    ends = times.t_end[times.t_n == 12]
    frequency = torch.bincount(ends, minlength=10) / len(ends)
    assert len(frequency) == 10
    # about 10000 draws: deviation sqrt(0.1 * 0.9 / 10000) = 0.003
    assert (frequency - 0.1).abs().max() < 4 * 0.003


def test_same_seed_same_times():
    draws = [sample_times(32, 1000, 48, 4, "uniform", torch.Generator().manual_seed(s), "cpu") for s in (3, 3, 4)]
    assert torch.equal(draws[0].t_n, draws[1].t_n) and torch.equal(draws[0].t_end, draws[1].t_end)
    assert not torch.equal(draws[0].t_n, draws[2].t_n)


@pytest.mark.parametrize(
    "T, N, k, nearest",
    [(1000, 50, 8, 48), (1000, 55, 8, 56), (1000, 3, 8, 8), (1000, 1003, 8, 1000), (1000, 999, 7, 994), (10, 0, 2, 2)],
)
def test_refused_grids_name_the_nearest(T, N, k, nearest):
    with pytest.raises(ValueError) as error:
        check_grid(T, N, k)
    message = str(error.value)
    assert f"N={N}" in message and f"is {nearest}" in message and "\n" not in message
    check_grid(T, nearest, k)


def test_other_refusals():
    with pytest.raises(ValueError, match="k=11"):
        check_grid(10, 10, 11)
    with pytest.raises(ValueError, match="k=0"):
        edges(10, 0)
    with pytest.raises(ValueError, match="N=11"):
        grid(10, 11)
    with pytest.raises(ValueError, match="'random'"):
        sample_times(2, 10, 4, 2, "random", torch.Generator(), "cpu")
