"""Intervals on data whose mean is known."""

from __future__ import annotations

import pytest
import torch

from evaluation.bootstrap import Interval, bootstrap_interval, paired_difference, percentiles, resample_counts
from evaluation.harness.measures import Values


def test_coverage_on_normal_data():
    generator = torch.Generator().manual_seed(0)
    trials, n = 400, 60
    hits = 0
    for trial in range(trials):
        values = 3.0 + 2.0 * torch.randn(n, generator=generator)
        interval = bootstrap_interval(values, resamples=400, seed=trial)
        hits += interval.low <= 3.0 <= interval.high
    # The percentile bootstrap's share at n = 60 is near sqrt((n - 1) / n) * 1.96 = 1.94 standard errors: 0.943, and
    # 400 trials know it to sqrt(0.95 * 0.05 / 400) = 0.011.
    assert hits / trials == pytest.approx(0.943, abs=0.033)


@pytest.mark.parametrize(("of_a", "of_b"), [(3, 1), (3, 3)])
def test_coverage_of_a_mean_over_few_trainings(of_a, of_b):
    """Differences of two models, each of a few trainings that differ by more than prompts do."""
    generator, trials, n, hits = torch.Generator().manual_seed(1), 400, 60, 0
    for trial in range(trials):
        prompts = torch.randn(n, generator=generator, dtype=torch.float64)
        a = prompts + torch.randn(of_a, 1, generator=generator) + 0.1 * torch.randn(of_a, n, generator=generator)
        b = (
            prompts
            + (torch.randn(of_b, 1, generator=generator) if of_b > 1 else torch.zeros(1, 1))
            + torch.zeros(of_b, n)
        )
        gap = Values(a).minus(Values(b), 400, trial)
        hits += gap.low <= 0 <= gap.high
    # Exact where one side has a spread; the difference of two t's holds the truth somewhat more often than it says.
    assert 0.92 <= hits / trials <= (0.98 if of_b == 1 else 1.0)


def test_width_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    interval = bootstrap_interval(values)
    standard_error = (values.std(correction=0) / 400**0.5).item()
    assert interval.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_constant_values_have_no_width():
    interval = bootstrap_interval(torch.full((10,), 0.25))
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_same_seed_same_interval_whatever_was_drawn_between():
    values = torch.randn(50, generator=torch.Generator().manual_seed(2))
    first = bootstrap_interval(values, seed=7)
    torch.randn(1000)
    assert bootstrap_interval(values, seed=7) == first
    assert bootstrap_interval(values, seed=8) != first


def test_pairs_see_a_difference_that_two_intervals_do_not():
    generator = torch.Generator().manual_seed(3)
    difficulty = 5 * torch.randn(100, generator=generator)
    a = difficulty + 0.2 + 0.1 * torch.randn(100, generator=generator)
    alone_a, alone_b = bootstrap_interval(a), bootstrap_interval(difficulty)
    assert alone_a.low < alone_b.high
    assert alone_b.low < alone_a.high
    paired = paired_difference(a, difficulty)
    assert 0.15 < paired.low < paired.mean < paired.high < 0.25
    assert paired.mean == pytest.approx(alone_a.mean - alone_b.mean, abs=1e-6)


def test_percentiles_of_even_draws():
    assert percentiles(7.0, torch.arange(41, dtype=torch.float64)) == Interval(7.0, 1.0, 39.0)  # 0.025 x 40 = 1
    assert percentiles(7.0, torch.arange(11, dtype=torch.float64), tail=0.1) == Interval(7.0, 1.0, 9.0)


def test_counts_of_a_resample_are_those_of_its_draws():
    n, resamples = 5, 7
    counts = resample_counts(n, resamples, torch.Generator().manual_seed(0))
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    assert counts.tolist() == [[(row == i).sum().item() for i in range(n)] for row in drawn]


def test_an_interval_is_said_in_the_digits_asked_for():
    assert f"{Interval(1.2, 1.0, 1.4):+.2f}" == "+1.20 [+1.00, +1.40]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(torch.ones(1)), "at least 2 values"),
        (lambda: bootstrap_interval(torch.ones(5), level=1.0), r"level=1.0"),
        (lambda: bootstrap_interval(torch.tensor([1.0, float("nan"), 2.0])), "1 of 3 values are not finite"),
        (lambda: paired_difference(torch.ones(4), torch.ones(5)), r"\(4,\) and \(5,\)"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
