"""The tables of a report, once as data, then as Markdown, CSV and LaTeX: each shows all of an `Entry`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.report.paper import MEASURES, NOTE, PaperRow, comparable
from hypersd_ray.models.checkpoint import read_base

SPEED = {
    "latency_text_ms": "text encoder, ms", "latency_unet_ms": "UNet, ms", "latency_vae_ms": "VAE, ms",
    "latency_whole_ms": "whole, ms", "memory_text_mb": "text encoder, MB", "memory_unet_mb": "UNet, MB",
    "memory_vae_mb": "VAE, MB", "memory_peak_mb": "peak, MB",
}  # fmt: skip
"""Columns of latency and memory: a name for programs, a title."""


@dataclass(frozen=True)
class Entry:
    """A number of one model at a number of steps.

    Attributes:
        mean, low, high: with the 95% interval; None where every score is missing, or there is no interval.
        versus: the paired difference to the baseline, with its interval.
        best, tie: how it stands in its column.
        missing: scores that a judge did not give.
        digits: after the point.
        spread: standard deviation between trainings.
        learned: the model was trained by this judge.
        model: the model's name, without what a table's label adds.
        weights: the start of the hash of its weights; of several trainings all.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    versus: tuple[float, float, float] | None = None
    best: bool = False
    tie: bool = False
    missing: int = 0
    digits: int = 3
    spread: float | None = None
    learned: bool = False
    model: str = ""
    weights: str = ""

    @property
    def text(self) -> str:
        """Mean and half of the interval; marked where the model learned from the judge."""
        if self.mean is None:
            return "none"
        half = "" if self.low is None or self.high is None else f" ± {(self.high - self.low) / 2:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{half}" + "†" * self.learned

    @property
    def between(self) -> str:
        """Standard deviation between trainings, where there are several."""
        return "" if self.spread is None else f"sd of seeds {self.spread:.{self.digits}f}"

    @property
    def difference(self) -> str:
        """To the baseline, with its interval."""
        if self.versus is None:
            return ""
        mean, low, high = (f"{value:+.{self.digits}f}" for value in self.versus)
        return f"{mean} [{low}, {high}]"

    @property
    def lost(self) -> str:
        """How many scores are missing, where any is."""
        return f"{self.missing} missing" if self.missing else ""

    @property
    def beside(self) -> list[str]:
        """What stands beside the number."""
        return [part for part in (self.difference, self.between, self.lost) if part]

    @property
    def clear(self) -> bool:
        """Whether the difference's interval leaves 0 out."""
        return self.versus is not None and not self.versus[1] <= 0 <= self.versus[2]


@dataclass(frozen=True)
class Table:
    """A measure: models by numbers of steps. `others` were asked at numbers of steps of their own (the baseline)."""

    name: str
    title: str
    better: str
    steps: list[int]
    rows: dict[str, dict[int, Entry]]
    paper: dict[str, dict[int, Entry]] = field(default_factory=dict)
    others: list[tuple[str, int, Entry]] = field(default_factory=list)

    @property
    def lines(self) -> list[tuple[str, dict[int, Entry]]]:
        """All rows: ours, then the paper's."""
        return [*self.rows.items(), *((f"paper: {model}", row) for model, row in self.paper.items())]

    @property
    def below(self) -> list[str]:
        """Sentences below the table."""
        found = []
        if self.others:
            told = [f"{name}: {_with_beside(entry.text, entry.beside)}" for name, _, entry in self.others]
            found.append(f"For orientation: {'; '.join(told)}.")
        return [*found, *([NOTE] if self.paper else [])]


@dataclass(frozen=True)
class Speed:
    """Latency and memory of a model at a number of steps, by the columns of `SPEED`."""

    model: str
    steps: int
    entries: dict[str, Entry]


def _with_beside(text: str, beside: Sequence[str]) -> str:
    return text + (f" ({'; '.join(beside)})" if beside else "")


def digits_of(values: list[float]) -> int:
    """So many that three or four figures are seen."""
    most = max((abs(v) for v in values if math.isfinite(v)), default=1.0)
    return 1 if most >= 100 else 2 if most >= 10 else 3


def tables(results: dict[str, Any]) -> list[Table]:
    """One a measure; a model that was asked at a number of steps of its own (the baseline) stands aside."""
    steps = list(results["settings"]["steps"])
    beside = paper_rows(results)
    found = []
    for card in results["cards"]:
        name, ranking = card["name"], results["ranking"].get(card["name"], {})
        there = [row for row in results["rows"] if name in row["measures"]]
        means = [mean for row in there if (mean := row["measures"][name]["mean"]) is not None]
        digits = digits_of(means)
        rows: dict[str, dict[int, Entry]] = {}
        others = []
        for row in there:
            entry = _entry(row, name, ranking, digits, name in results.get("learned", {}).get(row["model"], ()))
            if row["steps"] in steps:
                rows.setdefault(label(results, row["model"]), {})[row["steps"]] = entry
            else:
                at = "" if row["model"].endswith(f" at {row['steps']}") else f" at {row['steps']}"
                others.append((f"{row['model']}{at} steps", row["steps"], entry))
        rows |= {f"{model} (diverged)": {} for model in results.get("diverged", ())}
        paper: dict[str, dict[int, Entry]] = {}
        if name in MEASURES and card.get("published"):
            for one in beside:
                entry = Entry(getattr(one, name), digits=digits, model=f"paper: {one.model}")
                paper.setdefault(one.model, {})[one.steps] = entry
        columns = sorted({*steps, *(n for row in paper.values() for n in row)})
        if any(rows.values()):
            found.append(Table(name, card["title"], card["better"], columns, rows, paper, others))
    return found


def label(results: dict[str, Any], model: str) -> str:
    """The model's name, and how many of its trainings are in its row where a comparison has several seeds."""
    there, of = results.get("seeds", {}).get(model, (1, 1))
    return model if of == 1 else f"{model} ({there}/{of} seeds)"


def _entry(row: dict[str, Any], name: str, ranking: dict[str, Any], digits: int, learned: bool) -> Entry:
    interval, versus = row["measures"][name], row["versus"].get(name)
    place = ranking.get(str(row["steps"]), {})
    told = None if versus is None or versus["mean"] is None else (versus["mean"], versus["low"], versus["high"])
    return Entry(
        interval["mean"], interval["low"], interval["high"], told, place.get("best") == row["model"],
        row["model"] in place.get("ties", ()), row["missing"].get(name, 0), digits, row["spread"].get(name), learned,
        row["model"], weights_of(row),
    )  # fmt: skip


def weights_of(row: dict[str, Any]) -> str:
    """The start of the hashes of a row's weights; empty is the base's own."""
    return " ".join(digest[:12] for digest in row["weights"] if digest)


def paper_rows(results: dict[str, Any]) -> tuple[PaperRow, ...]:
    """The paper's rows of our setting."""
    base = Path(results["settings"]["base"])
    return comparable(read_base(base), results["prompts"]) if (base / "model_index.json").is_file() else ()


def speeds(results: dict[str, Any]) -> list[Speed]:
    """Of one model at each number of steps, where they were measured; LoRAs merged into one UNet all cost the same."""
    found = []
    for row in results["rows"]:
        if not row["latency"]:
            continue
        about, weights = row["latency"], weights_of(row)
        entries = {
            f"latency_{part}_ms": Entry(i["mean"], i["low"], i["high"], digits=1, model=row["model"], weights=weights)
            for part, i in about["ms"].items()
        }
        memory = {part: about["weights_mb"][part] + about["activations_mb"][part] for part in about["weights_mb"]}
        for part, value in (memory | {"peak": about["peak_mb"]}).items():
            entries[f"memory_{part}_mb"] = Entry(value, digits=1, model=row["model"], weights=weights)
        found.append(Speed(row["model"], row["steps"], {name: entries[name] for name in SPEED}))
    return found


def speed_words(results: dict[str, Any]) -> str:
    """What was timed, on what; empty where nothing was."""
    about = next((row["latency"] for row in results["rows"] if row["latency"]), None)
    if about is None:
        return ""
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return (
        f"One picture at a time, on {about['device']}, {threads}, {results['settings']['latency_repeats']} pictures; LoRAs "
        "merged. Memory: weights and the most that a part's activations take; at the peak all weights are there."
    )


def card_lines(results: dict[str, Any]) -> list[tuple[str, str]]:
    """A measure's title, and what stands behind its number."""
    found = []
    for card in results["cards"]:
        note = f" {card['note']}." if card["note"] else ""
        hashed = f", sha256 {card['sha256'][:16]}" if card["sha256"] else ""
        text = f"{card['model']}{hashed}; {card['preprocessing']}; {card['scale']}, {card['better']} is better.{note}"
        found.append((card["title"], text))
    return found


def markdown(found: list[Table], results: dict[str, Any]) -> str:
    """All tables, and what stands behind them."""
    parts = []
    for table in found:
        head = f"| {table.title} ({table.better} is better) | " + " | ".join(_plural(n) for n in table.steps) + " |"
        lines = [f"## {table.title}", "", head, "|---|" + "---:|" * len(table.steps)]
        for model, row in table.lines:
            name = f"*{model}*" if model not in table.rows else model
            lines.append(f"| {name} | {' | '.join(_markdown_cell(row.get(n)) for n in table.steps)} |")
        parts.append("\n\n".join(["\n".join(lines), *table.below]))
    timed = speeds(results)
    if timed:
        lines = ["## Latency and memory", "", speed_words(results), "", f"| model | steps | {' | '.join(SPEED.values())} |",
                 "|---|---:|" + "---:|" * len(SPEED)]  # fmt: skip
        lines += [
            f"| {one.model} | {one.steps} | {' | '.join(e.text for e in one.entries.values())} |" for one in timed
        ]
        parts.append("\n".join(lines))
    cards = "\n".join(f"- **{title}**: {text}" for title, text in card_lines(results))
    return "\n\n".join([*parts, f"## Metric cards\n\n{cards}"])


def _markdown_cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    text = f"**{entry.text}**" if entry.best else f"{entry.text} ≈" if entry.tie else entry.text
    return _with_beside(text, entry.beside)


def _plural(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def as_csv(found: list[Table], results: dict[str, Any]) -> str:
    """Long form: a line for each model, number of steps and measure, with full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("mean", "low", "high")
    beside = ("missing", "spread_of_seeds", "place", "learned_from_judge", "weights")
    writer.writerow(["model", "steps", "measure", *names, *(f"versus_{n}" for n in names), *beside])
    for steps, measure, entry in _entries(found, results):
        place = "best" if entry.best else "tie" if entry.tie else ""
        numbers = [entry.mean, entry.low, entry.high, *(entry.versus or (None,) * 3)]
        about = [entry.missing, entry.spread, place, int(entry.learned), entry.weights]
        writer.writerow([entry.model, steps, measure, *numbers, *about])
    return out.getvalue()


def _entries(found: list[Table], results: dict[str, Any]) -> Iterator[tuple[int, str, Entry]]:
    """Number of steps, measure and entry of all that the report shows."""
    for table in found:
        yield from ((steps, table.name, entry) for _, steps, entry in table.others)
        yield from ((steps, table.name, entry) for _, row in table.lines for steps, entry in row.items())
    for one in speeds(results):
        yield from ((one.steps, name, entry) for name, entry in one.entries.items())


def latex(found: list[Table], results: dict[str, Any]) -> str:
    """booktabs tables; the best of a column bold. Then latency and memory, and the metric cards."""
    parts = []
    for table in found:
        head = [f"{table.title} ({table.better} is better)", *(_plural(n) for n in table.steps)]
        lines = [[escape(model), *(_latex_cell(row.get(n)) for n in table.steps)] for model, row in table.lines]
        parts += [_tabular(head, lines), *map(escape, table.below)]
    if timed := speeds(results):
        lines = [[escape(s.model), str(s.steps), *map(_latex_cell, s.entries.values())] for s in timed]
        parts += [escape(speed_words(results)), _tabular(["model", "steps", *SPEED.values()], lines)]
    return "\n\n".join([*parts, latex_list(card_lines(results))]) + "\n"


def latex_list(lines: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of them."""
    items = [rf"\item \textbf{{{escape(name)}}}: {escape(text)}" for name, text in lines]
    return "\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])


def _tabular(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Of a first column of names."""
    row = lambda cells: " & ".join(cells) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    body = [begin, r"\toprule", row(map(escape, head)), r"\midrule", *map(row, lines)]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}"])


def _latex_cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    number = entry.text.replace("±", r"\pm").replace("†", r"^\dagger")
    text = number if entry.mean is None else rf"$\mathbf{{{number}}}$" if entry.best else f"${number}$"
    text += r" $\approx$" * entry.tie
    # a minus, not a hyphen
    beside = [f"${entry.difference}$" if part == entry.difference else escape(part) for part in entry.beside]
    return text + (rf" {{\scriptsize ({'; '.join(beside)})}}" if beside else "")


ESCAPED = str.maketrans({
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≈": r"$\approx$", "†": r"$\dagger$",
})  # fmt: skip


def escape(text: str) -> str:
    return text.translate(ESCAPED)
