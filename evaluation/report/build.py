"""Write the report of an evaluation's results: report.html (all in it), report.md, report.csv, report.tex."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from evaluation.harness.pieces import write_whole
from evaluation.harness.prompts import Row
from evaluation.harness.store import Store, picture_name, shard_of
from evaluation.report.paper import FID_REMARK, TABLE_2
from evaluation.report.plots import quality_plots
from evaluation.report.tables import (
    SPEED,
    as_csv,
    escape,
    latex,
    latex_list,
    markdown,
    paper_rows,
    speed_words,
    speeds,
    tables,
)

GRID_PROMPTS = 8
CASES = 4
"""Best and as many worst pictures shown of each model and measure."""
SIDE = 256
"""Larger pictures are made smaller and JPEG in the page."""


class Pictures:
    """Pictures of the store as data URLs; the shard that was read last is kept."""

    def __init__(self, out: str, rows: Sequence[Row], per_shard: int):
        self.store, self.rows, self.per_shard = Store(out), rows, per_shard
        self.last: tuple[tuple[str, str], dict[str, bytes]] = (("", ""), {})

    def png(self, cell: str, key: str) -> bytes:
        """The file of the picture of a row in a cell."""
        name, part = shard_of(self.rows, self.per_shard, key)
        if self.last[0] != (cell, name):
            self.last = (cell, name), self.store.members(cell, part)
        return self.last[1][f"{picture_name(key)}.png"]

    def url(self, cell: str, key: str) -> str:
        """Of the picture of a row in a cell."""
        png = self.png(cell, key)
        picture = Image.open(io.BytesIO(png))
        if picture.width <= SIDE:
            return "data:image/png;base64," + base64.b64encode(png).decode()
        out = io.BytesIO()
        picture.convert("RGB").resize((SIDE, SIDE * picture.height // picture.width)).save(out, "JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()

    def small(self, cell: str) -> bool:
        """Whether the pictures are so small that a browser must not smooth them."""
        return Image.open(io.BytesIO(self.png(cell, self.rows[0].key))).width <= 96


def write_report(results: dict[str, Any], rows: Sequence[Row], folder: Path, title: str = "Evaluation") -> list[Path]:
    """The four files in `folder`; `rows` are the prompts of `results`."""
    found = tables(results)
    words = [summary(results, title), *results.get("remarks", [])]
    about = provenance_rows(results)
    told = "\n".join(f"- {name}: {value}" for name, value in about)
    in_latex = [*map(escape, [title, *words]), latex(found, results), escape(FID_REMARK), latex_list(about)]
    texts = {
        "report.html": page(results, rows, title),
        "report.md": "\n\n".join([f"# {title}", *words, markdown(found, results), FID_REMARK, told]) + "\n",
        "report.csv": as_csv(found, results),
        "report.tex": "\n\n".join(in_latex) + "\n",
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def summary(results: dict[str, Any], title: str) -> str:
    """What was judged and how to read it, in a paragraph."""
    settings, prompts = results["settings"], results["prompts"]
    per = settings["images_per_prompt"]
    pictures = f"{prompts['count']} prompts ({prompts['name']})" + (f", {per} pictures of each" if per > 1 else "")
    several = any(row["spread"] for row in results["rows"])
    over = (
        "the prompts (bootstrap), and over the trainings where a model has several (Student's t)"
        if several
        else "the prompts (bootstrap)"
    )
    said = [
        f"{pictures}, the same noise for all models, sampler {settings['scheduler']}. ± is half of the 95% interval over "
        f"{over}. Bold is the best model of a column; ≈ marks those that cannot be told from it (the interval of the "
        "paired difference holds 0)."
    ]
    if results["baseline"]:
        said.append(
            f"Differences, with their intervals, are to the baseline ({results['baseline']}) on the same prompts and noise."
        )
    if several:
        said.append(
            "Models trained from several seeds are one row: the mean over them; sd is the spread of their means."
        )
    return " ".join(said)


def provenance_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What made the numbers."""
    about, settings, done = results["provenance"], results["settings"], results["done"]
    changed = " with changes" if about["changed"] else ""
    rows = [
        ("code", about["commit"][:12] + changed),
        ("packages", ", ".join(f"{name} {version}" for name, version in about["packages"].items())),
        ("machine", f"{about['device']}, {about['cores']} cores"),
        (
            "base model",
            f"{about['base']}, sha256 {about['base_sha256'][:16]}, teacher's guidance {settings['teacher_guidance']:g}",
        ),
        (
            "prompts",
            f"{results['prompts']['name']}, {results['prompts']['count']}, sha256 {results['prompts']['sha256'][:16]}",
        ),
        ("seed", str(settings["seed"])),
        (
            "last run of the job",
            f"{done['made']} pictures made, {done['judged']} judgements of a shard, {done['seconds']:.0f} s",
        ),
    ]
    alike: dict[tuple[str, str], list[int]] = {}
    for row in results["rows"]:
        how = ", ".join(
            f"{k} {v}" for k, v in row["how"].items() if v not in (None, 0.0, 1.0) or (k, v) == ("eta", 1.0)
        )
        weights = ", ".join(w[:12] for w in row["weights"] if w) or "the base's own"
        alike.setdefault((row["model"], f"{how}; weights {weights}"), []).append(row["steps"])
    for (model, text), steps in alike.items():
        rows.append((model, f"steps {', '.join(map(str, steps))}: {text}"))
    return [*rows, *((name, str(value)) for name, value in results.get("notes", {}).items())]


def page(results: dict[str, Any], rows: Sequence[Row], title: str) -> str:
    """The HTML page."""
    pictures = Pictures(results["settings"]["out"], rows, results["settings"]["per_shard"])
    found, plain = tables(results), {card["name"]: card for card in results["cards"]}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        title=title, summary=summary(results, title), tables=found, cards=results["cards"], plain=plain,
        plots={table.name: quality_plots(results, table.name, table.title) for table in found},
        speeds=speeds(results), columns=SPEED, timed=speed_words(results), grids=grids(results, rows, pictures), cases=cases(results, pictures),
        small=pictures.small(results["rows"][0]["cells"][0]), fid=FID_REMARK, provenance=provenance_rows(results),
        baseline=results["baseline"], paper=[] if paper_rows(results) else TABLE_2, settings=results["settings"],
        notes=results.get("remarks", []),
    )  # fmt: skip


def grids(results: dict[str, Any], rows: Sequence[Row], pictures: Pictures) -> list[dict[str, Any]]:
    """Per number of steps: the models' pictures of the first prompts from the same noise; the baseline's on top."""
    steps = results["settings"]["steps"]
    above = [row for row in results["rows"] if row["model"] == results["baseline"] and row["steps"] not in steps]
    shown = list(rows[:GRID_PROMPTS])
    found = []
    for n in steps:
        lines = [
            {"name": row["model"], "urls": [pictures.url(row["cells"][0], r.key) for r in shown]}
            for row in [*above, *(row for row in results["rows"] if row["steps"] == n)]
        ]
        if lines:
            found.append({"steps": n, "prompts": [r.prompt for r in shown], "lines": lines})
    return found


def cases(results: dict[str, Any], pictures: Pictures) -> dict[str, list[dict[str, Any]]]:
    """Best and worst pictures by model, at its fewest steps and at 4 (or the most below)."""
    found: dict[str, list[dict[str, Any]]] = {}
    steps = results["settings"]["steps"]
    chosen = sorted({min(steps), max((n for n in steps if n <= 4), default=min(steps))})
    for row in results["rows"]:
        if row["steps"] in steps and row["steps"] not in chosen:
            continue
        for name, ends in row["cases"].items():
            shown = {
                end: [{"url": pictures.url(row["cells"][0], key), "prompt": prompt, "value": value}
                      for key, prompt, value in ends[end][:CASES]]
                for end in ("best", "worst")
            }  # fmt: skip
            found.setdefault(row["model"], []).append({"steps": row["steps"], "measure": name, **shown})
    return found
