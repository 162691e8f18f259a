"""LoRA files through diffusers' own loader: every tensor arrives, with its alpha, in both layouts."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hypersd_ray.diffusion.segments import edges
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.export import merge_lora, save_diffusers_lora, save_kohya_lora, save_unet, usage
from hypersd_ray.models.lora import LCM_TARGETS, Adapters
from hypersd_ray.models.lora_file import LoRAMetadata, module_of, read_lora
from hypersd_ray.models.samplers import TCD_GRID
from tests.helpers.pipelines import call, random_inputs, randomize, tiny_unet

RANK, ALPHA = 4, 6.5  # unequal: a lost alpha is a LoRA of 1 / 1.625 of its strength
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
LAYOUTS = {"diffusers": save_diffusers_lora, "kohya": save_kohya_lora}


def metadata_of(family, base="base", **changes):
    metadata = LoRAMetadata(
        base_model=str(base), family=family, k=4, steps=(4, 8), scheduler="TCDScheduler", eta=0.25, rank=RANK,
        alpha=ALPHA, recipe="tiny", extra={"note": "a=b, c"},
    )  # fmt: skip
    return replace(metadata, **changes)


@pytest.fixture(scope="module")
def trained():
    """family -> (random tensors of all modules, the UNet's output with them and without)."""
    made = {}
    for family in PIPELINES:
        unet = tiny_unet(family)
        inputs = random_inputs(family)
        adapters = Adapters(unet, RANK, ALPHA)
        adapters.add("student", trainable=False)
        tensors = randomize(adapters, "student")
        with torch.no_grad(), adapters.playing("student"):
            made[family] = tensors, call(unet, *inputs), len(adapters.layers)
    return made


def load_pipeline(family, folder, lora, **options):
    pipe = PIPELINES[family].from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora)
    return pipe


def loaded_tensors(pipe):
    return {n.replace(".default_0", ""): p for n, p in pipe.unet.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(("family", "layout"), product(PIPELINES, LAYOUTS))
def test_round_trip_through_diffusers(family, layout, folders, trained, tmp_path):
    tensors, expected, modules = trained[family]
    name = "pytorch_lora_weights.safetensors"  # what `load_lora_weights(folder)` looks for
    path = LAYOUTS[layout](tensors, tmp_path / name, metadata_of(family))
    pipe = load_pipeline(family, folders[family], tmp_path)  # the folder, as a user would

    loaded = loaded_tensors(pipe)
    assert loaded.keys() == tensors.keys()
    assert len(loaded) == 2 * modules
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    for target in LCM_TARGETS:  # the trap loses whole kinds of layers: each kind is there
        assert any(name.endswith(f".{target}.lora_B.weight") for name in loaded), target
    scales = {m.scaling["default_0"] for m in pipe.unet.modules() if hasattr(m, "scaling")}
    assert scales == {ALPHA / RANK}
    with torch.no_grad():
        output = call(pipe.unet, *random_inputs(family))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)

    ours, metadata = read_lora(path)
    assert metadata == metadata_of(family)
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", PIPELINES)
def test_images_of_both_layouts_are_identical(family, folders, trained, tmp_path):
    images = []
    for layout, save in LAYOUTS.items():
        path = save(trained[family][0], tmp_path / f"{layout}.safetensors", metadata_of(family))
        pipe = load_pipeline(family, folders[family], path)
        pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
        for parameter in pipe.unet.parameters():
            # The loader keeps the file's memory, where Kohya's scalars put tensors at odd offsets: oneDNN then takes
            # other kernels, whose sums differ by 1e-6.
            parameter.data = parameter.data.clone()

        def sample(pipe=pipe):
            generator = torch.Generator().manual_seed(0)
            options = {"num_inference_steps": 4, "guidance_scale": 0, "eta": 0.3, "output_type": "np"}
            return pipe("a red apple", generator=generator, **options).images

        images.append(sample())
        pipe.unload_lora_weights()
        assert not np.array_equal(images[-1], sample())
    assert np.isfinite(images[0]).all()
    assert np.array_equal(*images)


def test_half_precision_file_keeps_alpha_exactly(trained, tmp_path):
    alpha = 6.1  # has no half-precision value
    for layout, save in LAYOUTS.items():
        path = save(trained["sd"][0], tmp_path / f"{layout}.safetensors", metadata_of("sd", alpha=alpha), torch.float16)
        assert {v.dtype for k, v in load_file(path).items() if "lora_" in k.split(".", 1)[1]} == {torch.float16}
        tensors, metadata = read_lora(path)
        assert metadata.alpha == alpha
        name = next(iter(tensors))
        assert torch.equal(tensors[name], trained["sd"][0][name].half().float())
    alphas = {v.item() for k, v in load_file(path).items() if k.endswith(".alpha")}
    assert alphas == {torch.tensor(alpha).item()}


def test_metadata_that_other_programs_read(trained, tmp_path):
    tensors = trained["sdxl"][0]
    kohya = save_kohya_lora(tensors, tmp_path / "k.safetensors", metadata_of("sdxl"))
    with safe_open(kohya, "pt") as file:
        strings, names = file.metadata(), list(file.keys())
    assert strings["ss_network_module"] == "networks.lora"
    assert (strings["ss_network_dim"], strings["ss_network_alpha"]) == ("4", "6.5")
    assert strings["ss_base_model_version"] == "sdxl_base_v1-0"
    assert strings["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "lora_adapter_metadata" not in strings  # diffusers refuses it beside alpha tensors
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in names
    assert "lora_unet_down_blocks_0_resnets_0_time_emb_proj.alpha" in names
    plain = save_diffusers_lora(tensors, tmp_path / "d.safetensors", metadata_of("sdxl"))
    with safe_open(plain, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 6.5)
    assert len(config["unet.target_modules"]) == len(tensors) / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_without_our_metadata_is_right_at_alpha_equal_to_rank(layout, trained, tmp_path):
    tensors = trained["sd"][0]
    path = LAYOUTS[layout](tensors, tmp_path / "ours.safetensors", metadata_of("sd"))
    with safe_open(path, "pt") as file:
        strings = {k: v for k, v in file.metadata().items() if not k.startswith("hypersd_ray.")}
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(path), foreign, metadata=strings)
    read, metadata = read_lora(foreign)
    assert metadata is None
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor * (ALPHA / RANK if "lora_B" in name else 1))


def test_merging_is_playing_and_the_folder_loads(folders, trained, tmp_path):
    for family in PIPELINES:
        tensors, expected, _ = trained[family]
        unet = load_unet(read_base(folders[family]), torch.float32, "cpu")
        merge_lora(unet, tensors, ALPHA)
        folder = save_unet(unet, tmp_path / family / "unet")
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
        again = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
        with torch.no_grad():
            torch.testing.assert_close(call(again, *random_inputs(family)), expected, rtol=1e-5, atol=1e-5)
    half = save_unet(unet, tmp_path / "half", dtype=torch.float16)
    assert {v.dtype for v in load_file(half / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert next(unet.parameters()).dtype == torch.float32


def test_merging_into_another_base_is_refused(trained):
    with pytest.raises(ValueError, match="same base model"):
        merge_lora(tiny_unet("sd"), trained["sdxl"][0], ALPHA)
    wrapped = tiny_unet("sd")
    Adapters(wrapped, RANK, ALPHA)
    with pytest.raises(AssertionError, match="merge"):
        save_unet(wrapped, "never-written")


@pytest.mark.parametrize(
    ("family", "scheduler", "steps", "eta"),
    [("sd", "TCDScheduler", 4, 0.3), ("sd", "DDIMScheduler", 2, 0.0), ("sdxl", "TCDScheduler", 1, 1.0)],
)
def test_usage_runs_as_printed(family, scheduler, steps, eta, folders, trained, tmp_path):
    metadata = metadata_of(family, steps=(steps,), scheduler=scheduler, eta=eta)
    path = save_diffusers_lora(trained[family][0], tmp_path / "lora.safetensors", metadata)
    text = usage(path, metadata, folders[family])
    assert usage(path, metadata) == text.replace(repr(str(folders[family])), "'base'")
    assert len(text.splitlines()) == 4  # an import and three lines
    names = {}
    exec(text, names)
    pipe, times = names["pipe"], names["pipe"].scheduler.timesteps.tolist()
    assert names["image"].size == ((128, 128) if family == "sd" else (64, 64))
    assert len(loaded_tensors(pipe)) == len(trained[family][0])
    assert type(pipe.scheduler).__name__ == scheduler
    assert not pipe.scheduler.config.clip_sample
    assert times == [t - 1 for t in reversed(edges(1000, steps)) if t > 0]


def test_our_grid_puts_both_schedulers_on_the_training_edges():
    # 4 steps: t = 1000, 750, 500, 250, network input 999, 749, 499, 249; TCD's own default ends at 259
    for steps in (1, 2, 4, 5, 8):
        wanted = [t - 1 for t in reversed(edges(1000, steps)) if t > 0]
        tcd = TCDScheduler(original_inference_steps=TCD_GRID)
        ddim = DDIMScheduler(timestep_spacing="trailing")
        for scheduler in (tcd, ddim):
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == wanted, (type(scheduler), steps)
    default = TCDScheduler()
    default.set_timesteps(4)
    assert default.timesteps.tolist() == [999, 759, 499, 259]


def test_metadata_strings_round_trip():
    for metadata in (metadata_of("sd"), metadata_of("sdxl", steps=(1,), recipe="", extra={}, alpha=1 / 3)):
        strings = metadata.to_strings()
        assert all(isinstance(v, str) for v in strings.values())
        assert LoRAMetadata.from_strings(strings | {"format": "pt", "other": "x"}) == metadata
    assert LoRAMetadata.from_strings({"format": "pt"}) is None
    broken = metadata_of("sd").to_strings()
    del broken["hypersd_ray.rank"]
    with pytest.raises(ValueError, match=r"lacks hypersd_ray\.rank"):
        LoRAMetadata.from_strings(broken)
    with pytest.raises(ValueError, match="family"):
        LoRAMetadata.from_strings(metadata_of("sd").to_strings() | {"hypersd_ray.family": "flux"})


def test_kohya_names_lead_back_or_are_refused(trained, tmp_path):
    assert module_of("down_blocks_0_downsamplers_0_conv") == "down_blocks.0.downsamplers.0.conv"
    assert module_of("mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj") == (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    )
    assert module_of("input_blocks_1_0_in_layers_2") is None
    odd = {"odd_block.to_q.lora_A.weight": torch.zeros(4, 8), "odd_block.to_q.lora_B.weight": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match="odd_block"):
        save_kohya_lora(odd, tmp_path / "odd.safetensors", metadata_of("sd"))


def test_what_cannot_be_saved(trained, tmp_path):
    tensors = trained["sd"][0]
    first = next(iter(tensors))
    for save in LAYOUTS.values():
        with pytest.raises(ValueError, match=r"\.safetensors"):
            save(tensors, tmp_path / "lora.bin", metadata_of("sd"))
        with pytest.raises(ValueError, match="rank 4, the metadata says 8"):
            save(tensors, tmp_path / "lora.safetensors", metadata_of("sd", rank=8))
        with pytest.raises(ValueError, match="no partner"):
            save({n: v for n, v in tensors.items() if n != first}, tmp_path / "lora.safetensors", metadata_of("sd"))
        with pytest.raises(ValueError, match="no tensors"):
            save({}, tmp_path / "lora.safetensors", metadata_of("sd"))
    assert not list(tmp_path.iterdir())


A, B = torch.zeros(4, 8), torch.zeros(8, 4)
UNREADABLE = {
    "unknown tensor foo": ({"foo": A}, {}),
    "unknown tensor text_encoder.q.lora_A.weight": ({"text_encoder.q.lora_A.weight": A}, {}),
    "unknown tensor lora_unet_input_blocks_1.alpha": ({"lora_unet_input_blocks_1.alpha": A}, {}),
    "has no partner": ({"unet.conv1.lora_A.weight": A}, {}),
    "do not multiply": ({"unet.conv1.lora_A.weight": A, "unet.conv1.lora_B.weight": A}, {}),
    "mixed ranks": (
        {
            "unet.conv1.lora_A.weight": A,
            "unet.conv1.lora_B.weight": B,
            "unet.conv2.lora_A.weight": A[:2],
            "unet.conv2.lora_B.weight": B[:, :2],
        },
        {},
    ),
    "alpha 6.5, its tensors say": (
        {
            "lora_unet_conv1.lora_down.weight": A,
            "lora_unet_conv1.lora_up.weight": B,
            "lora_unet_conv1.alpha": torch.tensor(1.0),
        },
        metadata_of("sd").to_strings(),
    ),
    "the metadata says 8": (
        {"unet.conv1.lora_A.weight": A, "unet.conv1.lora_B.weight": B},
        metadata_of("sd", rank=8).to_strings(),
    ),
    "use_dora": (
        {"unet.conv1.lora_A.weight": A, "unet.conv1.lora_B.weight": B},
        {"lora_adapter_metadata": '{"unet.use_dora": true}'},
    ),
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_what_cannot_be_read(reason, tmp_path):
    path = tmp_path / "bad.safetensors"
    tensors, strings = UNREADABLE[reason]
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=strings or None)
    with pytest.raises(ValueError, match=reason) as error:
        read_lora(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_safetensors(tmp_path):
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00." * 10)
    for name in ("pickle.safetensors", "missing.safetensors", "."):
        with pytest.raises(ValueError, match="not a safetensors file") as error:
            read_lora(tmp_path / name)
        assert "\n" not in str(error.value)
