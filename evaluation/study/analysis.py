"""Win rates and Bradley-Terry scores of votes, with intervals over prompts.

A tie is half a win for each. Shapes: wins (..., M, M), wins[i, j] how often i was chosen over j.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from evaluation.study.store import Showing

COLUMNS = ("answered", "rater", "name", "caption", "left", "right", "choice", "winner", "repeat", "seconds")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Results:
    """What a study says.

    Attributes:
        scores: by model, the logarithm of its Bradley-Terry strength, mean 0: models differ by s in it when the odds of
            one being chosen over the other are exp(s).
        win_rates: by pair of models, the share of votes for the first.
        votes: by pair of models, first looks only, which is what everything here but `agreement` is of.
        agreement: share of second looks that were answered as the first; None without any.
    """

    models: list[str]
    scores: dict[str, Estimate]
    win_rates: dict[tuple[str, str], Estimate]
    votes: dict[tuple[str, str], int]
    ties: int
    raters: int
    second_looks: int
    agreement: float | None


def bradley_terry(wins: np.ndarray, prior: float = 0.1, iterations: int = 100) -> np.ndarray:
    """Log-strengths (..., M), mean 0, of greatest likelihood, by Newton's method.

    Args:
        prior: ties of each model with one of strength 1, added so that one that never lost has a finite score; above 0.

    Raises:
        ValueError: Newton's method did not converge.
    """
    games = wins + np.swapaxes(wins, -1, -2)
    own = np.eye(wins.shape[-1])
    scores = np.zeros(wins.shape[:-1])
    for _ in range(iterations):
        beats = expit(scores[..., :, None] - scores[..., None, :])
        beats_prior = expit(scores)
        slope = (wins - games * beats).sum(-1) + prior * (0.5 - beats_prior)
        joint = games * beats * (1 - beats)
        bend = own * (joint.sum(-1) + prior * beats_prior * (1 - beats_prior))[..., None] - joint * (1 - own)
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        # A logarithmic part of a long step: with it the likelihood rises from anywhere (Sun and Tran-Dinh, 2019).
        length = np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-12)
        scores = scores + step * np.log1p(length) / length
        if (slope * step).sum(-1).max() < 1e-14:  # twice what likelihood is left to gain
            return scores - scores.mean(-1, keepdims=True)
    raise ValueError(f"the Bradley-Terry scores of {wins.shape[-1]} models did not converge in {iterations} steps")


def tally(votes: Sequence[Showing], models: Sequence[str]) -> np.ndarray:
    """Wins (P, M, M) by prompt, of first looks."""
    place = {model: i for i, model in enumerate(models)}
    names = {name: i for i, name in enumerate(dict.fromkeys(vote.name for vote in votes))}
    wins = np.zeros((len(names), len(models), len(models)))
    for vote in votes:
        a, b = place[vote.model_a], place[vote.model_b]
        share = {"a": 1.0, "b": 0.0, "tie": 0.5}[vote.choice or ""]
        wins[names[vote.name], a, b] += share
        wins[names[vote.name], b, a] += 1 - share
    return wins


def analyse(votes: Sequence[Showing], resamples: int = 1000, seed: int = 0) -> Results:
    """Everything above. The intervals are of prompts drawn anew, each with all its votes.

    Raises:
        ValueError: there is no vote.
    """
    first = [vote for vote in votes if vote.repeat == 0]
    if not first:
        raise ValueError("there are no votes yet")
    models = sorted({model for vote in first for model in (vote.model_a, vote.model_b)})
    wins = tally(first, models)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=resamples)
    drawn = np.einsum("rp,pij->rij", draws, wins)
    total = wins.sum(0)
    scores, spread = bradley_terry(total), bradley_terry(drawn)
    rates, counts = {}, {}
    for i, a in enumerate(models):
        for j, b in enumerate(models[i + 1 :], i + 1):
            if total[i, j] + total[j, i]:
                games = drawn[:, i, j] + drawn[:, j, i]
                some = games > 0
                rates[a, b] = _estimate(total[i, j] / (total[i, j] + total[j, i]), drawn[some, i, j] / games[some])
                counts[a, b] = round(total[i, j] + total[j, i])
    second = list(_second_looks(votes))
    return Results(
        models, {model: _estimate(scores[i], spread[:, i]) for i, model in enumerate(models)}, rates, counts,
        sum(vote.choice == "tie" for vote in first), len({vote.rater for vote in first}), len(second),
        float(np.mean(second)) if second else None,
    )  # fmt: skip


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _second_looks(votes: Iterable[Showing]) -> Iterable[bool]:
    """Whether each was answered as the first look at the pair."""
    known = {(vote.rater, vote.comparison): vote.choice for vote in votes if vote.repeat == 0}
    for vote in votes:
        if vote.repeat and (vote.rater, vote.comparison) in known:
            yield vote.choice == known[vote.rater, vote.comparison]


def as_text(results: Results) -> str:
    """A table in Markdown."""
    agreement = "no second look yet" if results.agreement is None else f"{results.agreement:.0%} of {results.second_looks} second looks answered as the first"  # fmt: skip
    lines = [
        f"{sum(results.votes.values())} votes of {results.raters} raters, {results.ties} ties; {agreement}", "",
        "| model | Bradley-Terry score | 95% interval |", "|---|---:|---:|",
    ]  # fmt: skip
    for model in sorted(results.models, key=lambda model: -results.scores[model].value):
        score = results.scores[model]
        lines.append(f"| {model} | {score.value:+.2f} | {score.low:+.2f} to {score.high:+.2f} |")
    lines += ["", "| pair | votes | chosen first | 95% interval |", "|---|---:|---:|---:|"]
    for (a, b), rate in results.win_rates.items():
        lines.append(f"| {a} over {b} | {results.votes[a, b]} | {rate.value:.1%} | {rate.low:.1%} to {rate.high:.1%} |")
    return "\n".join(lines)


def write_csv(votes: Sequence[Showing], path: Path) -> int:
    """A line a vote, second looks too; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for vote in votes:
            winner = {"a": vote.model_a, "b": vote.model_b}.get(vote.choice or "", "")
            left, right = vote.model("left"), vote.model("right")
            choice = "tie" if not winner else "left" if winner == left else "right"
            writer.writerow([
                vote.answered, vote.rater[:8], vote.name, vote.caption, left, right, choice, winner, vote.repeat,
                f"{vote.seconds:.2f}",
            ])  # fmt: skip
    return len(votes)
