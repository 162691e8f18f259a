"""What an evaluation consists of: models at numbers of steps, prompts, judges, references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.harness.judges import JudgeSpec, chosen_judges, judge_specs
from evaluation.harness.prompts import Row
from evaluation.harness.subjects import Cell, Subject, teacher
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.data.sources import find_shards


@dataclass(frozen=True)
class Plan:
    """What an evaluation consists of, before anything is made."""

    config: EvaluateConfig
    rows: list[Row]
    subjects: list[Subject]
    baseline: str
    specs: list[JudgeSpec]
    groups: dict[tuple[str, int], list[Cell]]
    references: dict[int, Cell]
    between: JudgeSpec | None = None

    @property
    def cells(self) -> list[Cell]:
        """All that are judged."""
        return [cell for cells in self.groups.values() for cell in cells]


def plan(
    config: EvaluateConfig,
    rows: list[Row],
    subjects: Sequence[Subject],
    baseline: Subject | None = None,
    only: Sequence[str] = (),
) -> Plan:
    """Which cells there are. Subjects of one name are one model, trained from several seeds. `only` these judges; none: all.

    Raises:
        ConfigError: judges' files or real pictures are missing; the baseline has the name of a model that it is not.
    """
    for subject in subjects:
        if baseline is not None and subject.name == baseline.name and not _one_model(subject, baseline):
            raise ConfigError(
                f"--baseline {config.baseline} and another model are both called {subject.name}: give one a name, NAME=MODEL"
            )
    if config.reference_pictures:
        find_shards((config.reference_pictures,), "webdataset")
    seeds = range(config.seed, config.seed + config.images_per_prompt)
    dtype = config.generators.dtype
    groups: dict[tuple[str, int], list[Cell]] = {}
    for subject in [*([baseline] if baseline else []), *subjects]:
        for seed in seeds:
            for cell in subject.cells(seed, dtype):
                of = groups.setdefault((subject.name, cell.steps), [])
                if cell.key not in {c.key for c in of}:
                    of.append(cell)
    references: dict[int, Cell] = {}
    if config.reference_steps:
        whole = teacher(config, [config.reference_steps])
        references = {seed: whole.cells(seed, dtype)[0] for seed in seeds}
    specs = [spec for spec in judge_specs(chosen_judges(config)) if not only or spec.name in only]
    between = next((spec for spec in specs if spec.kind == "pairs"), None)
    if between is not None and config.images_per_prompt < 2:
        raise ConfigError(
            "--judges.lpips compares pictures of one prompt: --images-per-prompt 2 or more, or leave it out"
        )
    names = list({subject.name: subject for subject in subjects}.values())
    single = [spec for spec in specs if spec is not between]
    return Plan(config, rows, names, baseline.name if baseline else "", single, groups, references, between)


def _one_model(one: Subject, other: Subject) -> bool:
    """The same wherever both are asked."""
    return one.base == other.base and all(one.parts[n] == other.parts[n] for n in one.parts.keys() & other.parts.keys())
