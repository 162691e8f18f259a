"""The tables of a report, once as data, then as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.report.paper import MEASURES, PaperRow, comparable
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import read_base


@dataclass(frozen=True)
class Entry:
    """A number with half of its interval, its difference to the baseline, and how it stands in its column; `spread` is the
    standard deviation between trainings, `learned` that the model was trained by this judge."""

    mean: float
    half: float | None = None
    versus: tuple[float, float, float] | None = None
    best: bool = False
    tie: bool = False
    missing: int = 0
    digits: int = 3
    spread: float | None = None
    learned: bool = False

    @property
    def text(self) -> str:
        """Mean and half of the interval; marked where the model learned from the judge."""
        mean = f"{self.mean:.{self.digits}f}"
        return (mean if self.half is None else f"{mean} ± {self.half:.{self.digits}f}") + "†" * self.learned

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
    def clear(self) -> bool:
        """Whether the difference's interval leaves 0 out."""
        return self.versus is not None and not self.versus[1] <= 0 <= self.versus[2]


@dataclass(frozen=True)
class Table:
    """A measure: models by numbers of steps."""

    name: str
    title: str
    better: str
    steps: list[int]
    rows: dict[str, dict[int, Entry]]
    paper: dict[str, dict[int, Entry]] = field(default_factory=dict)
    aside: str = ""


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
        there = [row for row in results["rows"] if (row["measures"].get(name) or {}).get("mean") is not None]
        digits = digits_of([row["measures"][name]["mean"] for row in there])
        rows: dict[str, dict[int, Entry]] = {}
        aside = []
        for row in there:
            entry = _entry(row, name, ranking, digits, name in results.get("learned", {}).get(row["model"], ()))
            if row["steps"] in steps:
                rows.setdefault(label(results, row["model"]), {})[row["steps"]] = entry
            else:
                at = "" if row["model"].endswith(f" at {row['steps']}") else f" at {row['steps']}"
                aside.append(f"{row['model']}{at} steps: {entry.text}")
        rows |= {f"{model} (diverged)": {} for model in results.get("diverged", ())}
        paper: dict[str, dict[int, Entry]] = {}
        if name in MEASURES:
            for one in beside:
                paper.setdefault(one.model, {})[one.steps] = Entry(getattr(one, name), digits=digits)
        columns = sorted({*steps, *(n for row in paper.values() for n in row)})
        if any(rows.values()):
            found.append(Table(name, card["title"], card["better"], columns, rows, paper, "; ".join(aside)))
    return found


def label(results: dict[str, Any], model: str) -> str:
    """The model's name, and how many of its trainings are in its row where a comparison has several seeds."""
    there, of = results.get("seeds", {}).get(model, (1, 1))
    return model if of == 1 else f"{model} ({there}/{of} seeds)"


def _entry(row: dict[str, Any], name: str, ranking: dict[str, Any], digits: int, learned: bool) -> Entry:
    interval, versus = row["measures"][name], row["versus"].get(name)
    place = ranking.get(str(row["steps"]), {})
    half = None if interval["low"] is None else (interval["high"] - interval["low"]) / 2
    told = None if versus is None or versus["mean"] is None else (versus["mean"], versus["low"], versus["high"])
    return Entry(
        interval["mean"], half, told, place.get("best") == row["model"], row["model"] in place.get("ties", ()),
        row["missing"].get(name, 0), digits, row["spread"].get(name), learned,
    )  # fmt: skip


def paper_rows(results: dict[str, Any]) -> tuple[PaperRow, ...]:
    """The paper's rows of our setting."""
    base = Path(results["settings"]["base"])
    family = read_base(base).family if (base / "model_index.json").is_file() else ""
    prompts = results["prompts"]
    return comparable(family, prompts["name"], prompts["count"], base.resolve() == paths.TEACHER.resolve())


def latency_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that have one: of one model at each number of steps; LoRAs merged into one UNet all cost the same."""
    return [row for row in results["rows"] if row["latency"]]


def markdown(found: list[Table], results: dict[str, Any]) -> str:
    """All tables, and what stands behind them."""
    parts = []
    for table in found:
        head = f"| {table.title} ({table.better} is better) | " + " | ".join(_plural(n) for n in table.steps) + " |"
        lines = [f"## {table.title}", "", head, "|---|" + "---:|" * len(table.steps)]
        for model, row in [*table.rows.items(), *((f"*paper: {m}*", r) for m, r in table.paper.items())]:
            cells = []
            for n in table.steps:
                entry = row.get(n)
                text = "" if entry is None else entry.text
                text = f"**{text}**" if entry and entry.best else f"{text} ≈" if entry and entry.tie else text
                beside = [part for part in (entry.difference, entry.between) if part] if entry else []
                cells.append(text + (f" ({'; '.join(beside)})" if beside else ""))
            lines.append(f"| {model} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + (f"\n\n{table.aside}" if table.aside else ""))
    timed = latency_rows(results)
    if timed:
        lines = ["## Latency and memory", "", "| model | steps | text encoder, ms | UNet, ms | VAE, ms | whole, ms | memory, MB |",
                 "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        for speed in timed:
            ms = [_interval(speed["latency"]["ms"][part]) for part in ("text", "unet", "vae", "whole")]
            lines.append(
                f"| {speed['model']} | {speed['steps']} | {' | '.join(ms)} | {speed['latency']['peak_mb']:.0f} |"
            )
        parts.append("\n".join(lines))
    cards = ["## Metric cards", ""]
    for card in results["cards"]:
        note = f" {card['note']}." if card["note"] else ""
        hashed = f", sha256 {card['sha256'][:16]}" if card["sha256"] else ""
        cards.append(
            f"- **{card['title']}**: {card['model']}{hashed}; {card['preprocessing']}; {card['scale']}, {card['better']} is better.{note}"
        )
    return "\n\n".join([*parts, "\n".join(cards)])


def _plural(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.1f} ± {(interval['high'] - interval['low']) / 2:.1f}"


def as_csv(results: dict[str, Any]) -> str:
    """Long form: a line for each model, number of steps and measure, with full precision."""
    out = io.StringIO()
    names = ("mean", "low", "high")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "steps", "measure", *names, *(f"versus_{n}" for n in names), "missing", "spread_of_seeds"]
    )
    for row in results["rows"]:
        for name, interval in row["measures"].items():
            versus = row["versus"].get(name, {})
            numbers = [interval[n] for n in names] + [versus.get(n) for n in names]
            writer.writerow(
                [row["model"], row["steps"], name, *numbers, row["missing"].get(name, 0), row["spread"].get(name)]
            )
        for part, interval in (row["latency"] or {}).get("ms", {}).items():
            writer.writerow(
                [row["model"], row["steps"], f"latency_{part}_ms", *(interval[n] for n in names), "", "", "", 0, ""]
            )
    return out.getvalue()


def latex(found: list[Table]) -> str:
    """booktabs tables; the best of a column bold, what cannot be told from it underlined."""
    parts = []
    for table in found:
        lines = [
            f"% {table.title}, {table.better} is better", f"\\begin{{tabular}}{{l{'r' * len(table.steps)}}}", "\\toprule",
            " & ".join([_escape(table.title), *(_plural(n) for n in table.steps)]) + r" \\", "\\midrule",
        ]  # fmt: skip
        rows = list(table.rows.items())
        if table.paper:
            rows += [(f"paper: {model}", row) for model, row in table.paper.items()]
        for model, row in rows:
            cells = []
            for n in table.steps:
                entry = row.get(n)
                text = "" if entry is None else f"${entry.text}$".replace("±", r"\pm").replace("†", r"^\dagger")
                bold = text.replace("$", r"$\mathbf{", 1)[:-1] + "}$" if entry and entry.best else text
                cells.append(rf"\underline{{{text}}}" if entry and entry.tie else bold)
            lines.append(" & ".join([_escape(model), *cells]) + r" \\")
        parts.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for old, new in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#"), ("$", r"\$")):
        text = text.replace(old, new)
    return text
