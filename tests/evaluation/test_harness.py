"""Prompts, models and pictures of the harness: read, named, made the same whatever the batch, and made once."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from evaluation import throughput
from evaluation.harness import measures
from evaluation.harness.exporting import export_images
from evaluation.harness.judges import chosen_judges, is_published, judge_specs, reward_card
from evaluation.harness.latency import file_name
from evaluation.harness.making import make, tasks
from evaluation.harness.plan import plan
from evaluation.harness.prompts import Row, coco_manifest, read_rows
from evaluation.harness.reach import check_reached, missing
from evaluation.harness.run import evaluate, make_all
from evaluation.harness.sampler import Sampler
from evaluation.harness.store import Store, part_of, shard_name
from evaluation.harness.subjects import Cell, How, Subject, find_baseline, find_subject, run_how, run_subject, teacher
from evaluation.quality import QualityConfig
from evaluation.quality import Subject as Pipeline
from evaluation.report.paper import comparable
from evaluation.study.entries import Entries
from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.cards import UNetCard, save_unet_with_card
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.recipes import RECIPES
from hypersd_ray.trainer.kinds import KINDS
from hypersd_ray.training import samples
from hypersd_ray.training.samples import Sampling
from tests.helpers.pipelines import CAPTIONS, tiny_unet

CLIP = str(paths.EVALUATORS / "clip")


@pytest.fixture
def config(folders, prompts_file, tmp_path) -> EvaluateConfig:
    return EvaluateConfig(
        base=str(folders["sd"]), prompts="file", prompts_file=str(prompts_file), steps=(1, 2), reference_steps=3,
        judges=JudgesConfig(clip_score=CLIP), per_shard=4, latency_repeats=0, where="local", out=str(tmp_path / "out"),
        generators=ActorPool(batch_size=3), resamples=200,
    )  # fmt: skip


# prompts


def prompts(path: Path, **changes) -> tuple[list[Row], list[str]]:
    lines: list[str] = []
    return read_rows(EvaluateConfig(prompts="file", prompts_file=str(path), **changes), lines.append), lines


def test_empty_lines_and_twins_are_left_out_and_said(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa  panda\r\n\n \na café\na panda\n".encode())
    rows, lines = prompts(tmp_path / "p.txt")
    assert rows == [Row("a panda", "a panda"), Row("a café", "a café")]
    assert any("2 empty lines" in line for line in lines) and any("1 prompts are there twice" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.txt", "a panda\na caf\xe9\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2; save it as UTF-8"),
        ("empty.txt", b"\n\n", "has 0 prompts: at least 2"),
        ("gone.txt", None, "cannot be read"),
        ("x.parquet", b"no parquet", "is not a parquet file"),
    ],
)
def test_a_prompts_file_that_cannot_be_used_is_one_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parti_and_parquet(tmp_path):
    (tmp_path / "parti.tsv").write_text('Prompt\tCategory\na bird\tAnimals\nthe saying "x"\tText\n')
    rows = read_rows(EvaluateConfig(prompts="parti", prompts_file=str(tmp_path / "parti.tsv")))
    assert next(row.prompt for row in rows) == "a bird" and len(rows) == 2
    pq.write_table(pa.table({"url": ["u", "v"], "caption": ["a", "b"]}), tmp_path / "p.parquet")
    assert [row.prompt for row in prompts(tmp_path / "p.parquet")[0]] == ["a", "b"]
    pq.write_table(pa.table({"url": ["u", "v"]}), tmp_path / "q.parquet")
    with pytest.raises(ConfigError, match="it needs caption"):
        prompts(tmp_path / "q.parquet")


def test_the_coco_manifest_has_the_lowest_caption_of_each_picture(tmp_path):
    file = tmp_path / "captions_val2017.json"
    annotations = [
        {"id": 9, "image_id": 2, "caption": "late"}, {"id": 4, "image_id": 2, "caption": " A  man\n"},
        {"id": 5, "image_id": 1, "caption": "A dog."},
    ]  # fmt: skip
    file.write_text(
        json.dumps({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (2, 1)], "annotations": annotations})
    )
    with pytest.raises(ConfigError, match="captions of 2 pictures, COCO2017-val has 5000"):
        coco_manifest(file)
    table = coco_manifest(file, images=0)
    assert table["image_id"].to_pylist() == [1, 2] and table["caption"].to_pylist() == ["A dog.", "A man"]
    assert len(set(table["seed"].to_pylist())) == 2
    pq.write_table(table, tmp_path / "coco5k.parquet")
    rows = read_rows(EvaluateConfig(prompts="coco5k", prompts_file=str(tmp_path / "coco5k.parquet")))
    assert rows == [Row(str(s), c) for s, c in zip(table["seed"].to_pylist(), ["A dog.", "A man"], strict=True)]
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not COCO's captions file"):
        coco_manifest(tmp_path / "no.json")


# models


def test_a_cell_is_named_by_what_decides_its_pictures(config, make_lora, tmp_path):
    lora = make_lora()
    moved = tmp_path / "moved.safetensors"
    shutil.copy(lora, moved)
    cells = dict(zip((1, 2), find_subject(str(lora), config).cells(0, "float32"), strict=True))
    assert [c.key for c in find_subject(f"other name={moved}", config).cells(0, "float32")] == [
        c.key for c in cells.values()
    ]
    keys = {c.key for c in cells.values()}
    for change in ({"eta": 0.5}, {"scheduler": "ddim"}, {"guidance": 2.0}):
        keys |= {c.key for c in find_subject(str(lora), config.model_copy(update=change)).cells(0, "float32")}
    keys |= {c.key for c in find_subject(str(lora), config).cells(1, "float32")}
    keys |= {c.key for c in find_subject(str(make_lora(size=0.1)), config).cells(0, "float32")}
    assert len(keys) == 2 * 6


def test_keys_stay_what_they_were():
    """Pictures are kept under them: a key that changes loses all that users have made."""
    how = How("edges", 0.5, 3.0, (1000, 300, 0), 4, (999,))
    keys = [Cell("m", "lora", "/base", "/w", "b", "w", 2, 0, one).key for one in (how, How("tcd"))]
    assert keys == ["8f854c7e01cdbafbaa27ba3f", "810ef727d0adc58a7937ee70"]


def test_a_unet_of_one_time_step_is_sampled_from_it(config, folders, tmp_path):
    card = UNetCard(str(folders["sd"]), read_base(folders["sd"]), (800,), "tiny", "LCMScheduler")
    folder = save_unet_with_card(tiny_unet("sd"), tmp_path / "unet", "unet", card)
    found = {cell.steps: cell.how for cell in find_subject(str(folder), config).cells(0, "float32")}
    assert found == {1: How("lcm", timesteps=(800,)), 2: How("lcm")}
    (folder / "sampling.json").unlink()  # another project's
    assert find_subject(str(folder), config).cells(0, "float32")[0].how == How("tcd")


def test_what_is_no_model_is_one_line(config, tmp_path):
    for spec, said in (("gone.safetensors", "does not exist"), (str(tmp_path), "is no model")):
        with pytest.raises(ConfigError, match=said):
            find_subject(spec, config)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        find_subject(str(tmp_path / "broken.safetensors"), config)
    with pytest.raises(ConfigError, match=r"--judges\.clip-score: /gone does not exist"):
        judge_specs(JudgesConfig(clip_score="/gone"))
    with pytest.raises(ConfigError, match=r"needs --judges\.clip-large"):
        judge_specs(JudgesConfig(aesthetic_v2=str(paths.EVALUATORS / "aesthetic.safetensors")))


def test_a_pipelines_folder_is_sampled_as_it_is_asked(config, folders, tmp_path):
    """Few-step pipelines are judged without guidance; the base's own folder is the teacher."""
    other = tmp_path / "other"
    shutil.copytree(folders["sd"], other)
    how = lambda path, **changes: find_subject(str(path), config.model_copy(update=changes)).parts[2][1]
    assert how(other) == How("tcd") and how(other, guidance=2.0) == How("edges", guidance=2.0)
    assert how(other, scheduler="ddim") == How("ddim")
    assert how(folders["sd"]) == How("edges", guidance=config.teacher_guidance)


def test_the_teacher_is_named_as_any_model(config):
    assert find_subject("teacher", config).name == "teacher" and find_subject("base=teacher", config).name == "base"
    assert find_subject("base=teacher", config).parts == find_subject("teacher", config).parts
    named = config.model_copy(update={"baseline": "guided=teacher", "teacher_steps": 7})
    assert (find_baseline(named).name, list(find_baseline(named).parts)) == ("guided", [7])


def test_a_recipe_says_how_its_model_is_sampled():
    few = [Sampling(4, (1000, 750, 500, 250, 0), eta=1.0), Sampling(1, (1000, 0))]
    assert run_how(few, 4) == How("edges", 1.0, times=(1000, 750, 500, 250, 0))
    assert run_how(few, 8) == How("edges", 1.0), "beyond its training, with its own noise"
    assert run_how([Sampling(4, windows=4)], 4).windows == 4


def test_an_eta_that_is_asked_for_goes_before_the_recipes(config, make_lora, tmp_path):
    folder, run = tmp_path / "run", RECIPES["tiny"]()
    (folder / "lora").mkdir(parents=True)
    shutil.copy(make_lora(), folder / KINDS["tscd"].product(run, 2))

    def how(run: TSCDConfig, steps: int, **changes) -> How:
        return run_subject("run", folder, run, config.model_copy(update=changes | {"steps": (steps,)})).parts[steps][1]

    assert how(run, 2) == How("edges") and how(run, 2, eta=0.5) == How("edges", 0.5)
    assert how(run, 2, eta=0.5, scheduler="tcd") == How("tcd", 0.5)
    lines = RECIPES["tiny"](method="perflow")
    shutil.copy(make_lora(), folder / KINDS["tscd"].product(lines, 4))
    assert how(lines, 4).windows == 4
    with pytest.raises(ConfigError, match="followed without noise"):
        how(lines, 4, eta=0.5)


def test_a_run_is_guided_where_it_keeps_guidance_or_is_asked_to(config, make_lora, tmp_path):
    folder, run = tmp_path / "run", RECIPES["tiny"]()
    product = folder / KINDS["tscd"].product(run, 2)
    product.parent.mkdir(parents=True)

    def how(**changes) -> How:
        return run_subject("run", folder, run, config.model_copy(update=changes | {"steps": (2,)})).parts[2][1]

    shutil.copy(make_lora(), product)
    assert how() == How("edges") and how(scheduler="tcd") == How("tcd")
    assert how(guidance=2.0, eta=0.5) == How("edges", 0.5, 2.0) and how(guidance=2.0, scheduler="tcd").guidance == 2
    shutil.copy(make_lora(guidance="kept"), product)
    assert how() == How("edges", guidance=3.0) and how(scheduler="tcd") == How("tcd", guidance=3.0)
    assert how(guidance=2.0).guidance == 2 and how(teacher_guidance=7.5).guidance == 7.5


def test_a_guided_sampler_keeps_its_noise_times_and_windows(config):
    """And without them it is the teacher's own, bit for bit: pictures that are kept stay right."""
    sampler, row = Sampler(config.base), read_rows(config)[:1]
    latents = lambda how: sampler(Subject("x", "base", config.base, {2: ("", how)}).cells(0, "float32")[0], row).latents
    guided = latents(How("edges", guidance=3.0))
    x_T = samples.start_noise(0, [row[0].key], sampler.shape)
    cond = sampler.conditioning([row[0].prompt])
    assert torch.equal(guided, samples.teacher_samples(sampler.roles, x_T, cond, sampler.null, 2, 3.0))
    for other in (
        How("edges", 1.0, 3.0),
        How("edges", guidance=3.0, times=(1000, 300, 0)),
        How("edges", guidance=3.0, windows=2),
    ):
        assert not torch.equal(latents(other), guided), other


@pytest.mark.parametrize("how", [How("edges", eta=1.0), How("tcd", eta=0.5), How("lcm"), How("edges", 1.0, 3.0)])
def test_a_picture_does_not_depend_on_its_batch(config, make_lora, how):
    rows = read_rows(config)[:4]
    subject = Subject("x", "lora", config.base, {2: (str(make_lora()), how)})
    [cell] = subject.cells(0, "float32")
    sampler = Sampler(config.base)
    whole = sampler(cell, rows).pictures.int()
    alone = Sampler(config.base)(cell, rows[2:3]).pictures.int()
    assert (whole[2] - alone[0]).abs().max() <= 1
    assert (whole[1] - alone[0]).abs().max() > 1, "another prompt is another picture"
    [other] = subject.cells(1, "float32")
    assert (sampler(other, rows[2:3]).pictures.int() - alone).abs().max() > 1, "another seed is another picture"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("scheduler", ["tcd", "ddim"])
def test_the_loop_is_that_of_diffusers_pipelines(folders, config, make_lora, family, scheduler):
    """The LoRA merged here, and as a user loads it there: the same latents."""
    lora, rows = make_lora(family), read_rows(config)[:3]
    here = config.model_copy(update={"base": str(folders[family]), "scheduler": scheduler, "steps": (4,)})
    latents = Sampler(here.base)(find_subject(str(lora), here).cells(5, "float32")[0], rows).latents
    quality = QualityConfig(teacher=folders[family], steps=(4,), sampler=scheduler, seed=5)
    pipeline = Pipeline(quality, [row.prompt for row in rows])
    pipeline.load_lora(lora)
    torch.testing.assert_close(latents, pipeline.student(4, scheduler), rtol=1e-3, atol=1e-3)


def test_a_model_goes_when_the_next_one_comes(config, make_lora):
    rows = read_rows(config)[:2]
    lora = find_subject(str(make_lora()), config).cells(0, "float32")[0]
    base = teacher(config, [2]).cells(0, "float32")[0]
    sampler, fresh = Sampler(config.base), Sampler(config.base)
    sampler(lora, rows)
    assert torch.equal(sampler(base, rows).latents, fresh(base, rows).latents)
    assert not torch.equal(sampler.unet.state_dict()["conv_in.weight"], sampler(lora, rows).latents) and sampler.loaded


# making


def test_what_is_there_is_not_made_again(config, make_lora):
    rows, lora = read_rows(config), str(make_lora())
    what = plan(config, rows, [find_subject(lora, config)])
    specs, store = what.specs, Store(config.out)

    def todo(rows=rows, specs=specs):
        return tasks(Store(config.out), what.cells, rows, specs, config.per_shard)

    pools = (config.generators, config.scorers)
    done = make(config.out, todo(), specs, *pools, local=True)
    assert (done.made, done.judged, done.failures) == (12, 8, {}) and not todo()
    [first, second] = what.cells
    whole = {c.key: store.read_pictures(c.key, rows[:4]) for c in what.cells}
    folder = Path(store.folder(first.key))
    stays = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}

    (folder / f"{shard_name(rows[:4])}.tar").unlink()  # pictures gone, scores there
    score = Path(store.folder(second.key)) / f"{shard_name(rows[4:])}.{specs[0].file}.npz"
    score.unlink()
    done = make(config.out, todo(), specs, *pools, local=True)
    assert (done.made, done.judged) == (4, 1) and not todo()
    assert np.array_equal(store.read_pictures(first.key, rows[:4]), whole[first.key])
    changed = {p for p, when in stays.items() if p.stat().st_mtime_ns != when}
    assert changed == {folder / f"{shard_name(rows[:4])}.tar", score}

    assert (
        len(
            todo(
                specs=judge_specs(
                    JudgesConfig(
                        clip_score=CLIP,
                        aesthetic_v2=str(paths.EVALUATORS / "aesthetic.safetensors"),
                        clip_large=str(paths.EVALUATORS / "clip_large"),
                    )
                )
            )
        )
        == 4
    )
    assert len(todo(rows=[*rows[:4], *(Row(p, p) for p in CAPTIONS[6:10])])) == 2, "the first shard is found again"


def test_draws_of_a_whole_set_are_worked_out_once(config, make_lora, monkeypatch):
    """They are kept beside the scores; other prompts, or another seed, have their own."""
    rows, subject = read_rows(config), find_subject(str(make_lora()), config)
    first = evaluate(plan(config, rows, [subject]))
    monkeypatch.setattr(measures, "vendi", lambda *_: pytest.fail("worked out again"))
    again = evaluate(plan(config, rows, [subject]))
    of = lambda results: [row["measures"]["vendi"] for row in results["rows"]]
    assert of(again) == of(first) and len(of(first)) == 2
    other = config.model_copy(update={"limit": 4})
    with pytest.raises(pytest.fail.Exception, match="worked out again"):
        evaluate(plan(other, read_rows(other), [subject]))


def test_a_judge_that_failed_is_asked_again(config, make_lora):
    rows = read_rows(config)
    what = plan(config, rows, [find_subject(str(make_lora()), config)])
    make_all(what)
    cell, spec, store = what.cells[0], what.specs[0], Store(config.out)
    values, _ = store.read_values(cell.key, rows[:4], spec.file)
    store.write_values(cell.key, rows[:4], spec.file, values * np.nan, ["'x': ValueError: no"])
    [again] = tasks(Store(config.out), what.cells, rows, what.specs, config.per_shard)
    assert again.judges == [spec.name]
    done = make_all(what)
    assert (done.made, done.judged) == (0, 1), "the pictures are not made again"
    np.testing.assert_array_equal(Store(config.out).read_values(cell.key, rows[:4], spec.file)[0], values)
    assert not tasks(Store(config.out), what.cells, rows, what.specs, config.per_shard)


def test_a_full_disk_is_one_line_and_keeps_what_was_done(config, make_lora):
    """The next file's place leads to /dev/full, where each write finds no space."""
    rows = read_rows(config)
    what = plan(config, rows, [find_subject(str(make_lora()), config)])
    todo = tasks(Store(config.out), what.cells, rows, what.specs, config.per_shard)
    blocked = Path(part_of(f"{Store(config.out).folder(what.cells[0].key)}/{shard_name(rows[4:])}.tar"))
    blocked.parent.mkdir(parents=True)
    os.symlink("/dev/full", blocked)
    with pytest.raises(RunError, match=r"no space is left; what was done is kept") as caught:
        make(config.out, todo, what.specs, config.generators, config.scorers, local=True)
    assert "\n" not in str(caught.value)
    names = Store(config.out).names(what.cells[0].key)
    assert f"{shard_name(rows[:4])}.tar" in names and f"{shard_name(rows[4:])}.tar" not in names
    blocked.unlink()
    left = tasks(Store(config.out), what.cells, rows, what.specs, config.per_shard)
    assert len(left) == len(todo) - 1


def test_a_baseline_is_no_seed_of_another_model(config, make_lora):
    rows = read_rows(config)
    one, other = (find_subject(f"lora={make_lora(size=size)}", config) for size in (0.02, 0.2))
    assert plan(config, rows, [one], one).groups.keys() == {("lora", 1), ("lora", 2)}
    with pytest.raises(ConfigError, match="another model are both called lora: give one a name, NAME=MODEL"):
        plan(config, rows, [one], other)


def real_pictures(folder: Path, count: int = 6) -> Path:
    """A shard of the first embedded ones."""
    with tarfile.open(paths.DATA / "val-00001.tar") as source, tarfile.open(folder / "real.tar", "w") as tar:
        members = [member for member in source if member.name.endswith((".png", ".webp"))][:count]
        for member in members:
            tar.addfile(member, source.extractfile(member))
    assert len(members) == count
    return folder / "real.tar"


def test_results_hold_what_a_report_needs(config, make_lora, tmp_path):
    from evaluation.report.build import write_report

    config = config.model_copy(
        update={
            "images_per_prompt": 2, "latency_repeats": 2, "baseline": "teacher", "teacher_steps": 4,
            "reference_pictures": str(real_pictures(tmp_path)),
        }
    )  # fmt: skip
    rows = read_rows(config)
    subjects = [
        find_subject(f"{name}={make_lora(size=size)}", config) for name, size in (("weak", 0.02), ("strong_1", 0.2))
    ]
    results = json.loads(json.dumps(evaluate(plan(config, rows, subjects, find_baseline(config)))))
    by = {(row["model"], row["steps"]): row for row in results["rows"]}
    assert set(by) == {("teacher at 4", 4), ("weak", 1), ("weak", 2), ("strong_1", 1), ("strong_1", 2)}
    row = by["weak", 2]
    assert set(row["measures"]) == {"clip_score", "distance", "vendi", "between_seeds", "cmmd"}
    assert row["measures"]["cmmd"]["mean"] > 0 and "real.tar" in next(
        c["model"] + c["note"] + c["scale"] for c in results["cards"] if c["name"] == "cmmd"
    )
    for name, interval in row["measures"].items():
        assert interval["low"] <= interval["mean"] <= interval["high"], name
        gap = interval["mean"] - by["teacher at 4", 4]["measures"][name]["mean"]
        assert row["versus"][name]["mean"] == pytest.approx(gap, abs=1e-6)
    assert set(row["latency"]["ms"]) == {"text", "unet", "vae", "whole"} and row["latency"]["peak_mb"] > 0
    assert by["weak", 2]["latency"]["ms"]["unet"]["mean"] < by["teacher at 4", 4]["latency"]["ms"]["unet"]["mean"]
    assert {card["name"] for card in results["cards"]} == set(row["measures"]) == set(row["cases"])
    for name, sign in (("clip_score", 1), ("distance", -1), ("vendi", 1), ("between_seeds", 1)):
        best, worst = (row["cases"][name][end][0][2] for end in ("best", "worst"))
        assert sign * best > sign * worst, name
    assert results["ranking"]["distance"]["2"]["best"] in ("weak", "strong_1")

    folders = export_images(plan(config, rows, subjects), tmp_path / "images")
    assert set(folders) == {"weak-1", "weak-2", "strong_1-1", "strong_1-2"}
    study = Entries(folders)  # as jobs/study.py reads them
    assert sorted(study.captions.values()) == sorted(row.prompt for row in rows) and len(study.comparisons) == 6 * 6
    html, markdown, table, latex = (p.read_text() for p in write_report(results, rows, tmp_path, "A <title> & more"))
    assert "A &lt;title&gt; &amp; more" in html and "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png") >= 2 * 3 * 6 and "data:image/svg+xml" in html
    shown = f"{row['measures']['clip_score']['mean']:.2f}"
    assert all(shown in text for text in (html, markdown, latex)) and "strong\\_1" in latex
    lines = table.splitlines()
    assert lines[0].startswith("model,steps,measure,mean,low,high,versus_mean")
    found = next(line for line in lines if line.startswith("weak,2,clip_score,")).split(",")
    assert float(found[3]) == row["measures"]["clip_score"]["mean"]
    # All three files have the same: differences, the baseline aside, latency, memory, cards, provenance.
    difference = f"{row['versus']['clip_score']['mean']:+.2f} ["
    peak = f"{row['latency']['peak_mb']:.1f}"
    card = next(card for card in results["cards"] if card["name"] == "clip_score")
    for text in (markdown, latex):
        for part in (difference, "For orientation: teacher at 4 steps: ", peak, "2 pictures; LoRAs merged", card["sha256"][:16],
                     "base model", results["provenance"]["base_sha256"][:16], row["weights"][0][:12]):  # fmt: skip
            assert part in text, part
    best = results["ranking"]["clip_score"]["2"]["best"]
    assert any(line.startswith(f"{best},2,clip_score,") and ",best,0," in line for line in lines)
    assert any(line.startswith(f"weak,2,memory_peak_mb,{row['latency']['peak_mb']}") for line in lines)
    assert found[-1] == row["weights"][0][:12] and any(line.startswith("teacher at 4,4,clip_score,") for line in lines)
    [times] = [p.name for p in Path(config.out).glob(f"cells/{row['cells'][0]}/latency-*")]
    assert times == file_name("cpu", 2, torch.get_num_threads()) != file_name("cpu", 2, torch.get_num_threads() + 1)


def test_the_page_stands_alone_in_a_browser(config, make_lora, tmp_path):
    """On a phone and a desktop: no error in the console, nothing asked for outside of the file, nothing wider."""
    from evaluation.report.build import write_report

    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    rows = read_rows(config)[:4]
    results = evaluate(plan(config, rows, [find_subject(f"ours={make_lora()}", config)]))
    page_file = write_report(json.loads(json.dumps(results)), rows, tmp_path / "report")[0]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        wrong: list[str] = []
        ours = (page_file.as_uri(), "data:")
        for width, height in ((390, 844), (1280, 800)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
            page.on("request", lambda asked: None if asked.url.startswith(ours) else wrong.append(asked.url))
            page.goto(page_file.as_uri())
            page.wait_for_load_state("networkidle")
            assert wrong == [] and page.locator("h2").count() >= 5
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()


def test_the_papers_rows_need_its_bases_and_all_its_prompts(folders):
    whole = {"name": "coco5k", "count": 5000, "images": [5000, 139, 581781]}
    of = lambda family, width: replace(read_base(folders[family]), unet_config={"cross_attention_dim": width})
    for family, width in (("sd", 768), ("sdxl", 2048)):
        assert {row.family for row in comparable(of(family, width), whole)} == {family}
    assert not comparable(of("sd", 1024), whole) and not comparable(read_base(folders["sd"]), whole)
    assert not comparable(replace(of("sd", 768), parameterization="v_prediction"), whole)
    for change in ({"count": 4999}, {"name": "parti"}, {"images": [5000, 9, 581929]}, {"images": [4999, 139, 581781]}):
        assert not comparable(of("sd", 768), whole | change), change


def test_a_judge_is_the_published_one_by_its_sizes(tmp_path):
    assert is_published(RewardConfig(name="clip_score", checkpoint="/ViT-B-32.safetensors"))
    assert not is_published(RewardConfig(name="clip_score", checkpoint="/x.pt", architecture="ViT-B-16"))
    for name, folder in (("clip_score", "clip"), ("image_reward", "image_reward"), ("hps_v21", "hps")):
        assert not is_published(RewardConfig(name=name, checkpoint=str(paths.EVALUATORS / folder))), name
    sizes = open_clip.get_model_config("ViT-B-32-quickgelu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    assert is_published(RewardConfig(name="clip_score", checkpoint=str(tmp_path)))
    card = next(reward_card(spec) for spec in judge_specs(JudgesConfig(clip_score=CLIP)))
    assert not card.published and "a small network" in card.model and "on tensors" in card.preprocessing


def test_a_folder_that_another_node_does_not_share_is_one_line(config, make_lora, tmp_path):
    """The other node is this machine, with another folder in place of one that it would not see."""
    what = plan(config, read_rows(config), [find_subject(str(make_lora()), config)])
    store, asked = Store(config.out), []

    def look(hidden: Path):
        def there(seen, pools):
            asked.append(list(seen))
            return {"10.0.0.2": [p for p in seen if missing([p.replace(str(hidden), str(tmp_path / "its own"))])]}

        return there

    with pytest.raises(
        ConfigError, match=r"--out .*/out is not the same folder on node 10\.0\.0\.2: name one that all"
    ):
        check_reached(store, what.cells, what.specs, (config.generators,), look(Path(config.out)))
    with pytest.raises(ConfigError, match=r"sd-0\.05\.safetensors is not there on node 10\.0\.0\.2"):
        check_reached(store, what.cells, what.specs, (config.generators,), look(make_lora()))
    check_reached(store, what.cells, what.specs, (config.generators,), look(tmp_path / "nothing"))
    assert {config.base, CLIP, str(make_lora())} <= set(asked[-1]) and not list(Path(config.out).iterdir())


def test_a_base_of_pickles_is_refused(folders, tmp_path):
    """Loading one would run what it holds."""
    base = tmp_path / "pickled"
    shutil.copytree(folders["sd"], base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ConfigError, match=r"--base .*/pickled cannot be loaded: ") as caught:
        throughput.bare(throughput.ThroughputConfig(lora=tmp_path, base=str(base)), [Row("a", "a")])
    assert "\n" not in str(caught.value)


def test_the_embedded_model_brings_its_judges():
    assert {spec.name for spec in judge_specs(chosen_judges(EvaluateConfig()))} == {
        "clip_score", "aesthetic_v2", "image_reward", "hps_v21", "clip_features", "objects",
    }  # fmt: skip
    other = EvaluateConfig(base="/elsewhere")
    assert chosen_judges(other) == chosen_judges(EvaluateConfig()), "another base model on the embedded prompts"
    assert judge_specs(chosen_judges(other.model_copy(update={"prompts": "parti"}))) == []
