"""Edges: known pictures; a ControlNet that learns to follow them, through training, resume and the pipeline."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cv2")
from evaluation.control import ControlConfig, edge_agreement, evaluate, out_file, table
from hypersd_ray.embedded import paths, pretrain_controlnet, training
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.pretrain_controlnet import make_controlnet, train_controlnet
from hypersd_ray.embedded.training import flip_some
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.edges import edge_map


def square(left: int, size: int = 14) -> torch.Tensor:
    picture = torch.full((1, 3, 32, 32), 20, dtype=torch.uint8)
    picture[:, :, 8 : 8 + size, left : left + size] = 230
    return picture


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_edges_are_where_the_picture_changes(kind):
    found = edge_map(square(8), kind)[0, 0]
    assert set(found.unique().tolist()) == {0, 255} and found[14, 14] == 0 and found[2, 2] == 0
    assert found[14, 6:10].any() and found[14, 20:24].any()
    thick = (found > 0).float().mean()
    assert (0.12 < thick < 0.4) if kind == "scribble" else (0.03 < thick < 0.1)


def test_agreement_counts_edges_within_a_pixel():
    here, near, far = (edge_map(square(left), "canny") for left in (6, 7, 12))
    none = torch.zeros_like(here)
    pairs = [(here, here), (here, near), (here, far), (here, none), (none, none)]
    same, shifted, apart, empty, nothing = (edge_agreement(a, b).item() for a, b in pairs)
    assert same == 1 and shifted == 1 and 0.2 < apart < 0.8 and empty == 0 and nothing == 1
    assert edge_agreement(here, near, tolerance=0).item() < 0.8


def test_a_new_controlnet_changes_nothing():
    """Its ways into the UNet begin at zero, so training begins at the teacher."""
    net, unet = make_controlnet(paths.TEACHER), load_unet(read_base(paths.TEACHER), torch.float32, "cpu")
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, 96)
    with torch.no_grad():
        down, mid = net(x, t, c, controlnet_cond=torch.rand(2, 3, 32, 32), return_dict=False)
        told = unet(x, t, c, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        torch.testing.assert_close(told, unet(x, t, c).sample)


def test_training_resumes_and_its_folder_is_evaluated(tmp_path, capsys, monkeypatch):
    images, captions = load_pictures(paths.DATA, "val")
    some = images[:64], captions[:64]
    train_controlnet(paths.TEACHER, *some, "canny", tmp_path / "unbroken", 4, batch=4)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    with monkeypatch.context() as broken:
        calls = iter(range(3))  # the fourth batch is never drawn: the state of two steps is what is there
        broken.setattr(pretrain_controlnet, "flip_some", lambda *batch: (next(calls), flip_some(*batch))[1])
        with pytest.raises(StopIteration):
            train_controlnet(paths.TEACHER, *some, "canny", tmp_path / "a", 4, batch=4)
    assert torch.load(tmp_path / "a/canny_state.pt", weights_only=True)["step"] == 2
    train_controlnet(paths.TEACHER, *some, "canny", tmp_path / "a", 4, batch=4)
    state, whole = (torch.load(tmp_path / f"{n}/canny_state.pt", weights_only=True) for n in ("a", "unbroken"))
    torch.testing.assert_close(state["module"], whole["module"])
    assert state["step"] == 4 and any(
        value.abs().max() > 0 for name, value in state["module"].items() if name.startswith("controlnet_mid_block")
    )
    lora = paths.LORAS / "tscd-k1.safetensors"
    shown: dict[str, torch.Tensor] = {}
    report = evaluate(
        ControlConfig(controlnet=tmp_path / "a/canny", loras=(lora,), steps=(1,), teacher_steps=2, pictures=4),
        show=shown.__setitem__,
    )
    assert list(shown) == ["hint", "teacher 2", "tscd-k1 1"]
    assert all(pictures.shape == (4, 3, 32, 32) for pictures in shown.values())
    assert [(row.model, row.steps) for row in report.rows] == [
        ("real pictures, autoencoded", 0), ("teacher", 2), ("tscd-k1", 1),
    ]  # fmt: skip
    named = ControlConfig(controlnet=tmp_path / "a/canny")
    assert str(out_file(named, report)) == "runs/control-canny.json", "scribble's is another file"
    assert out_file(named.model_copy(update={"out": tmp_path / "x.json"}), report) == tmp_path / "x.json"
    assert 0 < report.rows[0].agreement.mean <= 1 and "| tscd-k1 | 1 |" in table(report)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a ControlNet's folder"):
        evaluate(ControlConfig(controlnet=tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="say which hints it takes"):
        evaluate(ControlConfig(controlnet=tmp_path))
