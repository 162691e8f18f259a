"""Reading a pipeline folder: what it is, and one line when it is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.models.checkpoint import load_unet, read_base
from tests.helpers.pipelines import call, random_inputs, tiny_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_reads_what_was_saved(family, folders):
    info = read_base(str(folders[family]))
    assert info.family == family
    assert info.latent_channels == 4
    assert info.parameterization == "epsilon"
    assert torch.equal(info.schedule.alpha, scaled_linear().alpha)
    assert info.zero_null_prompt == (family == "sdxl")
    unet = load_unet(info, torch.float32, "cpu")
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())
    inputs = random_inputs(family)
    with torch.no_grad():
        assert torch.equal(call(unet, *inputs), call(tiny_unet(family), *inputs))
    assert {p.dtype for p in load_unet(info, torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


SCHEDULER = "scheduler/scheduler_config.json"
BREAKS = {
    "model_index.json does not exist.*--teacher": lambda f: (f / "model_index.json").unlink(),
    "unet/config.json does not exist": lambda f: shutil.rmtree(f / "unet"),
    "scheduler_config.json does not exist": lambda f: shutil.rmtree(f / "scheduler"),
    "FluxPipeline; accepted: StableDiffusionPipeline": lambda f: edit(
        f / "model_index.json", _class_name="FluxPipeline"
    ),
    "model_index.json is not JSON": lambda f: (f / "model_index.json").write_text('{"_class_name": '),
    "model_index.json is not JSON.*utf-8": lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x80"),
    "holds a list": lambda f: (f / SCHEDULER).write_text("[]"),
    "prediction_type='rectified'": lambda f: edit(f / SCHEDULER, prediction_type="rectified"),
    "scheduler_config.json: beta_schedule='sigmoid'": lambda f: edit(f / SCHEDULER, beta_schedule="sigmoid"),
    "scheduler_config.json: rescale_betas_zero_snr": lambda f: edit(f / SCHEDULER, rescale_betas_zero_snr=True),
    "no file named": lambda f: (f / WEIGHTS).unlink(),
    "Unable to load weights": lambda f: (f / WEIGHTS).write_bytes(b"not safetensors" * 20),
    r"lack 1 tensors .*conv_in\.weight": lambda f: edit_weights(f, lambda s: s.pop("conv_in.weight")),
    "conv_in.weight expected shape": lambda f: edit_weights(
        f, lambda s: s.update({"conv_in.weight": torch.zeros(2, 4, 3, 3)})
    ),
    "block_out_channels": lambda f: edit(f / "unet/config.json", block_out_channels=[32, 64]),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_what_is_wrong_is_one_line(reason, sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "pipe")
    BREAKS[reason](folder)
    with pytest.raises(ValueError, match=reason) as error:
        load_unet(read_base(folder), torch.float32, "cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_folder_that_is_not_there_or_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path / "nowhere", tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="--teacher must be a folder"):
            read_base(path)
