"""All methods under one budget: the trainings a comparison consists of, each done once, and what comes of them.

{out}/pieces/                 trainings (or chains of them) that are done or under way: see pieces.py
{out}/runs/{run}/             the runs, as the training jobs leave them
{out}/evaluation/             pictures and scores
{out}/selection.json          what each learning rate was worth
{out}/report.html ...         the table
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.harness.judges import chosen_judges
from evaluation.harness.pieces import POLL_S, Piece, Pieces, read_json, write_json, write_whole
from evaluation.harness.prompts import Row, read_rows
from evaluation.harness.run import evaluate, plan
from evaluation.harness.subjects import Subject, find_baseline, read_run, run_subject, teacher
from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.data.precompute import resolve
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.compare import TRAININGS
from hypersd_ray.recipes.methods import Chain, Config, teacher_passes
from hypersd_ray.trainer import run
from hypersd_ray.trainer.kinds import KINDS, kind_of

Log = Callable[[str], None]
DIVERGED = "NaN or inf"
"""In the words of a run that stops after run.max_bad_steps bad steps."""


def default_lr(method: str) -> float:
    """The method's own learning rate."""
    return inspect.signature(TRAININGS[method]).parameters["lr"].default


def sweep(config: CompareConfig, method: str) -> list[Piece]:
    """A piece a rate."""
    # %g is the run's name: two rates must not share it, nor one have two
    rates = [float(f"{factor * default_lr(method):.4g}") for factor in config.rates]
    return [Piece(method, rate, config.seeds[0]) for rate in rates]


class Comparison:
    """A comparison in its folder.

    Raises:
        ConfigError: an unknown method, a budget too small for one, a folder of another comparison.
    """

    def __init__(self, config: CompareConfig, log: Log = lambda _: None):
        self.config, self.log = config, log
        self.out = Path(config.out).expanduser().resolve()
        self.there = Pieces(self.out)
        self.encoded = False
        unknown = [m for m in config.methods if m not in TRAININGS]
        if unknown:
            raise ConfigError(f"--methods {unknown[0]}: choose of {', '.join(TRAININGS)}")
        if config.select not in type(config.judges).model_fields:
            raise ConfigError(
                f"--select {config.select} is no judge: one of {', '.join(type(config.judges).model_fields)}"
            )
        for method in config.methods:
            try:
                TRAININGS[method](budget=config.budget)
            except ConfigError as error:
                raise ConfigError(f"--budget {config.budget} with method {method}: {error}") from None
        self._same()

    def _same(self) -> None:
        """The budget is in no file's name, so it is looked after here."""
        path, ours = (
            self.out / "comparison.json",
            {"budget": self.config.budget, "teacher": Path(self.config.teacher).name},
        )
        if not path.exists():
            return
        theirs = read_json(path)
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"--out {self.out} holds a comparison with {name}={theirs.get(name)}, not {value}: name another"
                )

    def begin(self) -> None:
        """Make the folder."""
        about = {"budget": self.config.budget, "teacher": Path(self.config.teacher).name}
        write_json(self.out / "comparison.json", about)
        self.there.folder.mkdir(exist_ok=True)

    def done(self, piece: Piece) -> dict[str, Any] | None:
        """What a finished piece left."""
        return self.there.done(piece)

    def usable(self, piece: Piece) -> bool:
        """Finished, and not diverged."""
        found = self.done(piece)
        return found is not None and not found.get("diverged")

    @property
    def chosen(self) -> dict[str, dict[str, float | None]]:
        """method -> learning rate (as text) -> the selecting judge's mean; None for one that diverged."""
        return read_json(self.out / "selection.json", {})

    def best(self, method: str) -> float | None:
        """The learning rate that was chosen; None before that is known."""
        pieces = sweep(self.config, method)
        if len(pieces) == 1:
            return pieces[0].lr
        scores = self.chosen.get(method, {})
        if not all(f"{piece.lr:g}" in scores for piece in pieces):
            return None
        lasting = {piece.lr: score for piece in pieces if (score := scores[f"{piece.lr:g}"]) is not None}
        return max(lasting, key=lambda lr: lasting[lr]) if lasting else None

    def final(self, method: str) -> list[Piece]:
        """All seeds at the best rate, known or not yet: then at the method's own."""
        lr = self.best(method)
        return [Piece(method, lr if lr is not None else default_lr(method), seed) for seed in self.config.seeds]

    def pieces(self, method: str) -> list[Piece]:
        """All of a method, in order."""
        later = [piece for piece in self.final(method) if piece.seed != self.config.seeds[0]]
        return [*sweep(self.config, method), *later]

    @property
    def left(self) -> int:
        """Pieces that are not done; a method that diverged at every rate has no further seeds."""
        left = 0
        for method in self.config.methods:
            over = all(self.done(p) and not self.usable(p) for p in sweep(self.config, method))
            left += 0 if over else sum(self.done(piece) is None for piece in self.pieces(method))
        return left

    def plan(self) -> list[str]:
        """Lines for a person: each piece, and whether it is done."""
        lines: list[str] = []
        seconds: list[float] = []
        for method in self.config.methods:
            first, known = sweep(self.config, method), self.best(method) is not None
            for piece in self.pieces(method):
                found = self.done(piece)
                seconds += [found["seconds"]] if found else []
                name = piece.name if known or piece in first else f"{method}-lr?-seed{piece.seed}"
                state = f"done in {found['seconds']:.0f} s" if found else "to do"
                if not found and (holder := self.there.holder(piece.name)):
                    state = f"under way in process {holder['pid']} of {holder['host']}"
                state += f", {found['diverged']}" if found and found.get("diverged") else ""
                lines.append(f"{name:40s} {state}")
        left = self.left
        if seconds:
            lines.append(f"{left} to do, some {left * sum(seconds) / len(seconds) / 60:.0f} minutes at the rate so far")
        else:
            lines.append(f"{left} to do")
        return lines

    # training

    def chain(self, piece: Piece) -> Chain:
        """Its runs' configurations."""
        return TRAININGS[piece.method](budget=self.config.budget, lr=piece.lr, seed=piece.seed)

    def train(self, piece: Piece) -> None:
        """All runs of a piece, from where they stand; seconds add up over the times it is stopped."""
        begun, before = time.perf_counter(), self.there.spent(piece)
        seconds = lambda: before + time.perf_counter() - begun
        chain = self.chain(piece)
        folders, passes = [], 0
        current: Config | None = self._placed(chain.first)
        try:
            for link in [*chain.then, None]:
                assert current is not None
                result = run.train(current)
                folders.append(result.folder)
                passes += teacher_passes(current)
                if link is not None:
                    lora = f"{result.folder}/{KINDS[kind_of(current)].product(current, 1)}"
                    current = self._placed(link(lora))
        except BaseException:
            self.there.spend(piece, seconds())
            raise
        self.there.finish(piece, runs=folders, seconds=seconds(), teacher_passes=passes)

    def _placed(self, config: Config) -> Config:
        """In the comparison's folder, with one store of latents for all."""
        placed = config.run.model_copy(update={"out": str(self.out / "runs")})
        own = {"shards": self.config.shards} if self.config.shards else {}
        data = config.data.model_copy(update={"cache_dir": str(self.out / "latents"), **own})
        return config.model_copy(update={"run": placed, "data": data})

    def missing(self) -> list[Piece]:
        """Pieces to train, in order; a method's further seeds come once its rate is chosen."""
        first = [piece for method in self.config.methods for piece in sweep(self.config, method)]
        known = [method for method in self.config.methods if self.best(method) is not None]
        later = [piece for method in known for piece in self.final(method)]
        return [piece for piece in dict.fromkeys([*first, *later]) if self.done(piece) is None]

    def train_all(self) -> int:
        """How many pieces are still to do. Several processes may be at one folder: each takes what no other has.

        Raises:
            RunError: a training cannot go on; one that diverges is put down as that, and the others go on.
        """
        begun, trained, idle = time.monotonic(), 0, 0
        while True:
            self.select()
            todo = self.missing()
            late = self.config.minutes is not None and time.monotonic() - begun > 60 * self.config.minutes
            if not self.left or late or (self.config.pieces is not None and trained >= self.config.pieces):
                return self.left
            piece = next((piece for piece in todo if self.there.claim(piece.name)), None)
            if piece is not None:
                idle = 0
                try:
                    trained += self._train_claimed(piece, len(todo))
                finally:
                    self.there.release(piece.name)
                continue
            # What can be done now is under way elsewhere, and more may come of it; or nothing can.
            idle += 1
            if self.others:
                if idle == 1:
                    self.log(f"waiting for {', '.join(self.others)}, which another process has")
                time.sleep(POLL_S)
            elif idle > 1 and not todo:
                return self.left

    @property
    def others(self) -> list[str]:
        """What another process is at."""
        names = [piece.name for method in self.config.methods for piece in self.pieces(method)]
        return [name for name in ("selection", *names) if self.there.holder(name)]

    def _train_claimed(self, piece: Piece, todo: int) -> int:
        """1; 0 where another process finished the piece between the look and the claim."""
        if self.done(piece):
            return 0
        self.log(f"training {piece.name} ({todo} to do now)")
        try:
            self._encode(piece)
            self.train(piece)
        except RunError as error:
            if DIVERGED not in str(error):  # a full disk, a dead node: that may be mended, and the piece go on
                raise
            self.there.finish(piece, runs=[], seconds=self.there.spent(piece), teacher_passes=0, diverged=str(error))
            self.log(f"{piece.name} diverged: {error}")
        return 1

    def _encode(self, piece: Piece) -> None:
        """The latents that all trainings share, by one process alone."""
        if self.encoded:
            return
        config = run.absolute_paths(self._placed(self.chain(piece).first))
        with self.there.held("latents"):
            run.connect()
            resolve(config.data, config.teacher, str(self.out / "runs"))
        self.encoded = True

    # judging

    def evaluation(self, **changes: Any) -> EvaluateConfig:
        """The harness's configuration."""
        c = self.config
        values: dict[str, Any] = {
            "base": c.teacher, "steps": c.steps, "limit": c.prompts, "baseline": "teacher", "judges": c.judges,
            "latency_repeats": c.latency_repeats, "generators": c.generators, "scorers": c.scorers,
            "per_shard": c.per_shard, "out": str(self.out / "evaluation"),
        }  # fmt: skip
        return EvaluateConfig(**values | changes)

    def subject(self, piece: Piece, name: str, config: EvaluateConfig) -> Subject:
        """The last run of a finished piece."""
        found = self.done(piece)
        assert found is not None
        folder = Path(found["runs"][-1])
        return run_subject(name, folder, read_run(folder), config)

    def select(self) -> None:
        """Score the rates of the methods whose sweep is complete."""
        if not self._to_select() or not self.there.claim("selection"):
            return
        try:
            if todo := self._to_select():  # another process may just have done it
                self._select(todo)
        finally:
            self.there.release("selection")

    def _to_select(self) -> list[str]:
        return [
            method for method in self.config.methods
            if self.best(method) is None and method not in self.chosen
            and all(self.done(piece) for piece in sweep(self.config, method))
        ]  # fmt: skip

    def _select(self, todo: list[str]) -> None:
        prompts = self.out / "selection.txt"
        write_whole(prompts, "\n".join(selection_captions(self.config.selection_prompts)) + "\n")
        found = chosen_judges(self.evaluation())
        only = JudgesConfig(**{
            name: getattr(found, name) for name in (self.config.select, "clip_large", "image_reward_tokenizer")
        })  # fmt: skip
        config = self.evaluation(
            prompts="file", prompts_file=str(prompts), limit=None, judges=only, baseline="", latency_repeats=0, reference_steps=0
        )  # fmt: skip
        pieces = [piece for method in todo for piece in sweep(self.config, method)]
        self.log(f"choosing the learning rates of {', '.join(todo)}")
        subjects = [self.subject(piece, piece.name, config) for piece in pieces if self.usable(piece)]
        what = plan(config, read_rows(config), subjects, only=(self.config.select,))
        results = evaluate(what, self.log) if subjects else {"rows": []}
        chosen = self.chosen
        for piece in pieces:
            means = [
                row["measures"][self.config.select]["mean"] for row in results["rows"] if row["model"] == piece.name
            ]  # fmt: skip
            score = sum(means) / len(means) if means and None not in means else None
            chosen.setdefault(piece.method, {})[f"{piece.lr:g}"] = score
        write_json(self.out / "selection.json", chosen)

    def judge(self) -> tuple[dict[str, Any], list[Row]]:
        """Results of all methods that have a finished training at their rate, and the prompts.

        Raises:
            ConfigError: there is none.
        """
        config = self.evaluation()
        rows = read_rows(config)
        subjects = [teacher(config, config.steps)]
        for method in self.config.methods:
            if self.best(method) is not None:
                subjects += [self.subject(p, method, config) for p in self.final(method) if self.usable(p)]
        if len(subjects) == 1:
            raise ConfigError(f"--out {self.out}: no method has a finished training at its best learning rate yet")
        with self.there.held("judging"):
            results = evaluate(plan(config, rows, subjects, find_baseline(config)), self.log)
        return results | {"notes": self.notes(), "remarks": self.remarks()}, rows

    def notes(self) -> dict[str, str]:
        """Rates, seeds and cost of each method, for the provenance."""
        notes = {"budget": f"{self.config.budget} images through the teacher, each training"}
        for method in self.config.methods:
            lr, scores = self.best(method), self.chosen.get(method, {})
            if lr is None:
                continue
            done = [found for p in self.final(method) if self.usable(p) and (found := self.done(p))]
            told = {rate: "diverged" if score is None else f"{score:.2f}" for rate, score in scores.items()}
            tried = ", ".join(f"{rate}: {score}" for rate, score in told.items()) or "one rate, none to choose of"
            cost = sum(found["seconds"] for found in done) / max(1, len(done))
            notes[f"training of {method}"] = (
                f"lr {lr:g} ({self.config.select} on {self.config.selection_prompts} training captions: {tried}); "
                f"{len(done)} seeds; {done[0]['teacher_passes'] if done else 0} teacher passes; {cost:.0f} s"
            )
        return notes

    def remarks(self) -> list[str]:
        """What a reader must know of the table."""
        remarks = [
            f"Every method trained with {self.config.budget} images through one teacher, from one stream of data; learning rate the "
            f"best of {len(self.config.rates)} by {self.config.select} on captions outside of this table; {len(self.config.seeds)} "
            "seeds at that rate. Each samples as its recipe has it, in as many steps as the column says."
        ]
        if {"turbo", "dmd"} & set(self.config.methods) and max(self.config.steps) > 4:
            remarks.append(
                "Turbo and DMD are made for 4 steps and fewer: their longer columns are beyond their training."
            )
        return remarks


def selection_captions(count: int) -> list[str]:
    """The first distinct captions of the embedded training pictures that are not held out too."""
    held_out = _captions("val")
    found = [caption for caption in _captions("train") if caption not in set(held_out)]
    return found[:count]


def _captions(split: str) -> list[str]:
    rows = json.loads((paths.DATA / f"captions_{split}.json").read_text())["annotations"]
    return list(dict.fromkeys(row["caption"].strip() for row in rows))
