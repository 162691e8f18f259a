"""All methods under one budget: the trainings a comparison consists of, each done once, and what comes of them.

{out}/pieces/                 trainings (or chains of them) that are done or under way: see pieces.py
{out}/runs/{run}/             the runs, as the training jobs leave them
{out}/evaluation/             pictures and scores
{out}/selection.json          what each learning rate was worth
{out}/report.html ...         the table
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.harness.chains import chain_hash, check, default_lr, serving, sweep
from evaluation.harness.judges import chosen_judges
from evaluation.harness.pieces import POLL_S, Piece, Pieces, read_json, write_json, write_whole
from evaluation.harness.plan import plan
from evaluation.harness.prompts import Row, read_rows, selection_captions
from evaluation.harness.run import evaluate
from evaluation.harness.subjects import TEACHER, Subject, base_sha256, find_baseline, read_run, run_subject, teacher
from evaluation.harness.telling import told
from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.precompute import resolve
from hypersd_ray.recipes.compare import TRAININGS
from hypersd_ray.recipes.methods import Chain, Config, teacher_passes
from hypersd_ray.trainer import run
from hypersd_ray.trainer.kinds import KINDS, kind_of

Log = Callable[[str], None]
DIVERGED = "NaN or inf"
"""In the words of a run that stops after run.max_bad_steps bad steps."""


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
        check(config, chosen_judges(self.evaluation()))
        self._same()

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What decides trainings and choices and is in no file's name."""
        chains = {method: chain_hash(method, self.config.budget) for method in self.config.methods}
        return {
            "budget": self.config.budget, "teacher": Path(self.config.teacher).name,
            "base_sha256": base_sha256(self.config.teacher), "shards": self.config.shards, "chains": chains,
            # ... and what its learning rates are chosen by
            "select": self.config.select, "selection_prompts": self.config.selection_prompts,
            "steps": list(self.config.steps), "first seed": self.config.seeds[0],
        }  # fmt: skip

    def _same(self) -> None:
        """A folder holds one comparison. What one of an earlier version did not keep is taken on trust."""
        theirs = read_json(self.out / "comparison.json", {})
        ours = {name: value for name, value in self.about.items() if name != "chains"}
        ours |= {f"chain of {m}": value for m, value in self.about["chains"].items()}
        theirs = theirs | {f"chain of {m}": value for m, value in theirs.get("chains", {}).items()}
        for name, value in ours.items():
            if theirs.get(name, value) != value:
                raise ConfigError(
                    f"--out {self.out} holds a comparison with {name}={theirs[name]}, not {value}: name another"
                )

    def begin(self) -> None:
        """Make the folder."""
        chains = read_json(self.out / "comparison.json", {}).get("chains", {})
        write_json(self.out / "comparison.json", self.about | {"chains": chains | self.about["chains"]})
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

    def made_for(self, method: str) -> list[int]:
        """The numbers of steps among the table's that the method is made for: its rate is chosen on those."""
        first = TRAININGS[method](budget=self.config.budget).first
        samplings = KINDS[kind_of(first)].samplings(first)
        straight = isinstance(first, TSCDConfig) and first.distill.path == "straight"
        made = {one.steps for one in samplings if one.windows is not None or not straight}
        return [n for n in self.config.steps if n in made] or list(self.config.steps)

    def swept(self, method: str) -> list[Piece]:
        """A piece a rate of its sweep, and `config.extend` beyond while the best of those before is at the edge."""
        pieces, first = sweep(self.config, method), self.config.seeds[0]
        for _ in range(self.config.extend if len(pieces) > 1 else 0):
            best, rates = self._best_of(method, pieces), sorted(piece.lr for piece in pieces)
            if best not in (rates[0], rates[-1]):
                break
            beyond = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
            pieces.append(Piece(method, float(f"{beyond:.4g}"), first))
        return pieces

    def best(self, method: str) -> float | None:
        """The learning rate that was chosen; None before that is known."""
        pieces = self.swept(method)
        if len(pieces) == 1:
            return None if self.over(method) else pieces[0].lr
        return self._best_of(method, pieces)

    def _best_of(self, method: str, pieces: list[Piece]) -> float | None:
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
        return [*self.swept(method), *later]

    def over(self, method: str) -> bool:
        """Whether a method diverged at every rate of its sweep."""
        return all(self.done(p) and not self.usable(p) for p in self.swept(method))

    @property
    def left(self) -> int:
        """Pieces that are not done; a method that diverged at every rate has no further seeds."""
        left = 0
        for method in self.config.methods:
            left += 0 if self.over(method) else sum(self.done(piece) is None for piece in self.pieces(method))
        return left

    def plan(self) -> list[str]:
        """Lines for a person: each piece, and whether it is done."""
        lines: list[str] = []
        seconds: list[float] = []
        for method in self.config.methods:
            first, known = self.swept(method), self.best(method) is not None
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
        """All runs of a piece, from where they stand; one that diverges is put down as that.

        Raises:
            RunError: a run cannot go on: a full disk, a dead node. That may be mended, and the piece go on.
        """
        chain = self.chain(piece)
        configs, folders = [self._placed(chain.first)], []
        seconds = lambda: sum(self.there.spent(config.run.name) for config in configs)
        try:
            for link in [*chain.then, None]:
                name = configs[-1].run.name
                # Chains that begin alike share a run: it is trained once, and counts in each.
                with self.there.held(f"run-{name}", self.log), self.there.timed(name):
                    folders.append(run.train(configs[-1]).folder)
                if link is not None:
                    above = configs[link.above]
                    lora = f"{folders[link.above]}/{KINDS[kind_of(above)].product(above, link.steps)}"
                    configs.append(self._placed(link.config(lora)))
        except RunError as error:
            if DIVERGED not in str(error):
                raise
            self.there.finish(piece, runs=[], seconds=seconds(), teacher_passes=0, diverged=str(error))
            self.log(f"{piece.name} diverged: {error}")
            return
        serves = {str(n): folders[place] for n, place in chain.serves.items()}
        passes = sum(map(teacher_passes, configs))
        self.there.finish(piece, runs=folders, serves=serves, seconds=seconds(), teacher_passes=passes)

    def _placed(self, config: Config) -> Config:
        """In the comparison's folder, with one store of latents for all, on what it trains on."""
        gpus = self.config.gpus_per_worker
        placed = config.run.model_copy(update={"out": str(self.out / "runs"), "gpus_per_worker": gpus})
        if isinstance(config, FeedbackConfig):
            # The embedded judges are small: beside the model they need no place, and no start, of their own.
            config = config.model_copy(update={"placement": config.placement.model_copy(update={"where": "local"})})
        own = {"shards": self.config.shards} if self.config.shards else {}
        data = config.data.model_copy(update={"cache_dir": str(self.out / "latents"), **own})
        return config.model_copy(update={"run": placed, "data": data})

    def missing(self) -> list[Piece]:
        """Pieces to train, in order; a method's further seeds come once its rate is chosen."""
        first = [piece for method in self.config.methods for piece in self.swept(method)]
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
        self._encode(piece)
        self.train(piece)
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
            "base": c.teacher, "steps": c.steps, "limit": c.prompts, "baseline": TEACHER, "judges": c.judges,
            "latency_repeats": c.latency_repeats, "generators": c.generators, "scorers": c.scorers,
            "per_shard": c.per_shard, "out": str(self.out / "evaluation"),
        }  # fmt: skip
        return EvaluateConfig(**values | changes)

    def subject(self, piece: Piece, name: str, config: EvaluateConfig, noisy: tuple[int, ...] = ()) -> Subject:
        """A finished piece: at each number of steps the run that is for it, else the last; at those of `noisy` with new noise
        between the steps, where that is a choice."""
        found = self.done(piece)
        assert found is not None
        serves = {int(n): run for n, run in found.get("serves", {}).items()}
        folders = {n: Path(serving(serves, n) or found["runs"][-1]) for n in config.steps}
        noisy = noisy if self.chain(piece).gamma else ()
        parts: dict[int, Subject] = {}
        for n, folder in folders.items():
            settings = config.model_copy(update={"steps": (n,), "eta": 1.0 if n in noisy else None})
            parts[n] = run_subject(name, folder, read_run(folder), settings)
        return replace(parts[config.steps[0]], parts={n: parts[n].parts[n] for n in config.steps})

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
            if self.best(method) is None and all(self.done(piece) for piece in self.swept(method))
            and any(f"{piece.lr:g}" not in self.chosen.get(method, {}) for piece in self.swept(method))
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
        pieces = [piece for method in todo for piece in self.swept(method)]
        self.log(f"choosing the learning rates of {', '.join(todo)}")
        subjects = [
            self.subject(piece, piece.name, config.model_copy(update={"steps": tuple(self.made_for(piece.method))}))
            for piece in pieces if self.usable(piece)
        ]  # fmt: skip
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
                noisy = self.config.noisy_steps
                subjects += [self.subject(p, method, config, noisy) for p in self.final(method) if self.usable(p)]
        if len(subjects) == 1:
            raise ConfigError(f"--out {self.out}: no method has a finished training at its best learning rate yet")
        with self.there.held("judging"):
            what = plan(
                config, rows, subjects, find_baseline(config)
            )  # the teacher's best is in the table whatever the baseline
            if self.config.baseline != TEACHER:
                what = replace(what, baseline=self.config.baseline)
            results = evaluate(what, self.log)
        return told(self, results), rows
