"""A comparison of methods: its pieces, its choices, and two methods from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from evaluation.harness.chains import default_lr, serving, sweep
from evaluation.harness.comparison import Comparison
from evaluation.harness.judges import embedded_judges
from evaluation.harness.pieces import Piece, Pieces
from evaluation.harness.prompts import selection_captions
from evaluation.harness.telling import _learned, diverged, learns_from_feedback, remarks, told
from hypersd_ray.config.base import CombinationError, ConfigError, RunError
from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.config.evaluate import JudgesConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.compare import compare_tiny
from hypersd_ray.recipes.methods import BUDGET, METHODS
from hypersd_ray.trainer.kinds import KINDS, kind_of
from tests.helpers.pipelines import build_pipeline
from tests.helpers.rays import own_ray

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_config(tmp_path):
    def make(**changes) -> CompareConfig:
        return CompareConfig.model_validate(compare_tiny().model_dump() | {"out": str(tmp_path / "compare")} | changes)

    return make


def finish(comparison: Comparison, method: str, lr: float, seed: int) -> None:
    """As a piece leaves it."""
    name = f"{method}-lr{lr:g}-seed{seed}.json"
    (comparison.out / "pieces" / name).write_text(json.dumps({"runs": [], "seconds": 60.0, "teacher_passes": 0}))


def test_three_rates_then_three_seeds_at_the_best(make_config):
    comparison = Comparison(make_config(methods=("lcm", "dmd")))
    comparison.begin()
    names = lambda: [piece.name for piece in comparison.missing()]
    assert names() == [f"{m}-lr{r}-seed0" for m, rates in (("lcm", ("0.0003333", "0.001", "0.003")),
                       ("dmd", ("6.667e-05", "0.0002", "0.0006"))) for r in rates]  # fmt: skip
    assert comparison.left == 2 * 5
    for lr in (0.0003333, 0.001, 0.003):
        finish(comparison, "lcm", lr, 0)
    assert comparison.best("lcm") is None and all(name.startswith("dmd") for name in names())
    (comparison.out / "selection.json").write_text(
        json.dumps({"lcm": {"0.0003333": 61.0, "0.001": 60.0, "0.003": 9.0}})
    )
    assert comparison.best("lcm") == 0.0003333
    assert names()[3:] == ["lcm-lr0.0003333-seed1", "lcm-lr0.0003333-seed2"]
    assert comparison.left == 7 and "7 to do, some 7 minutes" in comparison.plan()[-1]
    lines = comparison.plan()
    assert any("lcm-lr0.001-seed0" in line and "done in 60 s" in line for line in lines)
    assert any("dmd-lr?-seed2" in line and "to do" in line for line in lines)


def test_a_sweep_whose_best_is_at_an_edge_goes_on(make_config):
    comparison = Comparison(make_config(methods=("lcm", "dmd"), extend=2))
    comparison.begin()
    rates = lambda method: [piece.lr for piece in comparison.swept(method)]
    scores = {"lcm": {"0.0003333": 60.0, "0.001": 61.0, "0.003": 62.0}}
    scores["dmd"] = {"6.667e-05": 60.0, "0.0002": 61.0, "0.0006": 60.0}
    write = lambda: (comparison.out / "selection.json").write_text(json.dumps(scores))
    write()
    assert rates("lcm") == [0.0003333, 0.001, 0.003, 0.009] and comparison.best("lcm") is None
    assert rates("dmd") == [6.667e-05, 0.0002, 0.0006] and comparison.best("dmd") == 0.0002
    scores["lcm"]["0.009"] = 63.0
    write()
    assert rates("lcm")[4:] == [0.027]
    scores["lcm"]["0.027"] = 64.0
    write()
    assert len(rates("lcm")) == 5 and comparison.best("lcm") == 0.027, "no further"
    scores["lcm"] |= {"0.0003333": 70.0, "0.0001111": None}
    del scores["lcm"]["0.009"], scores["lcm"]["0.027"]
    write()
    assert rates("lcm") == [0.0003333, 0.001, 0.003, 0.0001111] and comparison.best("lcm") == 0.0003333


def test_new_noise_between_steps_goes_to_samplers_that_have_gamma(make_config, make_lora):
    comparison = Comparison(make_config(methods=("lcm", "pd", "tcd"), noisy_steps=(4,), rates=(1.0,), seeds=(0,)))
    comparison.begin()
    found = {}
    for piece in comparison.missing():
        first = comparison.chain(piece).first
        folder = comparison.out / "runs" / piece.name
        (folder / "lora").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json")))
        for steps in (2, 4, 8):
            shutil.copy(make_lora(), folder / KINDS[kind_of(first)].product(first, steps))
        comparison.there.finish(piece, runs=[str(folder)], seconds=0.0, teacher_passes=0)
        config = comparison.evaluation(steps=(2, 4, 8))
        for noisy in ((), (4,)):
            subject = comparison.subject(piece, piece.method, config, noisy)
            found[piece.method, noisy] = [subject.parts[n][1].eta for n in (2, 4, 8)]
    assert all(found["lcm", noisy] == [1, 1, 1] and found["pd", noisy] == [0, 0, 0] for noisy in ((), (4,)))
    assert found["tcd", ()] == [0, 0, 0] and found["tcd", (4,)] == [0, 1, 0]
    (remark,) = [one for one in remarks(comparison, {}) if "new noise" in one]
    assert remark.startswith("At 4 steps tcd put new noise")


def test_a_rate_that_diverges_is_out(make_config):
    comparison = Comparison(make_config(methods=("lcm", "dmd"), rates=(1.0, 3.0), seeds=(0,)))
    comparison.begin()
    for piece in sweep(comparison.config, "lcm"):
        comparison.there.finish(piece, runs=[], seconds=0.0, teacher_passes=0, diverged="NaN or inf")
    assert not comparison.usable(sweep(comparison.config, "lcm")[0])
    assert comparison.left == 2, "lcm has no further seeds"
    assert "NaN or inf" in comparison.plan()[0]
    (comparison.out / "selection.json").write_text(json.dumps({"lcm": {"0.001": 50.0, "0.003": None}}))
    assert comparison.best("lcm") == 0.001
    (comparison.out / "selection.json").write_text(json.dumps({"lcm": {"0.001": None, "0.003": None}}))
    assert comparison.best("lcm") is None
    one = Comparison(make_config(methods=("lcm", "dmd"), rates=(1.0,), seeds=(0, 1), out=str(comparison.out / "one")))
    one.begin()
    one.there.finish(sweep(one.config, "lcm")[0], runs=[], seconds=0.0, teacher_passes=0, diverged="NaN or inf")
    assert one.best("lcm") is None and diverged(one) == ["lcm"] and one.left == 2, "told, where it has one rate too"
    assert [piece.method for piece in one.missing()] == ["dmd", "dmd"]


def test_a_piece_is_one_process_at_a_time(make_config, tmp_path):
    """A live process keeps its claim; that of a killed one, of this host, is taken over; another host's is not."""
    comparison = Comparison(make_config(methods=("lcm",)))
    comparison.begin()
    there, name = comparison.there, comparison.missing()[0].name
    program = "import sys, time; from pathlib import Path; from evaluation.harness.pieces import Pieces; " \
              "print(Pieces(Path(sys.argv[1])).claim(sys.argv[2]), flush=True); time.sleep(60)"  # fmt: skip
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(comparison.out), name], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "True\n"
    assert not there.claim(name) and comparison.others == [name]
    assert f"under way in process {other.pid}" in comparison.plan()[0]
    other.kill()
    other.wait()
    assert comparison.others == [] and there.claim(name) and not Pieces(comparison.out).claim(name)
    there.release(name)
    (there.folder / f"{name}.claim").write_text(json.dumps({"pid": other.pid, "host": "elsewhere", "born": "1"}))
    assert not there.claim(name)


def test_a_run_that_two_chains_begin_with_is_trained_once_and_counts_in_both(make_config, monkeypatch):
    """With the runs' own training replaced by a clock: what is tested is who asks for which run, and what is put down."""
    comparison = Comparison(make_config(methods=("tscd", "tscd-feedback"), rates=(1.0,), seeds=(0,)))
    comparison.begin()
    asked = []

    def train(config):
        begun = config.run.name not in asked
        asked.append(config.run.name)
        time.sleep(0.2 if begun else 0)  # one that is done returns at once
        folder = comparison.out / "runs" / config.run.name
        for k in (1, 2, 4, 8):
            product = folder / KINDS[kind_of(config)].product(config, k)
            product.parent.mkdir(parents=True, exist_ok=True)
            product.touch()
        return SimpleNamespace(folder=str(folder))

    monkeypatch.setattr("evaluation.harness.comparison.run.train", train)
    first, second = comparison.missing()
    comparison.train(first)
    comparison.train(second)
    assert asked[:2] == [first.name, first.name] and len(set(asked)) == 1 + 4, (
        "TSCD, then feedback for each of its LoRAs"
    )
    alone, both = (comparison.done(piece)["seconds"] for piece in (first, second))
    assert 0.2 <= alone < 0.4 and both >= 5 * 0.2


def test_a_training_is_placed_on_what_the_comparison_has(make_config):
    """A share of a GPU for each worker; the small judges of a feedback stay in its process."""
    feedback = METHODS["tscd-feedback"]().then[0].config(str(paths.LORAS / "tscd-k8.safetensors"))
    cpu, gpu = (Comparison(make_config(methods=("lcm",), gpus_per_worker=share)) for share in (0, 0.25))
    assert feedback.placement.where == "actors"
    assert cpu._placed(feedback).run.gpus_per_worker == 0 and cpu._placed(feedback).placement.where == "local"
    placed = gpu._placed(feedback)
    assert placed.run.gpus_per_worker == 0.25 and placed.placement.where == "local"
    assert Path(placed.run.out) == gpu.out / "runs" and placed.data.cache_dir == str(gpu.out / "latents")


def test_what_cannot_be_kept_is_one_line(make_config):
    comparison = Comparison(make_config(methods=("lcm",)))
    comparison.begin()
    os.symlink("/dev/full", comparison.there.folder / f"a-run.seconds.{os.getpid()}.part")
    with pytest.raises(RunError, match="no space is left; what was done is kept"), comparison.there.timed("a-run"):
        pass
    assert comparison.there.spent("a-run") == 0.0, "there whole or not at all"
    (comparison.out / "selection.json").write_text('{"lcm": {"0.0')
    with pytest.raises(RunError, match=r"selection\.json cannot be read"):
        comparison.best("lcm")


def test_every_method_has_a_sweep_of_one_size(make_config):
    config = make_config()
    assert set(config.methods) == set(METHODS)
    for method in METHODS:
        rates = [piece.lr for piece in sweep(config, method)]
        assert [rate / default_lr(method) for rate in rates] == pytest.approx([1 / 3, 1, 3], rel=1e-3)


def test_what_cannot_be_compared_is_one_line(make_config):
    with pytest.raises(ConfigError, match="--methods sinkhorn: choose of lcm, tcd"):
        Comparison(make_config(methods=("sinkhorn",)))
    with pytest.raises(ConfigError, match="--budget 64 with method pd: 2 steps for 5 stages"):
        Comparison(make_config(methods=("lcm", "pd"), budget=64))
    with pytest.raises(CombinationError, match="none twice"):
        make_config(methods=("lcm", "lcm"))
    with pytest.raises(CombinationError, match="baseline=pd: teacher, or one of methods=lcm"):
        make_config(methods=("lcm",), baseline="pd")
    with pytest.raises(CombinationError, match="one picture of a prompt"):
        make_config(judges=JudgesConfig(lpips="alexnet.pth"))
    with pytest.raises(ConfigError, match="--select captions gives no score to a picture"):
        Comparison(make_config(select="captions"))
    with pytest.raises(ConfigError, match=r"--select pick_score has no weights here: give --judges\.pick-score"):
        Comparison(make_config(select="pick_score"))
    with pytest.raises(ConfigError, match="--select image_reward: tscd-feedback learns from that judge"):
        Comparison(make_config(select="image_reward", methods=("lcm", "tscd-feedback")))
    Comparison(make_config(select="image_reward", methods=("lcm",)))
    first = Comparison(make_config(methods=("lcm",), budget=64))
    first.begin()
    for changes, said in (({"select": "hps_v21"}, "select=clip_score"), ({"seeds": (1, 0)}, "first seed=0")):
        with pytest.raises(ConfigError, match=f"holds a comparison with {said}, not .*: name another"):
            Comparison(make_config(methods=("lcm",), budget=64, **changes))
    with pytest.raises(ConfigError, match="holds a comparison with budget=64, not 128: name another"):
        Comparison(make_config(methods=("lcm",), budget=128))
    about = json.loads((first.out / "comparison.json").read_text())
    choice = {"select", "selection_prompts", "steps", "first seed"}
    assert set(about) == {"budget", "teacher", "base_sha256", "shards", "chains"} | choice
    for changed, said in (({"base_sha256": "x"}, "base_sha256=x"), ({"chains": {"lcm": "x"}}, "chain of lcm=x")):
        (first.out / "comparison.json").write_text(json.dumps(about | changed))
        with pytest.raises(ConfigError, match=f"holds a comparison with {said}, not"):
            Comparison(make_config(methods=("lcm",), budget=64))
    (first.out / "comparison.json").write_text(json.dumps({"budget": 64, "teacher": "teacher"}))
    assert Comparison(make_config(methods=("lcm",), budget=64)), "an earlier version's folder"
    with pytest.raises(ConfigError, match=r"the recipes of a comparison .* train the embedded model"):
        Comparison(make_config(methods=("lcm",), teacher=str(build_pipeline("sd", first.out / "other"))))
    with pytest.raises(ConfigError, match="no method has a finished training"):
        first.judge()


def test_a_rate_is_chosen_at_the_steps_that_a_method_is_made_for(make_config):
    comparison = Comparison(make_config())
    made = {method: comparison.made_for(method) for method in comparison.config.methods}
    assert made["turbo"] == made["dmd"] == [1, 2, 4] and made["perflow"] == [4, 8]
    assert all(steps == [1, 2, 4, 8] for m, steps in made.items() if m not in ("turbo", "dmd", "perflow"))


def test_each_number_of_steps_has_its_own_run():
    serves = {8: "a", 4: "b", 2: "c", 1: "d"}
    assert [serving(serves, n) for n in (1, 2, 3, 4, 6, 16)] == ["d", "c", "c", "b", "b", "a"]
    assert serving({}, 4) is None, "an earlier version's pieces: their last run"


def test_what_a_reader_must_know_is_told(make_config):
    comparison = Comparison(make_config(methods=("lcm", "dmd", "hyper-sd")))
    comparison.begin()
    about = {"runs": [], "seconds": 60.0, "teacher_passes": 7}
    comparison.there.finish(Piece("lcm", 0.003, 0), **about)
    comparison.there.finish(Piece("lcm", 0.003, 1), **about, diverged="NaN or inf")
    for piece in sweep(comparison.config, "dmd"):
        comparison.there.finish(piece, **about, diverged="NaN or inf")
    scores = {"lcm": {"0.0003333": 1.0, "0.001": 2.0, "0.003": 3.0}, "dmd": {"6.667e-05": None}}
    (comparison.out / "selection.json").write_text(json.dumps(scores))
    column = lambda best, *ties: {"best": best, "ties": list(ties)}
    results = {
        "cards": [{"name": "clip_score", "title": "CLIP score"}],
        "rows": [{"model": "hyper-sd", "steps": n, "measures": {"clip_score": {}}} for n in (1, 2, 4)],
        "ranking": {"clip_score": {"1": column("hyper-sd"), "2": column("lcm", "hyper-sd"), "4": column("lcm")}},
    }
    found = told(comparison, results)
    assert found["seeds"] == {"lcm": (1, 3)} and found["diverged"] == ["dmd"]
    assert (
        "seed 1 diverged" in found["notes"]["training of lcm"]
        and "diverged at every" in found["notes"]["training of dmd"]
    )
    assert any("at the sweep's edge for lcm" in line for line in found["remarks"])
    assert any(line.startswith("hyper-sd learned from feedback beside that, for 20%") for line in found["remarks"])
    assert "holds in 2 of 3 columns; it does not in: CLIP score at 4 steps (behind lcm)." in found["remarks"][-1]


def test_who_learns_from_feedback_is_known_before_anything_is_trained():
    assert [m for m in METHODS if learns_from_feedback(m, BUDGET)] == ["tscd-feedback", "hyper-sd"]


def test_feedback_is_told_where_it_is_judged_by_its_own_reward(tmp_path):
    config = METHODS["hyper-sd"]().then[0].config(str(paths.LORAS / "tscd-k8.safetensors"))
    judges = embedded_judges()
    assert _learned(config, judges) == {"aesthetic_v2", "image_reward", "objects"}, "CLIP score and HPS are held out"
    elsewhere = shutil.copytree(judges.solo, tmp_path / "solo")
    assert "objects" in _learned(config, judges.model_copy(update={"solo": str(elsewhere)})), "in another checkout too"
    shared = judges.model_copy(update={"clip_score": judges.clip_large})
    assert _learned(config, shared) >= {"clip_score", "vendi"}, "the network below the aesthetic head"
    assert "objects" not in _learned(config, JudgesConfig(clip_score="/another"))


def test_the_rate_is_chosen_on_captions_outside_of_the_table():
    from evaluation.harness.prompts import held_out_prompts

    captions = selection_captions(128)
    assert len(set(captions)) == 128 and not set(captions) & set(held_out_prompts(paths.DATA, 512))


@pytest.fixture
def shards(tmp_path) -> Path:
    """One shard of the first 32 embedded pictures."""
    out = tmp_path / "few.tar"
    with tarfile.open(paths.DATA / "train-00000.tar") as tar, tarfile.open(out, "w") as few:
        keys: list[str] = []
        for member in tar:
            key = member.name.split(".")[0]
            keys += [key] if key not in keys else []
            if len(keys) > 32:
                break
            few.addfile(member, tar.extractfile(member))
    return out


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    with own_ray():
        yield
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]


@pytest.mark.cluster
def test_two_methods_from_end_to_end(ray_here, make_config, shards):
    """Trained for two steps each over Ray Train, judged over Ray Data, and a second call finds all done."""
    from evaluation.report.build import write_report

    judges = JudgesConfig(clip_score=str(paths.EVALUATORS / "clip"))
    config = make_config(
        methods=("lcm", "turbo"), budget=64, rates=(1.0,), seeds=(0,), steps=(1,), prompts=8, per_shard=4,
        latency_repeats=0, judges=judges.model_dump(), shards=str(shards),
    )  # fmt: skip
    comparison = Comparison(config)
    comparison.begin()
    assert comparison.train_all() == 0
    runs = {path.name for path in (comparison.out / "runs").iterdir()}
    assert runs == {"lcm-lr0.001-seed0", "turbo-lr0.0002-seed0"}
    metrics = (comparison.out / "runs/lcm-lr0.001-seed0/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 2
    results, rows = comparison.judge()
    assert results["done"]["made"] == 8 * 3 + 8 + 8, "three models, the teacher at 25 and its reference"
    models = {(row["model"], row["steps"]) for row in results["rows"]}
    assert models == {("teacher", 1), ("teacher at 25", 25), ("lcm", 1), ("turbo", 1)}
    lcm, turbo = (next(row for row in results["rows"] if row["model"] == name) for name in ("lcm", "turbo"))
    assert lcm["measures"]["distance"]["mean"] != turbo["measures"]["distance"]["mean"]
    assert (
        "2 teacher passes" not in results["notes"]["training of lcm"]
        and "lr 0.001" in results["notes"]["training of lcm"]
    )

    written = write_report(results, rows, comparison.out, "Methods")
    assert "turbo" in written[0].read_text()
    again, _ = Comparison(config).judge()
    assert again["done"]["made"] == 0 and json.dumps(again["rows"]) == json.dumps(results["rows"])
    assert [row["measures"] for row in again["rows"]] == [row["measures"] for row in results["rows"]]
    beside, _ = Comparison(config.model_copy(update={"baseline": "lcm"})).judge()
    assert [row["measures"] for row in beside["rows"]] == [row["measures"] for row in results["rows"]]
    gap = next(row["versus"]["clip_score"]["mean"] for row in beside["rows"] if row["model"] == "turbo")
    assert gap == pytest.approx(turbo["measures"]["clip_score"]["mean"] - lcm["measures"]["clip_score"]["mean"])
    assert Comparison(config).train_all() == 0
