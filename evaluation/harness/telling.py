"""What a reader must know of a comparison's table: costs, choices, what diverged, who was judged by what it learned from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.harness.judges import OBJECTS, chosen_judges, hash_of
from evaluation.harness.subjects import read_run
from hypersd_ray.config.evaluate import JudgesConfig
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.ablations import ABLATIONS
from hypersd_ray.recipes.compare import TRAININGS
from hypersd_ray.recipes.methods import FEEDBACK_SHARE, HYPER_SD

if TYPE_CHECKING:
    from evaluation.harness.comparison import Comparison

OF_FEATURES = ("vendi", "between_seeds", "cmmd")
"""Measures of the image features of the judge clip_score."""


def told(comparison: Comparison, results: dict[str, Any]) -> dict[str, Any]:
    """`results` with what stands beside the table: notes, remarks, seeds, diverged, learned."""
    results = results | {"notes": notes(comparison), "seeds": seeds(comparison), "diverged": diverged(comparison)}
    results |= {"learned": learned(comparison)}
    return results | {"remarks": [*remarks(comparison, results["learned"]), *aim(results)]}


def notes(comparison: Comparison) -> dict[str, str]:
    """Rates, seeds and cost of each method, for the provenance."""
    config = comparison.config
    notes = {"budget": f"{config.budget} images through the teacher, each training"}
    for method in config.methods:
        lr, scores = comparison.best(method), comparison.chosen.get(method, {})
        if lr is None:
            if scores:
                notes[f"training of {method}"] = f"diverged at every learning rate ({', '.join(scores)})"
            continue
        done = [found for p in comparison.final(method) if comparison.usable(p) and (found := comparison.done(p))]
        gone = [p.seed for p in comparison.final(method) if (found := comparison.done(p)) and found.get("diverged")]
        tried = ", ".join(f"{rate}: {'diverged' if s is None else f'{s:.2f}'}" for rate, s in scores.items())
        edge = ", an edge of the sweep: a better one may lie beyond" if at_the_edge(comparison, method) else ""
        steps = ", ".join(map(str, comparison.made_for(method)))
        cost = sum(found["seconds"] for found in done) / max(1, len(done))
        notes[f"training of {method}"] = (
            f"lr {lr:g}{edge} ({config.select} at {steps} steps on {config.selection_prompts} training captions: "
            f"{tried or 'one rate, none to choose of'}); {len(done)} seeds"
            + (f", seed {', '.join(map(str, gone))} diverged" if gone else "")
            + f"; {done[0]['teacher_passes'] if done else 0} teacher passes; {cost:.0f} s"
        )
    return notes


def at_the_edge(comparison: Comparison, method: str) -> bool:
    """Whether the best of several learning rates is the least or the greatest of them."""
    rates = [float(rate) for rate in comparison.chosen.get(method, {})]
    return len(rates) > 1 and comparison.best(method) in (min(rates), max(rates))


def seeds(comparison: Comparison) -> dict[str, tuple[int, int]]:
    """method -> trainings that are in its row, of how many."""
    of = len(comparison.config.seeds)
    return {
        method: (sum(map(comparison.usable, comparison.final(method))), of)
        for method in comparison.config.methods if comparison.best(method) is not None
    }  # fmt: skip


def diverged(comparison: Comparison) -> list[str]:
    """Methods without a row of numbers, as all of their trainings diverged."""
    gone = lambda pieces: all(comparison.done(p) for p in pieces) and not any(map(comparison.usable, pieces))
    return [
        m
        for m in comparison.config.methods
        if gone(comparison.final(m)) or (comparison.over(m) and comparison.best(m) is None)
    ]


def learns_from_feedback(method: str, budget: int) -> bool:
    """Whether a chain has a run of feedback."""
    return bool(_feedback(method, budget))


def learns_from(method: str, budget: int, judges: JudgesConfig) -> set[str]:
    """Measures whose judge a method is trained by, or by a network that the judge shares, before anything is trained."""
    return {name for config in _feedback(method, budget) for name in _learned(config, judges)}


def _feedback(method: str, budget: int) -> list[FeedbackConfig]:
    chain, lora = TRAININGS[method](budget=budget), str(paths.LORAS / "tscd-k1.safetensors")  # any that is there
    return [config for link in chain.then if isinstance(config := link.config(lora), FeedbackConfig)]


def learned(comparison: Comparison) -> dict[str, list[str]]:
    """method -> measures whose judge it was trained by, or by a network that the judge shares."""
    judges, found = chosen_judges(comparison.evaluation()), {}
    for method in comparison.config.methods:
        if comparison.best(method) is None:
            continue
        piece = next((p for p in comparison.final(method) if comparison.usable(p)), None)
        done = comparison.done(piece) if piece else None
        configs = [read_run(Path(folder)) for folder in (done or {"runs": []})["runs"]]
        names = {name for c in configs if isinstance(c, FeedbackConfig) for name in _learned(c, judges)}
        if names:
            found[method] = sorted(names)
    return found


def _learned(config: FeedbackConfig, judges: JudgesConfig) -> set[str]:
    # By content: a comparison may be told from another checkout than it was trained from.
    same = lambda a, b: all(x and Path(x).exists() for x in (a, b)) and hash_of(a) == hash_of(b)
    found: set[str] = set()
    for reward in config.trained if config.refl.weight else ():
        found.add(reward.name)
        if same(reward.tower or reward.checkpoint, judges.clip_score):
            found |= {"clip_score", *OF_FEATURES}
    if config.structure.weight and same(config.structure.model.checkpoint, judges.solo):
        found.add(OBJECTS)
    return found


def remarks(comparison: Comparison, learned: dict[str, list[str]]) -> list[str]:
    """How the table was made, and what it does not say."""
    config = comparison.config
    found = [
        f"Every method trained with {config.budget} images through one teacher, from one stream of data; learning rate the "
        f"best of {len(config.rates)} by {config.select} on captions outside of this table, over the numbers of steps that the "
        f"method is made for; {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)} at that rate. Each samples as its recipe has it, in as many steps as "
        "the column says."
    ]
    gamma = [method for method in config.methods if TRAININGS[method](budget=config.budget).gamma]
    if noisy := [str(n) for n in config.noisy_steps if gamma and n in config.steps]:
        found.append(
            f"At {' and '.join(noisy)} steps {', '.join(gamma)} put new noise between the steps (TCD's gamma = 1), at others "
            "and where the rates were chosen none."
        )
    if later := [method for method in config.methods if learns_from_feedback(method, config.budget)]:
        found.append(
            f"{', '.join(later)} learned from feedback beside that, for {FEEDBACK_SHARE:.0%} as many steps: it asks no teacher."
        )
    if {"turbo", "dmd"} & set(config.methods) and max(config.steps) > 4:
        found.append("Turbo and DMD are made for 4 steps and fewer: their longer columns are beyond their training.")
    if learned:
        found.append(
            f"† {', '.join(learned)} learned from feedback by networks that judge them here. Those cells show what was "
            "trained; the other columns' judges are held out."
        )
    if edges := [method for method in config.methods if at_the_edge(comparison, method)]:
        found.append(f"The best learning rate is at the sweep's edge for {', '.join(edges)}: more rates may do better.")
    if gone := diverged(comparison):
        found.append(f"{', '.join(gone)} diverged in all trainings.")
    if set(ABLATIONS) & set(config.methods):
        found.append(
            f"Ablations are trained {'once' if len(config.seeds) == 1 else f'{len(config.seeds)} times'}"
            + (": the intervals leave out how much another seed of the training would change." if len(config.seeds) == 1 else ".")
        )  # fmt: skip
    return found


def aim(results: dict[str, Any]) -> list[str]:
    """Whether Hyper-SD's row is first, or cannot be told from the first, in each column: a remark; none without the row."""
    titles = {card["name"]: card["title"] for card in results["cards"]}
    columns = {
        f"{titles[name]} at {n} step{'s' * (n != '1')}": place
        for name, of_steps in results["ranking"].items() for n, place in of_steps.items()
        if any(row["model"] == HYPER_SD and str(row["steps"]) == n and name in row["measures"] for row in results["rows"])
    }  # fmt: skip
    if not columns:
        return []
    behind = [f"{c} (behind {p['best']})" for c, p in columns.items() if HYPER_SD not in (p["best"], *p["ties"])]
    text = (
        f"The aim, {HYPER_SD} first or not to be told from the first in every column, holds in "
        f"{len(columns) - len(behind)} of {len(columns)} columns"
    )
    return [text + (f"; it does not in: {', '.join(behind)}." if behind else ".")]
