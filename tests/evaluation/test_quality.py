"""Fidelity: the teacher against itself, LoRAs through diffusers against our sampler, cache, files and error lines."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evaluation import quality
from evaluation.quality import QualityConfig, Subject, evaluate, reference_latents, reference_path, teacher_sha256
from hypersd_ray.config.cli import run_job
from hypersd_ray.models.hashing import sha256_of
from tests.helpers.pipelines import CAPTIONS

PROMPTS = CAPTIONS[:3]


@pytest.fixture
def config(folders, prompts_file, tmp_path) -> QualityConfig:
    """Small, on the tiny SD1.5."""
    return QualityConfig(
        teacher=folders["sd"], prompts_file=prompts_file, steps=(1, 4), reference_steps=6, batch=4,
        cache=tmp_path / "cache", out=tmp_path / "out" / "quality.json",
    )  # fmt: skip


def with_(config: QualityConfig, **changes) -> QualityConfig:
    return QualityConfig(**(config.model_dump() | changes))


def test_the_teacher_at_the_references_steps_has_distance_zero(config):
    report = evaluate(with_(config, steps=(2, 12), reference_steps=12, sampler="edges", prompts=2))
    two, twelve = report.rows
    assert (twelve.distance.mean, twelve.distance.high, twelve.sharpness.mean) == (0.0, 0.0, 1.0)
    assert two.distance.low > 0


def test_distance_and_sharpness_by_hand():
    reference = torch.tensor([[[[0.0, 2.0]]], [[[4.0, 6.0]]]])  # mean 3, variance (9 + 1 + 1 + 9) / 3 = 20 / 3
    latents = reference + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(quality.latent_distance(latents, reference), torch.tensor([1.0, 4.0]) * 3 / 20)
    picture = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    picture[:, 0, 0, 0] = 10  # differs by 10 from its neighbour below and from the one beside it
    torch.testing.assert_close(quality.gradient_norm(picture), torch.tensor([200.0]).sqrt())


@pytest.mark.parametrize("sampler", ["tcd", "ddim", "edges"])
def test_a_lora_of_zeros_is_the_base(config, make_lora, sampler):
    subject = Subject(config, PROMPTS)
    base = subject.student(2, sampler)
    subject.load_lora(make_lora(size=0))
    torch.testing.assert_close(subject.student(2, sampler), base)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_samplers_agree(config, folders, make_lora, family):
    """Ours and diffusers' DDIM take the same steps; where both end at clean data they end at the same point."""
    subject = Subject(with_(config, teacher=folders[family], batch=2), PROMPTS)
    base = subject.student(4, "edges")
    subject.load_lora(make_lora(family))
    ours = subject.student(4, "edges")
    assert (ours - base).square().mean() > 1e-4, "the LoRA changes nothing: the comparison would be empty"
    subject.pipe.scheduler.register_to_config(set_alpha_to_one=True)
    torch.testing.assert_close(subject.student(4, "ddim"), ours, rtol=1e-3, atol=1e-3)
    # TCD stops at our t = 1: x_1 = alpha_1 x_0 + sigma_1 eps, sigma_1 = sqrt(0.00085) = 0.029, eps about 1
    assert 0.005 < (subject.student(4, "tcd") - ours).square().mean().sqrt() < 0.06


def test_loras_are_named_by_their_files_and_by_their_paths_where_files_are_named_alike(make_lora, tmp_path):
    first = make_lora()
    twins = [tmp_path / folder / "merged.safetensors" for folder in ("a", "b")]
    for twin in twins:
        twin.parent.mkdir()
        twin.write_bytes(first.read_bytes())
    assert list(quality.check_loras([first, *twins])) == [first.stem, *map(str, twins)]


def test_loading_a_lora_replaces_the_one_before(config, make_lora):
    subject, zero, random = Subject(config, PROMPTS), make_lora(size=0), make_lora()
    base = subject.student(1, "edges")
    subject.load_lora(random)
    subject.load_lora(zero)
    torch.testing.assert_close(subject.student(1, "edges"), base)


def test_rows_do_not_depend_on_the_batch(config):
    one = Subject(with_(config, batch=1, eta=0.5), PROMPTS).student(2, "tcd")
    torch.testing.assert_close(Subject(with_(config, batch=3, eta=0.5), PROMPTS).student(2, "tcd"), one)


def test_reference_is_read_from_the_cache(config):
    subject = Subject(config, PROMPTS)
    path = reference_path(config, PROMPTS, teacher_sha256(config.teacher))
    made = reference_latents(subject, path)
    assert list(path.parent.iterdir()) == [path]
    subject.teacher = lambda steps: pytest.fail("made again")  # type: ignore[method-assign]
    assert torch.equal(reference_latents(subject, path), made)


def test_cache_is_keyed_by_all_that_decides_the_reference(config, folders):
    sha = teacher_sha256(folders["sd"])
    names = {
        reference_path(config, PROMPTS, sha),
        reference_path(config, PROMPTS[:2], sha),
        reference_path(config, PROMPTS, teacher_sha256(folders["sdxl"])),
        reference_path(with_(config, seed=1), PROMPTS, sha),
        reference_path(with_(config, guidance=4.0), PROMPTS, sha),
        reference_path(with_(config, reference_steps=7), PROMPTS, sha),
    }
    assert len(names) == 6
    assert reference_path(with_(config, batch=1, steps=(3,)), PROMPTS, sha) in names


def test_held_out_prompts_are_distinct_and_stable():
    prompts = quality.held_out_prompts(quality.paths.DATA, 512)
    assert len(set(prompts)) == 512
    assert quality.held_out_prompts(quality.paths.DATA, 3) == prompts[:3]
    with pytest.raises(ValueError, match=r"--prompts 100000: .* distinct captions; ask for at most that"):
        quality.held_out_prompts(quality.paths.DATA, 100_000)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
    run_job(quality.main)


def test_command_prints_the_table_and_writes_json(config, make_lora, monkeypatch, capsys):
    lora = make_lora()
    run(
        monkeypatch, "--loras", lora, "--teacher", config.teacher, "--prompts-file", config.prompts_file,
        "--steps", 1, 2, "--reference-steps", 4, "--cache", config.cache, "--out", config.out,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| teacher"] * 2 + [f"| {lora.stem}"] * 2
    written = json.loads(config.out.read_text())
    assert written["settings"]["sampler"] == "tcd"
    assert written["settings"]["prompts_used"] == 6
    assert written["teacher_sha256"] == teacher_sha256(config.teacher)
    assert written["loras"][lora.stem]["sha256"] == sha256_of(lora)
    assert written["loras"][lora.stem]["metadata"]["hypersd_ray.k"] == "4"
    assert [(r["model"], r["steps"]) for r in written["rows"]] == [
        ("teacher", 1), ("teacher", 2), (lora.stem, 1), (lora.stem, 2),
    ]  # fmt: skip
    teacher, student = written["rows"][1], written["rows"][3]
    assert teacher["versus_teacher"] is None
    difference = student["distance"]["mean"] - teacher["distance"]["mean"]
    assert student["versus_teacher"]["mean"] == pytest.approx(difference)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--loras", "no/such.safetensors"], "error: --loras no/such.safetensors is not a file"),
        (["--prompts-file", "no-such.txt"], "error: --prompts-file no-such.txt cannot be read: No such file"),
        (["--prompts-file", "EMPTY"], "has 0 distinct prompts: write at least 2, one a line"),
        (["--teacher", "no/such"], "no/such/model_index.json does not exist"),
        (["--steps", "0"], "each within 1..40 with --sampler tcd"),
        (["--sampler", "ddim", "--eta", "0.3"], "--sampler ddim, whose eta is another thing"),
    ],
)
def test_error_lines(arguments, line, monkeypatch, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *(str(tmp_path / "empty.txt") if a == "EMPTY" else a for a in arguments))
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert line in said
    assert "\n" not in said


def test_a_lora_of_another_base_is_refused_in_one_line(config, make_lora):
    with pytest.raises(ValueError, match=r"^--loras .* does not fit .*") as raised:
        evaluate(with_(config, loras=(make_lora("sdxl"),)))
    assert "\n" not in str(raised.value)
