"""Ray Tune around whole training runs: a trial is a run of `hypersd_ray.trainer` with a name of its own.

A trial's own actor reserves next to nothing, and Ray Tune knows nothing of the workers that it starts; so trials are started only
as far as all of their workers and readers fit side by side (`fitting_trials`). Else each could hold one worker and wait
for the other's for ever.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from hypersd_ray.config.base import CombinationError, ConfigError, RunError, Stopped
from hypersd_ray.config.sweep import SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import checks, keeping, run, storage
from hypersd_ray.trainer.kinds.tscd import product
from hypersd_ray.trainer.room import most_there_will_be
from hypersd_ray.tuning.space import Point, applied, held, readable, searched
from hypersd_ray.tuning.trials import new_sign, stopping_all

METRIC = "objective"
RUNG = "rung"
"""What ASHA counts in: a power of `reduction` for each stage that trials go through, so that it judges after all but the last."""
ALMOST_NOTHING = {"CPU": 0, "memory": 1}
"""What a trial's own actor reserves, a byte: Ray Tune refuses nothing at all."""
STATED = ("base", "space", "search", "scheduler", "reduction", "warm_start", "seed")
"""What a sweep that goes on must share with the one in its folder."""
BEGUN = ("trials", "concurrent")
"""And once its trials have begun: Ray Tune keeps both in its own records."""


@dataclass(frozen=True)
class Trial:
    """One run: its name, its point, and of each stage that ended its record in quality.jsonl."""

    name: str
    point: dict[str, float]
    stages: list[dict[str, Any]]
    state: str

    def objective(self, stages: int) -> float:
        """At the last of `stages` stages; infinite where it did not come so far."""
        last = [record[METRIC] for record in self.stages if record["stage"] == stages]
        return last[0] if last and last[0] is not None and math.isfinite(last[0]) else math.inf


@dataclass(frozen=True)
class Outcome:
    """All trials, the base's run first; `best` among those that came to the last stage."""

    folder: str
    trials: list[Trial]
    best: Trial


def sweep_folder(sweep: SweepConfig) -> str:
    """{out}/{name}: Ray Tune's records, sweep.yaml, base/, trials/, latents/, and what comes out."""
    return f"{storage.out_folder(sweep.base.run)}/{sweep.name}"


def _of_sweep(sweep: SweepConfig, config: TSCDConfig, part: str, name: str) -> TSCDConfig:
    """A run in the sweep's folder that shares latents and the teacher's end points with the others."""
    folder = sweep_folder(sweep)
    update: dict[str, Any] = {"run": config.run.model_copy(update={"out": f"{folder}/{part}", "name": name})}
    if config.data.cache == "disk" and config.data.cache_dir is None:
        update["data"] = config.data.model_copy(update={"cache_dir": f"{folder}/latents"})
    if config.measure.cache is None and not storage.is_url(folder):
        update["measure"] = config.measure.model_copy(update={"cache": f"{folder}/references"})
    return config.model_copy(update=update)


def from_here(sweep: SweepConfig) -> SweepConfig:
    """With local paths as they are from this directory: trials, workers and the final comparison run in others."""
    base, data = run.absolute_paths(sweep.base), sweep.base.data
    shards = tuple(map(storage.absolute, data.patterns))
    places: dict[str, Any] = {"shards": shards[0] if isinstance(data.shards, str) else shards}
    if data.cache_dir is not None:
        places["cache_dir"] = storage.absolute(data.cache_dir)
    return sweep.model_copy(update={"base": base.model_copy(update={"data": data.model_copy(update=places)})})


def base_run(sweep: SweepConfig) -> TSCDConfig:
    """The base, to its end."""
    return _of_sweep(sweep, sweep.base, "base", sweep.base.run.name)


def trial_run(sweep: SweepConfig, point: Point, name: str) -> TSCDConfig:
    """The run of a trial; from the base's first stage where the sweep starts warm."""
    config = _of_sweep(sweep, applied(sweep.base, {**held(sweep.space), **point}), "trials", name)
    return config.model_copy(update={"first_stage": first_stage(sweep)}) if sweep.warm_start else config


def first_stage(sweep: SweepConfig) -> str:
    """The LoRA that trials begin from: the base's first, or the one that the base itself begins from."""
    return (
        sweep.base.first_stage
        or f"{storage.run_folder(base_run(sweep).run)}/{product(sweep.base, sweep.base.distill.k_list[0])}"
    )


class TrialLines(tune.Callback):
    """A line when a trial ends or is stopped: what it had, and how good it was. Else a sweep would be silent for hours."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def _tell(self, trial: Any, state: str) -> None:
        last = trial.last_result or {}
        try:
            sweep = SweepConfig.model_validate(self.values)
            numbers = readable(sweep.base, {**held(sweep.space), **trial.config})
        except CombinationError:  # kept from another upload of the checkout, which Ray has deleted: its paths are gone
            numbers = trial.config
        found = (
            f"objective {last[METRIC]:.4f} after stage {last['stage']}/{len(self.values['base']['distill']['k_list'])}"
            if METRIC in last
            else "no result"
        )
        print(
            f"trial-{trial.trial_id} {state}: {found}  {' '.join(f'{n} {v:g}' for n, v in numbers.items())}", flush=True
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = (trial.last_result or {}).get("stage") == len(self.values["base"]["distill"]["k_list"])
        self._tell(trial, "finished" if ended else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed")


def rung(sweep: SweepConfig, stage: int) -> float:
    """ASHA's measure of time at the end of `stage` (from 1): 1 for the first stage that trials train, times `reduction` for each
    further one.

    The last stage's lies below the rung at which ASHA would end the trial: its run is just ending by itself then, and killed
    meanwhile it would keep its places, for Ray Train has already dismissed the actor that frees them.
    """
    whole = sweep.reduction ** (stage - _first_stage_trained(sweep))  # exactly 1 at first: ASHA's own first rung
    return whole * (1 + 1 / sweep.reduction) / 2 if stage == sweep.base.stages else whole


def _last_rung(sweep: SweepConfig) -> float:
    return sweep.reduction ** (sweep.base.stages - _first_stage_trained(sweep))


def _first_stage_trained(sweep: SweepConfig) -> int:
    return 2 if sweep.warm_start or sweep.base.first_stage else 1


class ASHA(AsyncHyperBandScheduler):
    """ASHA whose rungs outlast the sweep's process: Ray Tune keeps its trials and what Optuna knows, the scheduler it keeps as it
    was before the first result."""

    def __init__(self, sweep: SweepConfig):
        super().__init__(time_attr=RUNG, grace_period=1, max_t=_last_rung(sweep), reduction_factor=sweep.reduction)
        self.sweep = sweep

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Of a trial that was there before: the stages that Ray Tune has heard of, from the trial's own records. It hears of others
        when the trial goes on, and is asked whether that may."""
        super().on_trial_add(tune_controller, trial)
        heard = (trial.last_result or {}).get(RUNG)
        if heard is None:
            return
        for record in keeping.read_quality(f"{sweep_folder(self.sweep)}/trials/trial-{trial.trial_id}"):
            result = {RUNG: rung(self.sweep, record["stage"]), METRIC: record[METRIC]}
            if result[RUNG] <= heard:
                self.on_trial_result(tune_controller, trial, result)


class _StageEnds(TuneReportCallback):
    """Ray Tune hears of the ends of stages alone: between them there is no quality to judge a trial by."""

    def __init__(self, sweep: SweepConfig):
        super().__init__()
        self.sweep = sweep

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if METRIC in metrics[0]:
            stage = metrics[0]["stage"]
            super().after_report(run_context, [metrics[0] | {RUNG: rung(self.sweep, stage)}], checkpoint)


def run_trial(
    point: dict[str, float],
    values: dict[str, Any],
    runs_per_node: int,
    sign: ray.actor.ActorHandle,
    autoscaling: str = "",
) -> None:
    """Ray Tune's function trainable; `values` are the sweep's. A trial that was killed goes on where its run stands.
    `sign` tells it to stop; `autoscaling` is the driver's RAY_AUTOSCALING, which is set at the head and not where a trial
    may be."""
    os.environ["RAY_AUTOSCALING"] = autoscaling
    sweep = SweepConfig.model_validate(values)
    config = trial_run(sweep, point, f"trial-{tune.get_context().get_trial_id()}")
    for record in keeping.read_quality(storage.run_folder(config.run)):
        tune.report({METRIC: record[METRIC], "stage": record["stage"], RUNG: rung(sweep, record["stage"])})
    try:
        result = run.train(config, callbacks=[_StageEnds(sweep)], runs_per_node=runs_per_node, sign=sign)
    except Stopped:
        # Whatever this came back with, Ray Tune would put the trial down as over. The sweep's process is about to end it.
        threading.Event().wait()
    if result.was_finished and not keeping.read_quality(result.folder):
        raise RunError(
            f"{result.folder} is finished and has no {keeping.QUALITY}: delete it, or set name to start another"
        )


def fitting_trials(sweep: SweepConfig, have: dict[str, float]) -> int:
    """Trials that fit on `have` side by side with all of their workers, a reader and an encoder each; or `sweep.concurrent`.

    Raises:
        ConfigError: not one does, or not `sweep.concurrent`; or on a cluster that grows it is not known how many will.
    """
    if os.environ.get("RAY_AUTOSCALING"):
        if sweep.concurrent is None:
            raise ConfigError("concurrent is not set and nodes may still come (RAY_AUTOSCALING): set concurrent")
        most = most_there_will_be()
        if most is None:
            return sweep.concurrent  # nobody says how many nodes may come
        have = {name: max(have.get(name, 0.0), most.get(name, 0.0)) for name in have.keys() | most.keys()}
    c = sweep.base
    beside = checks.beside_workers(c)
    wanted = {
        "CPU": c.run.workers * (c.run.cpus_per_worker + beside["CPU"]),
        "GPU": c.run.workers * (c.run.gpus_per_worker + beside["GPU"]),
    }
    for name, amount in wanted.items():
        if amount > have.get(name, 0.0):
            raise ConfigError(
                f"a trial needs {amount:g} {name} (base.run.workers={c.run.workers}, their resources, data.reader_cpus), "
                f"the cluster has {have.get(name, 0.0):g}: lower base.run.workers"
            )
    fit = max(1, min(int(have[name] / amount + 1e-9) for name, amount in wanted.items() if amount))
    if sweep.concurrent is not None and sweep.concurrent > fit:
        each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        raise ConfigError(
            f"concurrent={sweep.concurrent}: {fit} trials of {each} fit on the cluster side by side, more would wait for each "
            f"other: set concurrent={fit} or less, or leave it out"
        )
    return sweep.concurrent or fit


def _check_same(sweep: SweepConfig, folder: str) -> None:
    path = f"{folder}/sweep.yaml"
    values = sweep.model_dump(mode="json")
    if storage.exists(path):
        there = yaml.safe_load(storage.read_text(path))
        for field in STATED + (BEGUN if _restorable(f"{folder}/tune") else ()):
            if checks.in_checkout(there.get(field)) != checks.in_checkout(values[field]):
                raise ConfigError(
                    f"{field} differs from the sweep that is in {folder}: set name to start another sweep"
                )
    storage.write_text(path, yaml.safe_dump(values, sort_keys=False))


def _restorable(folder: str) -> bool:
    """Whether Ray Tune got so far that it can go on: killed before its first record of trials it would refuse to."""
    return tune.Tuner.can_restore(folder) and bool(storage.files(folder, "experiment_state-*.json"))


def _check_dashboard() -> None:
    """Ray Train asks it whether a trial that Ray Tune ended is dead, and gives its places back then alone."""
    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1)
    except (RayStateApiException, ConnectionError) as e:
        raise ConfigError(
            "the cluster's dashboard does not answer, without it ended trials would keep their CPUs and GPUs: start the head "
            "without --include-dashboard=false"
        ) from e


def _settled(folder: str, concurrent: int) -> int:
    """Trials at a time of the sweep in `folder`, which Ray Tune keeps; written there where it begins.

    Raises:
        ConfigError: no longer so many fit.
    """
    path = f"{folder}/concurrent.txt"
    if not (_restorable(f"{folder}/tune") and storage.exists(path)):
        storage.write_text(path, f"{concurrent}\n")
        return concurrent
    before = int(storage.read_text(path))
    if concurrent < before:
        raise ConfigError(
            f"the sweep in {folder} began with {before} trials at a time, now {concurrent} fit: start it where {before} fit, "
            "or set name to start another sweep"
        )
    return before


def _search(sweep: SweepConfig, concurrent: int) -> Any:
    if sweep.search == "random":
        return BasicVariantGenerator(random_state=sweep.seed, max_concurrent=concurrent)
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(seed=sweep.seed), max_concurrent=concurrent)


def _tuner(sweep: SweepConfig, folder: str, concurrent: int, sign: ray.actor.ActorHandle) -> tune.Tuner:
    computing = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    runs_per_node = math.ceil(concurrent / max(1, computing))
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            values=sweep.model_dump(mode="json"),
            runs_per_node=runs_per_node,
            sign=sign,
            autoscaling=os.environ.get("RAY_AUTOSCALING", ""),
        ),
        ALMOST_NOTHING,
    )
    if _restorable(folder):
        return tune.Tuner.restore(folder, trainable=trainable, resume_unfinished=True, resume_errored=True)
    search = _search(sweep, concurrent)
    return tune.Tuner(
        trainable,
        param_space=searched(sweep.space),
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="min", num_samples=sweep.trials, search_alg=search,
            scheduler=ASHA(sweep) if sweep.scheduler == "asha" else FIFOScheduler(),
            trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(name=Path(folder).name, storage_path=folder.rsplit("/", 1)[0], verbose=0,
                                  failure_config=tune.FailureConfig(max_failures=sweep.base.run.max_failures),
                                  callbacks=[TrialLines(sweep.model_dump(mode="json"))]),
    )  # fmt: skip


def _ended(sweep: SweepConfig, records: list[dict[str, Any]]) -> bool:
    """Whether a run came to the end of its last stage: that is measured after its LoRA is written."""
    return bool(records) and records[-1]["stage"] == sweep.base.stages


def run_sweep(sweep: SweepConfig) -> Outcome:
    """Train the base, then the trials; or go on where the sweep of that name stands.

    Raises:
        ConfigError, ValueError: something a user can mend.
        RunError: no trial came to its end.
    """
    if sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("search=optuna needs it: pip install 'hypersd-ray[sweep]', or set search=random")
    sweep = from_here(sweep)
    checks.check(base_run(sweep))
    run.connect(dashboard=True)
    _check_dashboard()
    concurrent = fitting_trials(sweep, ray.cluster_resources())
    folder = sweep_folder(sweep)
    _check_same(sweep, folder)
    concurrent = _settled(folder, concurrent)
    base = base_run(sweep)
    # Where it has come to its end before, workers would start for nothing.
    if not _ended(sweep, keeping.read_quality(storage.run_folder(base.run))):
        run.train(base)
    print(f"base done; {sweep.trials} trials, {concurrent} at a time, {sweep.search}, {sweep.scheduler}", flush=True)
    # Ray Tune's own handler would end an interrupted sweep as if all of it were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    sign, told = new_sign(), f"sweep {sweep.name} was told to stop; the same command goes on from {folder}"
    with stopping_all(sign, sweep.base.run.stop_patience_s, told):
        results = _tuner(sweep, f"{folder}/tune", concurrent, sign).fit()
    trials = [Trial("base", {}, keeping.read_quality(storage.run_folder(base.run)), "finished")]
    for result in results:
        name = Path(result.path).name
        records = keeping.read_quality(f"{folder}/trials/{name}")
        state = "failed" if result.error else "finished" if _ended(sweep, records) else "stopped"
        trials.append(Trial(name, dict(result.config or {}), records, state))
        if result.error:
            print(f"{name} failed: {str(result.error).strip().splitlines()[-1]}", flush=True)
    if all(trial.state == "failed" for trial in trials[1:]):
        raise RunError(f"all {len(trials) - 1} trials failed; Ray Tune's records of why are in {folder}/tune")
    return Outcome(folder, trials, min(trials, key=lambda trial: trial.objective(sweep.base.stages)))


def best_config(sweep: SweepConfig, outcome: Outcome) -> TSCDConfig:
    """What `jobs/tscd.py --config` takes, as it was measured: the base, or the base with the best numbers and, where trials
    started warm, from the base's first stage."""
    config = sweep.base
    if outcome.best.name != "base":
        config = applied(config, {**held(sweep.space), **outcome.best.point})
        if sweep.warm_start:
            config = config.model_copy(update={"first_stage": first_stage(sweep)})
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{sweep.name}-best"})})


def best_text(sweep: SweepConfig, outcome: Outcome) -> str:
    """The file best.yaml."""
    config = best_config(sweep, outcome)
    head = f"# {outcome.best.name} of sweep {sweep.name}.\n"
    if config.first_stage is not None:
        head += (
            "# Trained from the base's first stage, as measured. Delete first_stage to train that stage with these numbers "
            "too:\n# that was not measured.\n"
        )
    values = config.model_dump(mode="json")
    if checks.UPLOADED in str(
        checks.ROOT
    ):  # Ray deletes it after the job: paths from the checkout's root on outlast that
        values = checks.in_checkout(values)
    return head + yaml.safe_dump(values, sort_keys=False)
