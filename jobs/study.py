"""Let people choose between two models' pictures, and see whose they prefer (paper, Fig. 7).

    python jobs/study.py serve --images hyper=runs/hyper/images teacher=runs/teacher/images   # http://127.0.0.1:8080
    python jobs/study.py results                                                              # win rates, Bradley-Terry
    python jobs/study.py export --out votes.csv

A folder holds a picture a prompt, NAME.png with its text in NAME.txt (jobs/evaluate.py --export-images makes them); pictures of one name are compared. Raters see two
at a time without the models' names, sides at random, some pairs twice. Votes are kept in --database (an SQLite file, or
SQLAlchemy's URL of a PostgreSQL database: postgresql+psycopg://user:password@host/name) before they are acknowledged; a study that is started again goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import tyro
from pydantic import Field

from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job


class Votes(Strict):
    """Where the votes are."""

    database: str = "runs/study.db"
    """SQLite file, or an SQLAlchemy URL such as postgresql+psycopg://user@host/name."""


class Serve(Votes):
    """Serve the page until it is interrupted."""

    images: tuple[str, ...]
    """name=folder for each model."""
    question: str = "Which picture is better: closer to the text, and better to look at?"
    """Stands above every pair."""
    per_rater: int = Field(default=60, ge=1)
    """Pairs a rater is asked."""
    repeat_every: int = Field(default=10, ge=0)
    """Every so many pairs one is shown a second time, sides changed, to see how steady raters are; 0 is never."""
    host: str = "127.0.0.1"
    """Address to listen on; there is no password, so put another than loopback behind one."""
    port: int = Field(default=8080, ge=1, le=65535)
    """Its port."""
    seed: int | None = None
    """Of the order and the sides; None differs every time."""


class Results(Votes):
    """Print win rates and Bradley-Terry scores, with intervals."""

    json_: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """A file for the same as JSON."""
    resamples: int = Field(default=1000, ge=100)
    """Of the bootstrap over prompts."""


class Export(Votes):
    """Write the votes as CSV, a line each."""

    out: Path = Path("votes.csv")
    """The file."""


Command = (
    Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Results, tyro.conf.subcommand("results")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main() -> None:
    """Do what the command says."""
    config: Command = read_options(Command, sys.argv[1:], __doc__ or "")
    from evaluation.harness.pieces import write_whole
    from evaluation.study import analysis
    from evaluation.study.store import Store, without_password

    if isinstance(config, Serve):
        serve(config)
        return
    if "://" not in config.database and not Path(config.database).exists():
        raise ConfigError(f"--database {config.database}: there is no such file; `study.py serve` makes it")
    votes = Store(config.database).votes()
    if isinstance(config, Export):
        try:
            print(f"{analysis.write_csv(votes, config.out)} votes in {config.out}")
        except OSError as error:
            raise ConfigError(f"--out {config.out} cannot be written: {error.strerror}") from None
        return
    try:
        results = analysis.analyse(votes, config.resamples)
    except ValueError as error:
        raise ConfigError(f"--database {without_password(config.database)}: {error}") from None
    print(analysis.as_text(results))
    if config.json_:
        pairs = {f"{a} over {b}": asdict(rate) for (a, b), rate in results.win_rates.items()}
        counts = {f"{a} over {b}": count for (a, b), count in results.votes.items()}
        write_whole(config.json_, json.dumps(asdict(results) | {"win_rates": pairs, "votes": counts}, indent=1) + "\n")


def serve(config: Serve) -> None:
    """The page, until it is interrupted."""
    import uvicorn

    from evaluation.study.app import Study, make_app
    from evaluation.study.entries import Entries, read_folders
    from evaluation.study.store import Store

    entries = Entries(read_folders(config.images))
    store = Store(config.database)
    store.keep_pictures(entries.hashes())
    study = Study(entries, store, config.question, config.per_rater, config.repeat_every, config.seed)
    for model, count in entries.left_out.items():
        if count:
            print(f"{count} pictures of {model} have no counterpart and are left out")
    print(
        f"{len(entries.names)} prompts, {len(entries.comparisons)} pairs: http://{config.host}:{config.port}",
        flush=True,
    )
    uvicorn.run(make_app(study), host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run_job(main)
