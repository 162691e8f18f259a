"""Checkpoints: a run that is broken anywhere and goes on ends bitwise where the unbroken one does."""

from __future__ import annotations

import json
import shutil

import pytest

from hypersd_ray.training.checkpoint import (
    MANIFEST,
    Stored,
    load_checkpoint,
    load_positions,
    save_checkpoint,
    save_position,
)
from tests.helpers.distil import ADVERSARIAL, make_batch, make_config, make_distiller, run_stages, same, snapshot

KINDS = {
    "mse": {},
    "adversarial": {"adversarial": ADVERSARIAL | {"warmup_share": 0.3}, "optim": {"schedule": "cosine", "warmup": 2}},
    "previous": {"distill": {"teacher": "previous"}, "optim": {"accumulation": 2}},
    "full": {"full_unet": True, "adversarial": {"adv_end": 0.1}},
}
STEPS = {"distill": {"k_list": (2, 1), "n_list": (8, 8), "steps_list": (2, 2)}}


def config_of(kind, tmp_path):
    overrides = dict(KINDS[kind])
    return make_config(tmp_path, **(overrides | {"distill": STEPS["distill"] | overrides.get("distill", {})}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_ends_where_the_unbroken_does(kind, tmp_path):
    """Broken within the first stage, at its end, within the last, and after all is done."""
    config = config_of(kind, tmp_path)
    unbroken = make_distiller(config)
    for at in (1, 2, 3, 4):
        run_stages(unbroken, until=at)
        save_checkpoint(tmp_path / str(at), unbroken)
    assert unbroken.finished
    expected, moments = snapshot(unbroken), snapshot(unbroken, moments=True)
    for at in (1, 2, 3, 4):
        # Other first weights: whatever the checkpoint leaves out shows.
        resumed = make_distiller(config, seed=99)
        load_checkpoint(tmp_path / str(at), resumed)
        done = sum(config.distill.steps_list[: resumed.progress.stage]) + resumed.progress.step
        assert done == at
        run_stages(resumed)
        assert resumed.progress == unbroken.progress
        assert same(snapshot(resumed), expected), f"broken after step {at}"
        assert same(snapshot(resumed, moments=True), moments)


def test_a_resume_goes_on_counting_bad_steps(tmp_path):
    config = make_config(tmp_path)
    d, poisoned = make_distiller(config), make_batch(1)
    poisoned.x0[0, 0, 0, 0] = float("nan")
    d.step(make_batch(0))
    d.step(poisoned)
    save_checkpoint(tmp_path / "c", d)
    resumed = make_distiller(config, seed=5)
    load_checkpoint(tmp_path / "c", resumed)
    assert (resumed.progress.skipped, resumed.progress.bad_in_a_row) == (1, 1)


@pytest.mark.parametrize("kind", ["adversarial", "previous", "full"])
def test_every_loaded_tensor_is_a_copy(kind, tmp_path, monkeypatch):
    """Training on must not write through to what was saved, and the file must not be held open."""
    d, folder, read = make_distiller(config_of(kind, tmp_path)), tmp_path / "c", []
    d.step(make_batch(0))
    save_checkpoint(folder, d)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}

    def get(stored, name):
        read.append(stored.file.get_tensor(name))
        return read[-1]

    monkeypatch.setattr(Stored, "__getitem__", get)
    load_checkpoint(folder, d)
    own = [tensor for _, tensors in d.parts() for tensor in tensors.values()]
    assert len(read) >= len(own) > 0
    files = {tensor.untyped_storage().data_ptr() for tensor in read}
    assert not files & {tensor.untyped_storage().data_ptr() for tensor in own}
    before = snapshot(d)
    d.step(make_batch(1))
    assert not same(snapshot(d), before)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good checkpoint of `adversarial`."""
    root = tmp_path_factory.mktemp("whole")
    d = make_distiller(config_of("adversarial", root))
    run_stages(d, until=3)
    save_checkpoint(root / "checkpoint", d)
    return root / "checkpoint"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 0xFF
    path.write_bytes(bytes(data))


def _same_size_garbage(path):
    """With a manifest that vouches for it, as if written so: what is left is the readers' own refusal."""
    import hashlib

    garbage = b"garbage" * 40
    path.write_bytes(garbage)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = {"size": len(garbage), "sha256": hashlib.sha256(garbage).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["student.safetensors", "student-moments.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), "No such file"),
        (_truncate, "truncated"),
        (_flip, "damaged"),
        (_same_size_garbage, None),
    ],
    ids=["missing", "truncated", "flipped", "garbage"],
)
def test_a_damaged_checkpoint_is_one_line(name, damage, said, whole, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole, folder)
    if name == "manifest.json":
        said = "No such file" if said == "No such file" else None
        if damage is _same_size_garbage:
            damage = lambda p: p.write_text('{"files": 3}')
        elif damage is _flip:
            damage = lambda p: p.write_text("[]")
    damage(folder / name)
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(folder, make_distiller(config_of("adversarial", tmp_path)))
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert "is not a whole checkpoint of this run" in text


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        load_checkpoint(tmp_path, make_distiller(make_config(tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora": {"rank": 8}}, "rank"),
        ({"full_unet": True}, "UNet tensors do not fit"),
        ({"distill": {"teacher": "previous"}}, "missing"),
    ],
    ids=["rank", "full", "previous"],
)
def test_a_checkpoint_of_another_configuration_is_refused(overrides, said, whole, tmp_path):
    base = {"adversarial": KINDS["adversarial"]["adversarial"]}
    overrides = base | overrides | {"distill": STEPS["distill"] | overrides.get("distill", {})}
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(whole, make_distiller(make_config(tmp_path, **overrides)))
    assert "\n" not in str(caught.value)


def test_a_discriminator_where_there_was_none_is_refused(tmp_path):
    d = make_distiller(make_config(tmp_path))
    d.step(make_batch())
    save_checkpoint(tmp_path / "c", d)
    with pytest.raises(ValueError, match="is not a whole checkpoint of this run") as caught:
        load_checkpoint(tmp_path / "c", make_distiller(make_config(tmp_path, adversarial=ADVERSARIAL)))
    assert "\n" not in str(caught.value)


def test_positions_are_of_a_rank_of_a_world(tmp_path):
    assert load_positions(tmp_path, 0, 1) == [], "there is nothing"
    for rank in range(2):
        save_position(tmp_path, rank, 2, {"epoch": 1, "window": 2, "row": rank})
    (tmp_path / MANIFEST).write_text(json.dumps({"world_size": 2}))
    of = [{"epoch": 1, "window": 2, "row": rank} for rank in range(2)]
    assert load_positions(tmp_path, 1, 2) == [of[1]]
    assert load_positions(tmp_path, 0, 1) == load_positions(tmp_path, 2, 4) == of
    next(tmp_path.glob("position-00000*")).write_text("{")
    for rank, world in ((0, 2), (0, 1)):
        with pytest.raises(ValueError, match="damaged") as caught:
            load_positions(tmp_path, rank, world)
        assert "\n" not in str(caught.value)
    next(tmp_path.glob("position-00000*")).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_positions(tmp_path, 2, 3)
