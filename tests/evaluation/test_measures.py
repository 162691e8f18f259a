"""Measures against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.harness.judges import OBJECTS, JudgeSpec, try_judge
from evaluation.harness.measures import (
    LATENTS,
    Draws,
    Values,
    averaged,
    between_seeds,
    cmmd,
    counts,
    fidelity_measure,
    objects_measure,
    seed_measure,
    vendi,
)
from evaluation.harness.subjects import Cell, How


def normal(n: int, mean: float = 0.0, sd: float = 1.0, seed: int = 0) -> torch.Tensor:
    """n numbers of exactly that mean and standard deviation."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + sd * (x - x.mean()) / x.std(correction=0)


def test_the_interval_is_that_of_a_mean():
    """1.96 sd / sqrt(n) on either side, for numbers whose mean is nearly normal."""
    interval = Values(normal(400, mean=3.0, sd=2.0)).interval(4000, 0)
    assert interval.mean == pytest.approx(3.0)
    for side in (3.0 - interval.low, interval.high - 3.0):
        assert side == pytest.approx(1.96 * 2.0 / math.sqrt(400), rel=0.06)


def test_a_paired_difference_keeps_the_prompts_together():
    """a = b + 0.5: whatever prompts are drawn, the difference is 0.5, though each mean varies."""
    b = normal(100, sd=5.0)
    interval = Values(b + 0.5).minus(Values(b), 1000, 0)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    noise = normal(100, sd=0.1, seed=1)
    interval = Values(b + 0.5 + noise).minus(Values(b), 4000, 0)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * 0.1 / 10, rel=0.1)


def test_an_interval_holds_the_spread_of_trainings():
    """Trainings that differ by far more than prompts: the interval is that of their mean, not of the prompts'."""
    prompts, trainings = normal(400, sd=0.1), normal(3, mean=5.0, sd=1.0, seed=1)
    many = Values(trainings[:, None] + prompts[None]).interval(4000, 0)
    assert many.mean == pytest.approx(5.0)
    alone = Values(5.0 + prompts).interval(4000, 0)
    assert alone.high - alone.low < 0.03 < 1.5 < many.high - many.low
    half = 4.3027 * trainings.std().item() / math.sqrt(3)  # Student's t of 2 degrees
    assert (many.low, many.high) == pytest.approx((5.0 - half, 5.0 + half), abs=0.05)
    same = Values(trainings[:, None] + prompts[None]).minus(Values(prompts), 4000, 0)
    assert (same.mean, same.low) == pytest.approx((5.0, 5.0 - half), abs=0.01), "prompts cancel"
    draws = averaged(lambda cell, read: Draws(float(cell.seed), torch.full((2000,), float(cell.seed))))
    found = draws([cell(seed, str(seed)) for seed in (1, 2, 6)], None)
    half = 4.3027 * math.sqrt(7) / math.sqrt(3)
    assert found.point == 3.0
    assert (found.interval(0, 0).low, found.interval(0, 0).high) == pytest.approx((3 - half, 3 + half), rel=0.01)
    noises = draws([cell(seed) for seed in (1, 2, 6)], None).interval(0, 0)
    assert (noises.low, noises.high) == (3.0, 3.0), "noises of one training are averaged"


def test_missing_numbers_are_left_out_and_counted():
    a = torch.tensor([1.0, math.nan, 3.0, 5.0], dtype=torch.float64)
    b = torch.tensor([0.0, 7.0, math.nan, 2.0], dtype=torch.float64)
    assert Values(a).missing == 1
    assert Values(a).interval(500, 0).mean == pytest.approx(3.0)
    assert Values(a).minus(Values(b), 500, 0).mean == pytest.approx((1.0 + 3.0) / 2)
    assert math.isnan(Values(torch.full((4,), math.nan)).interval(500, 0).mean)


def test_draws_that_resampling_shifts_are_put_around_the_point():
    draws = normal(2000, mean=7.0, sd=0.5)
    interval = Draws(10.0, draws, centred=True).interval(0, 0)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((10.0, 10 - 0.98, 10 + 0.98), abs=0.06)
    same = Draws(10.0, draws, True).minus(Draws(9.0, draws, True), 0, 0)
    assert (same.mean, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))


def test_vendi_counts_what_is_different():
    alike = F.normalize(torch.ones(6, 8), dim=1)
    assert vendi(alike).item() == pytest.approx(1.0)
    apart = torch.eye(8)[:6]
    assert vendi(apart).item() == pytest.approx(6.0)
    assert vendi(torch.cat([apart[:1]] * 3 + [apart[1:2]] * 3)).item() == pytest.approx(2.0)
    # shares 3/4 and 1/4: exp of that entropy
    weights = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert vendi(apart[:2], weights).item() == pytest.approx(expected)
    assert counts(5, 7, 0).sum(1).tolist() == [5.0] * 7


def test_between_seeds_is_one_less_the_cosine():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert between_seeds(torch.stack([a, b])).tolist() == pytest.approx([0.0, 0.4])
    c = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # three seeds: cosines 1, 0, 0 and 0.6, 1, 0.6
    assert between_seeds(torch.stack([a, b, c])).tolist() == pytest.approx([1 - 1 / 3, 1 - 2.2 / 3])


def test_cmmd_of_two_points():
    """All x at a, all y at b, d apart: k(x, x) = k(y, y) = 1 and k(x, y) = exp(-d^2 / 200)."""
    x, y = torch.zeros(5, 3), torch.full((4, 3), 2.0)
    assert cmmd(x, y).item() == pytest.approx(1000 * (2 - 2 * math.exp(-12 / 200)))
    assert cmmd(x, x).item() == pytest.approx(0.0, abs=1e-9)
    weights = torch.tensor([[5.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1]], dtype=torch.float64)
    assert cmmd(x, y, weights).tolist() == pytest.approx([cmmd(x, y).item()] * 2)


def cell(seed: int = 0, weights: str = "w", steps: int = 2) -> Cell:
    return Cell("m", "lora", "/base", "/w", "b", weights, steps, seed, How("tcd"))


def test_fidelity_is_the_distance_to_the_same_noise():
    """Latents that are c off everywhere: c^2 / variance. A seed without a reference has none."""
    ends = np.random.default_rng(0).normal(size=(6, 4, 2, 2)).astype(np.float32)
    reference, ours = cell(0, "t", 50), cell()
    arrays = {reference.key: ends, ours.key: ends + 0.5}
    measure = fidelity_measure({0: reference}, 50, 3.0)
    found = measure.estimate([ours], lambda c, name: arrays[c.key] if name == LATENTS else arrays["no"])
    assert found.values.tolist() == pytest.approx([0.25 / ends.var(ddof=1)] * 6, rel=1e-5)
    assert measure.estimate([cell(1)], lambda c, name: ends) is None


def test_diversity_between_seeds_needs_two_of_one_model():
    spec = JudgeSpec("clip_features", "features", "{}", "s")
    features = {0: np.eye(4, dtype=np.float32)[:2], 1: np.eye(4, dtype=np.float32)[1:3]}
    read = lambda c, name: features[c.seed]
    measure = seed_measure(spec)
    assert measure.estimate([cell(0), cell(1)], read).values.tolist() == pytest.approx([1.0, 1.0])
    assert measure.estimate([cell(0)], read) is None
    assert measure.estimate([cell(0, "a"), cell(1, "b")], read) is None, "two trainings are no two seeds of one"


def brightness(images: torch.Tensor, prompts) -> np.ndarray:
    """A judge that cannot see black pictures."""
    if (images.flatten(1).amax(1) == 0).any():
        raise ValueError("a black picture")
    return images.flatten(1).mean(1).numpy()


def test_a_judge_that_fails_on_one_picture_loses_that_one():
    images = torch.full((5, 3, 4, 4), 0.25)
    images[3] = 0
    values, failures = try_judge(brightness, images, [f"p{i}" for i in range(5)], batch=4)
    assert values.tolist()[:3] == [0.25] * 3 and np.isnan(values[3]) and values[4] == 0.25
    assert failures == ["'p3': ValueError: a black picture"]
    images[4, 0, 0, 0] = math.nan
    values, failures = try_judge(brightness, images, [f"p{i}" for i in range(5)], batch=5)
    assert np.isnan(values[3:]).all() and len(failures) == 2


def test_a_picture_that_the_perception_model_failed_on_is_left_out():
    found = np.full((4, 3, 2), -1.0)  # per picture up to 3 of (class, score)
    found[0, 0], found[1, 0], found[2, 0] = (5, 0.9), (6, 0.8), (5, 0.7)
    named, one = [(5,), (6,), (6,), (5,)], cell()
    spec = JudgeSpec(OBJECTS, "objects", "{}", "")
    whole = objects_measure(spec, named[:2], 50, 0).estimate([one], lambda *_: found[:2])
    lost = found.copy()
    lost[2:] = np.nan
    measure = objects_measure(spec, named, 50, 0)
    part = measure.estimate([one], lambda *_: lost)
    assert (part.point, part.missing) == (whole.point, 2)
    empty = np.where(np.isnan(lost), -1.0, lost)
    missed = objects_measure(spec, named, 50, 0).estimate([one], lambda *_: empty)
    assert missed.point < part.point, "they would have counted as not found"
    assert np.isnan(measure.cases([one], lambda *_: lost)[2:]).all()


def test_a_judge_that_fails_on_all_is_broken():
    with pytest.raises(RuntimeError, match="fails on all of 3 pictures"):
        try_judge(brightness, torch.zeros(3, 3, 4, 4), ["a", "b", "c"], 2)


def test_a_table_marks_what_was_learned_and_names_the_seeds():
    from evaluation.report.tables import as_csv, latex, markdown, tables

    interval = {"mean": 60.0, "low": 59.0, "high": 61.0}
    row = {
        "model": "ours", "steps": 4, "measures": {"clip_score": interval, "vendi": interval}, "versus": {}, "missing": {"vendi": 3},
        "spread": {"clip_score": 0.25}, "latency": None, "weights": ["a" * 64, "b" * 64],
    }  # fmt: skip
    cards = [
        {"name": n, "title": n, "better": "higher", "model": "m", "sha256": "", "preprocessing": "p", "scale": "s", "note": ""}
        for n in ("clip_score", "vendi")
    ]  # fmt: skip
    results = {
        "settings": {"steps": [4], "base": "/none"}, "cards": cards, "ranking": {}, "rows": [row],
        "prompts": {"name": "embedded", "count": 2}, "learned": {"ours": ["clip_score"]}, "seeds": {"ours": (2, 3)},
        "diverged": ["gone"],
    }  # fmt: skip
    found = tables(results)
    text = markdown(found, results)
    assert (
        "| ours (2/3 seeds) | 60.00 ± 1.00† (sd of seeds 0.25) |" in text
        and "| ours (2/3 seeds) | 60.00 ± 1.00 (3 missing) |" in text
    )
    told = latex(found, results)
    assert "| gone (diverged) |  |" in text and r"\pm 1.00^\dagger" in told
    assert "(sd of seeds 0.25)" in told and "(3 missing)" in told
    assert f"ours,4,vendi,60.0,59.0,61.0,,,,3,,,0,{'a' * 12} {'b' * 12}" in as_csv(found, results).splitlines()


def test_the_papers_rows_stand_below_ours_where_the_judge_is_its_own(monkeypatch):
    from evaluation.report import tables as module
    from evaluation.report.paper import TABLE_2

    monkeypatch.setattr(module, "paper_rows", lambda _: TABLE_2[:1])
    interval = {"mean": 31.0, "low": None, "high": None}
    row = {
        "model": "ours",
        "steps": 4,
        "measures": {},
        "versus": {},
        "missing": {},
        "spread": {},
        "latency": None,
        "weights": [],
    }
    row["measures"] = {
        "clip_score": interval,
        "pick_score": interval,
        "vendi": {"mean": None, "low": None, "high": None},
    }
    row["missing"] = {"vendi": 5}
    card = {"better": "higher", "model": "m", "sha256": "", "preprocessing": "p", "scale": "s", "note": ""}
    names = {"clip_score": True, "pick_score": False, "vendi": False}
    cards = [card | {"name": n, "title": n, "published": published} for n, published in names.items()]
    results = {"settings": {"steps": [4]}, "cards": cards, "ranking": {}, "rows": [row]}
    found = module.tables(results)
    texts = [write(found, results) for write in (module.markdown, module.latex, module.as_csv)]
    assert all(text.count("paper: SD15-Base") == 1 and "31.88" in text for text in texts), (
        "not where the judge is another"
    )
    assert all("rows are of the original bases" in text for text in texts[:2])
    assert all("none (5 missing)" in text.replace(r" {\scriptsize", "") for text in texts[:2])
    assert "ours,4,vendi,,,,,,,5,,,0," in texts[2].splitlines()


def test_latex_takes_any_name():
    from evaluation.report.tables import escape

    assert escape(r"a_b{c}~d^e\f 5% ± ≈") == (
        r"a\_b\{c\}\textasciitilde{}d\textasciicircum{}e\textbackslash{}f 5\% $\pm$ $\approx$"
    )
