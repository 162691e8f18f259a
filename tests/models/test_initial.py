"""The LoRA that a run starts from is held against the base before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.export import save_diffusers_lora, save_kohya_lora
from hypersd_ray.models.initial import fitting_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata
from tests.helpers.pipelines import randomize, tiny_unet

METADATA = LoRAMetadata(
    base_model="tiny", family="sd", k=1, steps=(1,), scheduler="TCDScheduler", eta=0.0, rank=4, alpha=2.0
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    adapters = Adapters(tiny_unet("sd"), 4, 2.0)
    adapters.add("student", trainable=False)
    tensors = randomize(adapters, "student")
    path = save_diffusers_lora(tensors, tmp_path_factory.mktemp("lora") / "a.safetensors", METADATA)
    return path, tensors


def test_a_lora_of_this_base_comes_back_and_alpha_is_the_runs(made, sd_folder):
    path, tensors = made
    info = read_base(sd_folder)
    same = fitting_lora(path, info, rank=4, alpha=2.0)
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)
    other = fitting_lora(path, info, rank=4, alpha=8.0)
    for name in tensors:  # alpha / rank * B A is what it was
        factor = 0.25 if name.endswith("lora_B.weight") else 1.0
        torch.testing.assert_close(other[name], tensors[name] * factor)
    plain = fitting_lora(path, info)
    assert all(torch.allclose(plain[n], t * (0.5 if n.endswith("lora_B.weight") else 1)) for n, t in tensors.items())


def test_a_file_without_our_metadata_is_scaled_too(made, sd_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    _, tensors = made
    kohya = save_kohya_lora(tensors, tmp_path / "k.safetensors", METADATA)
    save_file(load_file(kohya), tmp_path / "bare.safetensors")
    read = fitting_lora(tmp_path / "bare.safetensors", read_base(sd_folder), rank=4, alpha=2.0)
    assert all(torch.allclose(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("metadata", "tensors", "rank", "said"),
    [
        (METADATA, None, 8, r"init=.*a\.safetensors has rank 4, lora\.rank is 8: set lora\.rank to 4"),
        (
            replace(METADATA, family="sdxl"),
            None,
            4,
            r"is a LoRA for sdxl .* is sd: give a LoRA that was distilled from",
        ),
        (METADATA, "narrow", 4, r"init=.*same base model"),
        (METADATA, "few", 4, r"init=.*missing .*same base model"),
    ],
)
def test_what_does_not_fit_is_one_line(made, sd_folder, tmp_path, metadata, tensors, rank, said):
    whole = made[1]
    if tensors == "narrow":
        whole = {n: t[:, : t.shape[1] // 2] if n.endswith("lora_A.weight") else t for n, t in whole.items()}
    if tensors == "few":
        whole = dict(list(whole.items())[:4])
    path = save_diffusers_lora(whole, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=said) as caught:
        fitting_lora(path, read_base(sd_folder), rank=rank, alpha=4.0)
    assert "\n" not in str(caught.value)


def test_no_weight_of_the_base_is_read(made, sd_folder, tmp_path):
    import shutil

    shutil.copytree(sd_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    info = read_base(tmp_path / "bare")
    assert fitting_lora(made[0], info, rank=4, alpha=4.0)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_unet(info, torch.float32, "cpu")
