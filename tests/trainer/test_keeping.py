"""Which checkpoint a run goes on from, how a new one gets to where it belongs, and a start from another's first stage."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import ray.train
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from hypersd_ray.config.base import CombinationError, RunError
from hypersd_ray.config.measure import MeasureConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.models.roles import EMA, STUDENT, TEACHER
from hypersd_ray.recipes.tscd import tiny
from hypersd_ray.trainer import keeping, storage
from hypersd_ray.trainer.kinds import tscd
from hypersd_ray.trainer.kinds.base import Place
from hypersd_ray.trainer.loop import latent_shape
from hypersd_ray.trainer.storage import StorageError
from hypersd_ray.training.checkpoint import save_checkpoint, save_position
from hypersd_ray.training.quality import Quality, Yardstick, objective
from hypersd_ray.training.samples import Sampling
from tests.helpers.distil import make_config as distil_config
from tests.helpers.distil import make_distiller, run_stages, snapshot, student_parameters
from tests.helpers.pipelines import CAPTIONS

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of one run, after 1, 2 and 3 steps."""
    config = distil_config(tmp_path)
    keeping.write_config(str(tmp_path), config)
    state = make_distiller(config)
    for step in (1, 2, 3):
        run_stages(state, until=step)
        save_checkpoint(tmp_path / keeping.name_of(step), state)
        save_position(tmp_path / keeping.name_of(step), 0, 1, {"images": {"epoch": 0, "window": 0, "row": step}})
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    return tmp_path


def going_on(folder, patience_s=0.0):
    """(what was found, the state, what was told)."""
    state, told = make_distiller(distil_config(folder), seed=9), []
    return keeping.resume(str(folder), state, 0, 1, CPU, told.append, patience_s), state, told


def damage(folder, step, file="student.safetensors"):
    path = folder / keeping.name_of(step) / file
    path.write_bytes(path.read_bytes()[:-10])


def test_the_newest_is_taken_whatever_ray_train_knows(folder):
    found, state, told = going_on(folder)
    assert (found.path, found.damaged, told) == (f"{folder}/checkpoint_00000003", (), [])
    assert state.progress.step == 3 and found.positions[0]["images"]["row"] == 3


@pytest.mark.parametrize(
    "file", ["student.safetensors", "student-moments.safetensors", "manifest.json", "position-00000-of-00001.json"]
)
def test_a_truncated_one_falls_back_to_the_one_before_and_says_so(folder, file):
    damage(folder, 3, file)
    found, state, told = going_on(folder)
    assert found.path == f"{folder}/checkpoint_00000002" and state.progress.step == 2
    (line,) = told
    assert (
        line.startswith(f"{folder}/checkpoint_00000003 is damaged, going on from the one before: ") and "\n" not in line
    )
    # The new one of that step must not share its folder: Ray Train will remove the old one.
    assert keeping.name_of(3, found.damaged) == "checkpoint_00000003-again"
    assert keeping.name_of(4, found.damaged) == "checkpoint_00000004"


def refuse(folder, step):
    """Reading it raises OSError, and not FileNotFoundError, until what is returned is called."""
    manifest = folder / keeping.name_of(step) / "manifest.json"
    aside = manifest.rename(manifest.with_suffix(".aside"))
    manifest.symlink_to(manifest)
    return lambda: aside.replace(manifest)


def test_storage_that_refuses_a_read_for_a_while_is_no_damage(folder, capsys):
    threading.Timer(0.3, refuse(folder, 3)).start()
    found, state, told = going_on(folder, patience_s=60)
    assert (found.path, found.damaged, told) == (f"{folder}/checkpoint_00000003", (), [])
    assert state.progress.step == 3
    assert f"{folder}/checkpoint_00000003 is read, after" in capsys.readouterr().err


def test_storage_that_goes_on_refusing_a_read_sends_no_run_back(folder):
    refuse(folder, 3)
    with pytest.raises(StorageError, match=r"checkpoint_00000003 could not be read for 0 s \(.*storage_patience_s=0"):
        going_on(folder)


def test_a_folder_that_cannot_be_reached_for_a_while_is_not_a_new_run(folder, capsys):
    state = make_distiller(distil_config(folder), seed=9)
    again = functools.partial(keeping.resume, str(folder), state, 0, 1, CPU, print)
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("in the way")

    def bring_back():
        folder.unlink()
        aside.rename(folder)

    with pytest.raises(StorageError, match=r"config\.yaml could not be read for 0 s \(.*Not a directory"):
        again(0.0)
    threading.Timer(0.3, bring_back).start()
    assert again(60.0).path == f"{folder}/checkpoint_00000003" and state.progress.step == 3


def test_a_worker_that_does_not_see_what_the_job_wrote_says_so(folder):
    (folder / keeping.CONFIG).unlink()
    with pytest.raises(
        RunError, match=r"a worker does not find .*config\.yaml, which the job has written: set run\.out"
    ) as e:
        going_on(folder)
    assert "\n" not in str(e.value)


def _one_of_two(rank, folder, meet):
    """Rank 1 has another list of checkpoints: as behind a cache of listings that is some seconds old."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    named = keeping.names
    if rank == 1:
        keeping.names = lambda folder: [name for name in named(folder) if not name.endswith("3")]
    state = make_distiller(distil_config(Path(folder)))
    keeping.resume(folder, state, rank, 2, CPU, print, 0.0)
    (Path(folder) / f"rank-{rank}").write_text(str(state.progress.step))
    dist.destroy_process_group()


@pytest.mark.processes
def test_all_workers_go_on_from_the_same_one(folder, tmp_path_factory):
    mp.set_forkserver_preload(["tests.trainer.test_keeping"])
    meet = str(tmp_path_factory.mktemp("meet") / "meet")
    mp.start_processes(_one_of_two, (str(folder), meet), nprocs=2, start_method="forkserver")
    assert [(folder / f"rank-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


def test_a_measured_stage_survives_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    keeping.append_quality(str(tmp_path), {"stage": 1, "objective": 0.5}, 0.0)
    written, write_text = [], Path.write_text

    def half(path, text):
        written.append(path)
        if len(written) == 1:
            write_text(path, text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", half)
    keeping.append_quality(str(tmp_path), {"stage": 2, "objective": 0.25}, 60)
    assert len(written) == 2
    assert [record["objective"] for record in keeping.read_quality(str(tmp_path))] == [0.5, 0.25]


def test_no_room_for_the_temporary_copy_is_one_line(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = keeping.local_room()(save_file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"a checkpoint cannot be written to .*set TMPDIR") as e:
            save({"x": torch.zeros(10_000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(e.value)
    with pytest.raises(KeyError), keeping.local_room():  # our own mistakes stay what they are
        raise KeyError("x")


def test_what_is_missing_is_damage_too(folder):
    (folder / keeping.name_of(3) / "position-00000-of-00001.json").unlink()
    shutil.rmtree(folder / keeping.name_of(2))
    (folder / keeping.name_of(2)).mkdir()
    found, state, told = going_on(folder)
    assert (
        found.damaged == ("checkpoint_00000003", "checkpoint_00000002") and state.progress.step == 1 and len(told) == 2
    )


def test_without_a_whole_one_a_run_does_not_begin_anew_by_itself(folder):
    for step in (1, 2, 3):
        damage(folder, step)
    with pytest.raises(RunError, match=r"none of the 3 checkpoints in .* is whole .*truncated.*set run.name") as caught:
        going_on(folder)
    assert "\n" not in str(caught.value)


def test_another_configuration_is_not_damage(folder):
    state = make_distiller(distil_config(folder, lora={"rank": 2}))
    with pytest.raises(ValueError, match="checkpoint_00000003 is not a whole checkpoint of this run"):
        keeping.resume(str(folder), state, 0, 1, CPU, print, 0.0)


def test_orphans_are_removed_and_the_newest_kept(folder):
    keeping.prune(str(folder), keep=0)
    assert keeping.names(str(folder)) == ["checkpoint_00000003", "checkpoint_00000002"]
    assert (folder / "lora").exists()


@pytest.mark.parametrize(
    "record", ['{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_00000009"}]}', "{", "[]"]
)
def test_a_record_that_ray_train_would_stumble_over_goes(folder, record):
    path = folder / keeping.SNAPSHOT
    path.write_text(record)
    keeping.mend_record(str(folder))
    assert not path.exists()
    path.write_text('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_00000003"}]}')
    keeping.mend_record(str(folder))
    assert path.exists()


def test_storage_that_comes_back(tmp_path, capsys):
    """A file stands where the run's folder should be, for a while; then nothing is missing."""
    made, run = tmp_path / "made", tmp_path / "run"
    made.mkdir()
    for name in ("manifest.json", "student.safetensors"):
        (made / name).write_text(name)
    run.write_text("in the way")
    threading.Timer(1.0, run.unlink).start()
    begun = time.monotonic()
    done = keeping.uploader(str(run), 60)(ray.train.Checkpoint.from_directory(str(made)), "checkpoint_00000001")
    assert time.monotonic() - begun >= 1
    assert {p.name: p.read_text() for p in (run / "checkpoint_00000001").iterdir()} == {
        "manifest.json": "manifest.json", "student.safetensors": "student.safetensors",
    }  # fmt: skip
    assert done.path == f"{run}/checkpoint_00000001"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "cannot be written" in said[0] and "is written, after" in said[1]


def test_storage_that_does_not_come_back(tmp_path):
    (tmp_path / "run").write_text("")
    (tmp_path / "made").write_text("")
    with pytest.raises(
        StorageError, match=r"run/x could not be written for \d s \(.*raise run.storage_patience_s=1"
    ) as caught:
        storage.patiently(lambda: storage.put(tmp_path / "made", f"{tmp_path}/run/x"), f"{tmp_path}/run/x", 1)
    assert "\n" not in str(caught.value)


def test_what_is_storages_fault():
    class EndpointConnectionError(Exception):
        pass

    EndpointConnectionError.__module__ = "botocore.exceptions"
    assert storage.is_trouble(EndpointConnectionError()) and storage.is_trouble(TimeoutError())
    assert not storage.is_trouble(KeyError("x"))
    with storage.tolerant():
        raise EndpointConnectionError
    with pytest.raises(KeyError), storage.tolerant():
        raise KeyError("x")


def test_logs_survive_a_folder_that_is_away(tmp_path):
    """Lines wait for it; TensorBoard goes on with what comes after."""
    from hypersd_ray.trainer.logs import JsonLines, TensorBoard

    run, aside = tmp_path / "run", tmp_path / "aside"
    run.mkdir()
    lines, board = JsonLines(str(run)), TensorBoard(str(run), 0)
    for step in range(1, 7):
        if step == 3:
            run.rename(aside)
            run.write_text("")
        if step == 5:
            run.unlink()
            aside.rename(run)
        for logger in (lines, board):
            logger.scalars(step, {"loss": float(step)})
            logger.flush()
    board.close()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [e.step for e in events.Scalars("loss")]
    assert {1, 2, 6} <= set(found)


def test_a_run_from_anothers_first_stage_is_that_run_after_it(make_micro, tmp_path):
    """As if it had made the first stage itself: student and EMA from the file, fresh moments, the second stage's k."""
    config = make_micro()
    whole = tscd.build(config, Place(CPU, 0))
    with torch.no_grad():
        for p in student_parameters(whole.roles):
            p.add_(0.01)
    tensors = {n: p.detach().clone() for n, p in whole.roles.named_tensors(STUDENT).items()}
    metadata = LoRAMetadata("micro", "sd", 2, (2,), "TCDScheduler", 0.0, 4, 4.0)
    path = save_diffusers_lora(tensors, tmp_path / "tscd-k2.safetensors", metadata)
    whole.next_stage()
    warm_config = config.model_copy(update={"first_stage": str(path)})
    tscd.check(warm_config)
    warm = tscd.build(warm_config, Place(CPU, 0))
    assert (warm.progress, warm.steps) == (whole.progress, whole.steps)
    ours, theirs = snapshot(warm), snapshot(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all(torch.equal(warm.roles.named_tensors(EMA)[n], t) for n, t in tensors.items())
    with pytest.raises(ValueError, match=r"first_stage=.* has rank 4, lora.rank is 8"):
        tscd.check(warm_config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 8})}))
    with pytest.raises(CombinationError, match="first of several stages"):
        make_micro(distill={"k_list": (1,), "n_list": (8,), "steps_list": (4,)}, first_stage=str(path))


@pytest.fixture
def make_micro(teacher, shards):
    def make(**changes):
        return distil_config(teacher, data={"shards": str(shards), "resolution": 64}, **changes)

    return make


def test_samples_have_the_runs_resolution():
    """The embedded recipe's is its base's own; another one's is not."""
    config, base = tiny(), read_base(paths.TEACHER)
    assert latent_shape(config) == (base.latent_channels, *[base.unet_config["sample_size"]] * 2)
    larger = config.model_copy(update={"data": config.data.model_copy(update={"resolution": 48})})
    assert latent_shape(larger)[1:] == (48 // base.latent_factor,) * 2


def test_quality_is_distance_to_the_teachers_end(make_micro, teacher, tmp_path):
    """Zero for the teacher's own trajectory, more for a jump; the end points are made once; CLIP counts as it is told."""
    config = make_micro()
    state = tscd.build(config, Place(CPU, 0))
    measure = MeasureConfig(
        prompts=tuple(CAPTIONS[:3]), steps=(1, 4), reference_steps=4, guidance=1.0, cache=str(tmp_path / "c")
    )
    yardstick = Yardstick(measure, state.roles, load_encoders(teacher), teacher, latent_shape(config))
    (kept,) = (tmp_path / "c").iterdir()
    quality = yardstick({1: Sampling(1), 4: Sampling(4)}, role=TEACHER)
    assert max(quality.distance[4]) < 1e-6 < min(quality.distance[1])
    assert set(quality.means()) == {"quality/distance_1", "quality/distance_4"}
    before = kept.stat().st_mtime_ns
    again = Yardstick(measure, state.roles, load_encoders(teacher), teacher, latent_shape(config))
    assert torch.equal(again.reference, yardstick.reference) and kept.stat().st_mtime_ns == before

    larger = latent_shape(config.model_copy(update={"data": config.data.model_copy(update={"resolution": 128})}))
    assert Yardstick(measure, state.roles, load_encoders(teacher), teacher, larger).reference.shape[1:] == larger
    assert len(list((tmp_path / "c").iterdir())) == 2, "of each resolution its own"

    near, far = (Quality({1: [d, d]}, {1: [20.0, 20.0]}, [25.0, 25.0]) for d in (0.5, 1.0))
    assert objective(near, 0) - objective(far, 0) == pytest.approx(-0.6931, abs=1e-4)
    assert objective(far, 1.0) == pytest.approx(0.2231, abs=1e-4)  # -ln(20 / 25)
    assert objective(Quality({1: [float("nan")]}, {}, []), 1.0) == float("inf")


def test_two_workers_shares_end_in_one_folder(tmp_path):
    """Each worker uploads its own files, some in folders; the second finds the first one's there."""
    for rank in (0, 1):
        made = tmp_path / f"made{rank}"
        (made / "zero2" / "student").mkdir(parents=True)
        (made / "zero2" / "student" / f"rank{rank}.pt").write_text(str(rank))
        (made / f"position-{rank}.json").write_text("{}")
        upload = keeping.uploader(str(tmp_path / "run"), 0)
        upload(ray.train.Checkpoint.from_directory(str(made)), "checkpoint_00000001")
    there = tmp_path / "run" / "checkpoint_00000001"
    assert {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} == {
        "position-0.json", "position-1.json", "zero2/student/rank0.pt", "zero2/student/rank1.pt",
    }  # fmt: skip
