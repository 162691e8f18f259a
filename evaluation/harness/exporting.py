"""Pictures out of the store into folders, as a study of people's choices takes them (jobs/study.py)."""

from __future__ import annotations

import re
from pathlib import Path

from evaluation.harness.pieces import write_whole
from evaluation.harness.plan import Plan
from evaluation.harness.store import Store, picture_name, shards_of


def export_images(what: Plan, folder: Path) -> dict[str, Path]:
    """A folder for each model and number of steps, NAME.png and NAME.txt for each prompt: the first training's pictures.
    Names are a function of the prompt alone. Returns name -> folder.

    Raises:
        RunError: no space; one line.
    """
    store, found = Store(what.config.out), {}
    for (model, steps), cells in what.groups.items():
        name = model if model.endswith(f" at {steps}") else f"{model}-{steps}"
        name = re.sub(r"[^\w.+-]+", "-", name)
        found[name] = folder / name
        for part in shards_of(what.rows, what.config.per_shard):
            members = store.members(cells[0].key, part)
            for row in part:
                stem = picture_name(row.key)
                write_whole(found[name] / f"{stem}.png", members[f"{stem}.png"])
                write_whole(found[name] / f"{stem}.txt", row.prompt + "\n")
    return found
