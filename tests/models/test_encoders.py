"""Prompts and pixels: what our encoders give is what diffusers' pipelines use themselves."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from hypersd_ray.embedded.text import MAX_TOKENS
from hypersd_ray.models.encoders import load_encoders
from tests.helpers.pipelines import POOLED

PROMPTS = ["a red apple on a pink background", "a panda", "", "a bicycle " * 40]  # the last is cut


def test_sd_prompts_are_the_pipelines(sd_folder):
    encoders = load_encoders(sd_folder)
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder, local_files_only=True)
    expected, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    ours = encoders.encode_prompts(PROMPTS)
    assert not encoders.is_sdxl
    assert torch.equal(ours.prompt_embeds, expected)
    assert ours.pooled is None
    null = encoders.null_conditioning()
    assert null.prompt_embeds.shape == (1, MAX_TOKENS, 32)
    torch.testing.assert_close(null.prompt_embeds, negative[:1])
    assert null.prompt_embeds.abs().max() > 0


def test_sdxl_prompts_are_the_pipelines(sdxl_folder):
    encoders = load_encoders(sdxl_folder)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    assert [tok.pad_token for tok in encoders.tokenizers] == ["<|endoftext|>", "!"]
    expected, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    ours = encoders.encode_prompts(PROMPTS)
    assert encoders.is_sdxl
    assert ours.prompt_embeds.shape == (4, MAX_TOKENS, 80)
    assert ours.pooled.shape == (4, POOLED)
    assert torch.equal(ours.prompt_embeds, expected)
    assert torch.equal(ours.pooled, pooled)
    null = encoders.null_conditioning()
    assert torch.equal(null.prompt_embeds, negative[:1])
    assert torch.equal(null.pooled, negative_pooled[:1])
    assert null.prompt_embeds.abs().max() == null.pooled.abs().max() == 0  # force_zeros_for_empty_prompt
    assert null.time_ids is None


def test_a_base_that_was_not_trained_on_zeros(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "pipe")
    index = folder / "model_index.json"
    index.write_text(
        index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
    )
    encoders = load_encoders(folder, vae=False)
    null, empty = encoders.null_conditioning(), encoders.encode_prompts([""])
    assert torch.equal(null.prompt_embeds, empty.prompt_embeds)
    assert torch.equal(null.pooled, empty.pooled)
    assert encoders.vae is None


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_latents_and_pixels_are_the_pipelines(family, folders):
    encoders = load_encoders(folders[family], dtype=torch.bfloat16)
    pipe_class = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    pipe = pipe_class.from_pretrained(folders[family], local_files_only=True)
    scale = pipe.vae.config.scaling_factor
    assert scale == (0.18215 if family == "sd" else 0.13025)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        processed = pipe.image_processor.preprocess(pixels.float() / 255)
        expected = pipe.vae.encode(processed).latent_dist.mode() * scale
        decoded = pipe.vae.decode(expected / scale).sample
    latents = encoders.encode_images(pixels)
    assert latents.dtype == torch.float32  # whatever the text encoders' dtype is
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(encoders.encode_images(pixels), latents)
    images = encoders.decode(latents)
    assert images.dtype == torch.uint8
    theirs = (
        torch.from_numpy(pipe.image_processor.postprocess(decoded, output_type="np") * 255).round().permute(0, 3, 1, 2)
    )
    assert (images.float() - theirs).abs().max() <= 1  # a rounding apart at most
    assert encoders.encode_prompts(["a"]).prompt_embeds.dtype == torch.bfloat16


def test_sd15s_own_file_layout_loads(sd_folder, tmp_path):
    # the released text encoder's names start with text_model. and it carries position_ids
    folder = shutil.copytree(sd_folder, tmp_path / "pipe")
    path = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(MAX_TOKENS)[None]
    save_file(state, path, metadata={"format": "pt"})
    ours, theirs = load_encoders(folder, vae=False), load_encoders(sd_folder, vae=False)
    assert torch.equal(ours.encode_prompts(PROMPTS).prompt_embeds, theirs.encode_prompts(PROMPTS).prompt_embeds)


def drop_tensor(folder):
    path = folder / "text_encoder_2" / "model.safetensors"
    state = load_file(path)
    del state["text_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})


BREAKS = {
    "tokenizer_2 holds no tokenizer.json": lambda folder: shutil.rmtree(folder / "tokenizer_2"),
    "tokenizer holds no tokenizer.json": lambda folder: [p.unlink() for p in (folder / "tokenizer").iterdir()],
    "text_encoder/config.json does not exist": lambda folder: shutil.rmtree(folder / "text_encoder"),
    "vae/config.json does not exist": lambda folder: shutil.rmtree(folder / "vae"),
    "text_encoder cannot be loaded": lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(),
    r"lack 1 tensors its config asks for \(first text_projection.weight\)": drop_tensor,
}


@pytest.mark.parametrize("reason", BREAKS)
def test_what_is_missing_is_one_line(reason, sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "pipe")
    BREAKS[reason](folder)
    with pytest.raises(ValueError, match=reason) as error:
        load_encoders(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
