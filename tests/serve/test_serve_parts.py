"""Settings, catalogue, request bodies, files, links, keys: the parts that need neither Ray nor a model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time

import click
import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from hypersd_ray.config.base import ConfigError
from hypersd_ray.embedded import paths
from serve import pictures
from serve.access import check_key, key_digests
from serve.api import MAX_SEED, GenerationRequest, fill_in, parse_body
from serve.app import build, read_settings
from serve.catalog import Catalog, LoRAInfo
from serve.discovery import read_catalog
from serve.errors import ApiError
from serve.links import Links
from serve.routes import models_of
from serve.safety import Guard
from serve.schema import request_schema
from serve.settings import IngressSettings, ModelSettings, SafetySettings, Settings
from tests.helpers.pictures import read_parameters
from tests.serve.loras import write_lora

CATALOG = Catalog(
    id="m", aliases=("dall-e-2",), base="x", family="sd", sizes=("64x64", "128x64"), default_lora="auto",
    loras=(LoRAInfo(name="k1", path="", k=1, eta=0.3), LoRAInfo(name="k4", path="", k=4), LoRAInfo(name="free", path="", keeps_guidance=True)),
    controlnets={"edges": "x", "depth": "x"}, created=0,
)  # fmt: skip
SETTINGS = Settings()
PNG = base64.b64encode(pictures.encode(np.full((8, 8, 3), 7, np.uint8), "png", 90, None)).decode()


def asked(settings: Settings = SETTINGS, catalog: Catalog = CATALOG, **fields):
    return fill_in(parse_body(json.dumps({"prompt": "a cat"} | fields).encode()), settings, catalog)


def refused(body: bytes | dict, settings: Settings = SETTINGS, catalog: Catalog = CATALOG) -> ApiError:
    if isinstance(body, dict):
        body = json.dumps({"prompt": "a cat"} | body).encode()
    with pytest.raises(ApiError) as caught:
        fill_in(parse_body(body), settings, catalog)
    assert 400 <= caught.value.status < 500
    assert caught.value.body.param in caught.value.body.message or caught.value.body.param == "body"
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": " \n"}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"), ({"n": "2"}, "n"), ({"n": 0}, "n"), ({"n": 1.5}, "n"), ({"n": True}, "n"),
        ({"n": 9}, "n"), ({"n": 10**30}, "n"), ({"size": "1024x1024"}, "size"), ({"size": 64}, "size"),
        ({"seed": -1}, "seed"), ({"seed": MAX_SEED + 1}, "seed"), ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"seed": float("nan")}, "seed"), ({"eta": float("nan")}, "eta"), ({"eta": float("inf")}, "eta"), ({"eta": 1.1}, "eta"),
        ({"num_inference_steps": 9}, "num_inference_steps"), ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"response_format": "gif"}, "response_format"), ({"output_format": "gif"}, "output_format"),
        ({"stream": "yes"}, "stream"), ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "partial_images": 8}, "partial_images"), ({"stream": True, "response_format": "url"}, "response_format"),
        ({"output_compression": 50}, "output_compression"), ({"style": "vivid"}, "style"), ({"quality": "hd"}, "quality"),
        ({"background": "transparent"}, "background"), ({"moderation": "low"}, "moderation"), ({"mask": "x"}, "mask"),
        ({"stepz": 4}, "stepz"), ({"model": "dall-e-9"}, "model"), ({"model": "m:nope"}, "model"), ({"lora": "nope"}, "lora"),
        ({"lora": 4}, "lora"), ({"lora": {"name": 4}}, "lora.name"), ({"lora": {"name": "k1", "scale": 9}}, "lora.scale"),
        ({"lora": {"name": "k1", "weight": 1}}, "lora.weight"), ({"lora": {"scale": 1}}, "lora.name"),
        ({"lora": "k1", "model": "m:k4"}, "lora"), ({"guidance_scale": 3, "lora": "k1"}, "guidance_scale"),
        ({"guidance_scale": 0.5, "lora": "free"}, "guidance_scale"), ({"guidance_scale": 99, "lora": "free"}, "guidance_scale"),
        ({"negative_prompt": "dog", "lora": "none"}, "negative_prompt"), ({"lora": {"name": "none", "scale": 0.5}}, "lora.scale"),
        ({"negative_prompt": "dog", "lora": "free", "guidance_scale": 1.0}, "negative_prompt"), ({"negative_prompt": "dog", "lora": "k1"}, "negative_prompt"),
        ({"control_image": "!!!", "control": "edges"}, "control_image"), ({"control_image": "QUJD", "control": "edges"}, "control_image"),
        ({"control_image": PNG}, "control"), ({"control_image": PNG, "control": "pose"}, "control"), ({"control_scale": 1.0}, "control_scale"),
        ({"control": "edges"}, "control"), ({"control_image": PNG[:56], "control": "edges"}, "control_image"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields, param):
    assert refused(fields).body.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000,
        b'{"prompt": ' * 50_000, b'{"prompt": "a"} trailing', b'{"n": ' + b"9" * 5000 + b"}", b"\x00",
    ],
)  # fmt: skip
def test_what_is_no_json_is_called_so(body):
    assert refused(body).body.param == "body"


def test_nothing_of_a_request_is_lost():
    work = asked(
        n=3, seed=7, size="128x64", num_inference_steps=2, eta=0.5, lora={"name": "free", "scale": 0.5},
        negative_prompt="dog", guidance_scale=3.0, control_image=f"data:image/png;base64,{PNG}", control="edges", control_scale=0.7,
    ).work()  # fmt: skip
    key = work.key
    assert (key.width, key.height, key.steps, key.eta) == (128, 64, 2, 0.5)
    assert (key.lora, key.lora_scale, key.guided, key.control) == ("free", 0.5, True, "edges")
    assert [shot.seed for shot in work.shots] == [7, 8, 9]
    shot = work.shots[0]
    assert (shot.prompt, shot.negative_prompt, shot.guidance, shot.control_scale) == ("a cat", "dog", 3.0, 0.7)
    assert shot.control.shape == (64, 128, 3)
    assert (shot.control == 7).all()


def test_defaults_and_neutral_values():
    plain = asked()
    assert (plain.n, plain.size, plain.key.steps, plain.key.lora, plain.output_format) == (1, "64x64", 4, "k4", "png")
    assert asked(seed=None, n=None, size="auto", quality="auto", background="opaque", user="u").size == "64x64"
    assert asked(model="dall-e-2").key == plain.key
    assert len({asked().seed for _ in range(20)}) > 10
    # made for that many steps, else for the nearest count by ratio, of two the larger; its own eta
    assert [asked(num_inference_steps=n).key.lora for n in (1, 2, 3, 4, 5, 8)] == ["k1", "k4", "k4", "k4", "k4", "k4"]
    assert asked(num_inference_steps=1).key.eta == 0.3
    assert asked(lora={"name": "none", "scale": 1.0}).key.lora == "none"
    assert asked(model="m:free").key.lora == "free"
    assert asked(lora="none", guidance_scale=5.0).key.guided


@pytest.mark.parametrize(("steps", "count", "shown"), [(8, 3, [2, 4, 6]), (8, 7, [1, 2, 3, 4, 5, 6, 7]), (4, 7, [1, 2, 3]), (1, 3, []), (2, 1, [1]), (8, 0, [])])  # fmt: skip
def test_previews_are_spread_over_the_steps(steps, count, shown):
    assert asked(stream=True, partial_images=count, num_inference_steps=steps).show_after() == shown


def test_every_field_is_described():
    schema = request_schema(Settings(), CATALOG)
    assert set(schema["properties"]) == set(GenerationRequest.model_fields)
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["properties"]["n"]["anyOf"][0]["maximum"] == Settings().limits.images


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_knows_how_it_was_made(kind):
    parameters = {"prompt": "ein Käse 🧀\0", "seed": 3, "num_inference_steps": 4, "lora": {"name": "k4", "scale": 1.0}}
    data = pictures.encode(np.zeros((8, 8, 3), np.uint8), kind, 90, parameters)
    assert read_parameters(data) == parameters
    image = Image.open(io.BytesIO(data))
    assert image.format == kind.upper()
    if kind == "png":
        assert "Steps: 4, Seed: 3" in image.text["parameters"]
        assert "ein Käse 🧀" in image.text["parameters"]


def test_links_cannot_be_guessed_and_end(tmp_path):
    links = Links(str(tmp_path / "a"), seconds=100, max_bytes=2500)
    names = [links.put(bytes(1000), "png") for _ in range(2)]
    assert links.get(names[0]) == bytes(1000)
    assert len(names[0]) == 36
    for bad in ("../a", "x.png", names[0][:-4], "%2e%2e", f"{'a' * 32}.exe"):
        assert links.get(bad) is None
    os.utime(tmp_path / "a" / names[0], (time.time() - 5, time.time() - 5))
    third = links.put(bytes(1000), "webp")
    assert [links.get(n) is None for n in (*names, third)] == [True, False, False], "the oldest makes room"
    os.utime(tmp_path / "a" / third, (0, 0))
    assert links.get(third) is None
    links.sweep()
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_the_folder_of_links_is_not_walked_for_every_image(tmp_path, monkeypatch):
    links, walks, real = Links(str(tmp_path), seconds=100, max_bytes=100_000), [], Links.sweep
    foreign = tmp_path / "thesis.png"
    foreign.write_bytes(bytes(200_000))
    os.utime(foreign, (0, 0))
    monkeypatch.setattr(Links, "sweep", lambda self: (walks.append(None), real(self)))
    for _ in range(500):
        links.put(bytes(1000), "png")
        held = sum(path.stat().st_size for path in tmp_path.iterdir() if path != foreign)
        assert held <= 100_000
    assert len(walks) < 60, "the folder is full from the hundredth image on"
    assert foreign.exists()


def test_a_lora_is_sampled_as_its_file_says(lora_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(paths.TEACHER / "unet", local_files_only=True)
    for name, scheduler in (("d", "DDIMScheduler"), ("l", "LCMScheduler")):
        write_lora(tmp_path, name, unet, k=4, seed=1, scheduler=scheduler)
    settings = read_settings({"model.loras": [str(tmp_path)]})
    catalog = read_catalog(settings.model)
    assert [catalog.sampler(name) for name in ("d", "l", "none")] == ["DDIMScheduler", "LCMScheduler", "TCDScheduler"]
    assert {model.lora: model.scheduler for model in models_of(settings, catalog)}["d"] == "DDIMScheduler"
    assert asked(settings, catalog, lora="d", eta=0.4).key.eta == 0.4
    assert asked(settings, catalog, lora="l").key.steps == 4
    assert refused({"lora": "l", "eta": 0.4}, settings, catalog).body.param == "eta"
    write_lora(tmp_path, "e", unet, k=4, seed=1, scheduler="EulerDiscreteScheduler")
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler"):
        read_catalog(settings.model)


def test_keys(monkeypatch):
    settings = IngressSettings(require_api_key=True)
    monkeypatch.delenv("HYPERSD_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="HYPERSD_API_KEY is empty"):
        key_digests(settings)
    monkeypatch.setenv("HYPERSD_API_KEY", "one, two")
    digests = key_digests(settings)
    assert all(b"one" not in digest for digest in digests)
    for good in ("Bearer one", "bearer two"):
        check_key(good, digests)
    for bad in (None, "", "one", "Bearer three", "Basic one", "Bearer "):
        with pytest.raises(ApiError) as caught:
            check_key(bad, digests)
        assert caught.value.status == 401
    check_key(None, ())


def test_blocked_words_are_whole_words():
    guard = Guard(SafetySettings(blocked_words=("gore", "a.b")), None)
    for fine in ("regore", "a forest", "axb", "goreng"):
        asyncio.run(guard.check_prompt(fine))
    for wrong in ("GORE", "some gore, please", "a.b"):
        with pytest.raises(ApiError) as caught:
            asyncio.run(guard.check_prompt(wrong))
        assert caught.value.body.code == "content_policy_violation"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model.nope": 1}, "model.nope"), ({"denoiser.max_batch": "0"}, "denoiser.max_batch"), ({"nope": 1}, "nope"),
        ({"model.base": "/nowhere"}, "/nowhere"), ({"model.loras": ["/nowhere.safetensors"]}, "/nowhere.safetensors"),
        ({"model.sizes": ["33x32"], "model.loras": []}, "multiples of 8"), ({"model.sizes": ["big"]}, "WIDTHxHEIGHT"),
        ({"model.default_lora": "zz", "model.loras": []}, "zz"), ({"denoiser.min_replicas": 0}, "denoiser.max_replicas"),
        ({"denoiser.min_replicas": 3, "denoiser.max_replicas": 2}, "min_replicas=3"), ({"model.default_steps": 8, "limits.steps": 4}, "limits.steps=4"),
        ({"model.guidance": 20}, "limits.guidance=15"),
        ({"model.controlnets": {"a": "/nowhere"}}, "/nowhere"), ({"ingress.require_api_key": True}, "HYPERSD_API_KEY"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(args, words, monkeypatch):
    monkeypatch.delenv("HYPERSD_API_KEY", raising=False)
    with pytest.raises(click.ClickException) as caught:
        build(args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_from_the_command_line(lora_folder):
    settings = read_settings({"model.loras": f"[{lora_folder}]", "denoiser.max_batch": "16", "ingress.page": "false"})
    assert (settings.denoiser.max_batch, settings.denoiser.max_ongoing, settings.ingress.page) == (16, 32, False)
    catalog = read_catalog(settings.model)
    assert catalog.lora_names == ("cfg", "k1", "k8")
    assert [lora.keeps_guidance for lora in catalog.loras] == [True, False, False]
    assert (catalog.choose(8), catalog.choose(4), catalog.choose(2)) == ("k8", "k8", "k1")
    assert {catalog.choose(n, guided=True) for n in (1, 4, 8)} == {"cfg"}


def test_a_folder_without_loras_is_served_bare(tmp_path):
    catalog = read_catalog(ModelSettings(loras=(str(tmp_path),)))
    assert catalog.choose(4) == "none"
    assert asked(catalog=catalog, guidance_scale=3.0).key.lora == "none"


def test_a_lora_for_named_timesteps_is_sampled_in_those_alone():
    tied = LoRAInfo(name="a800", path="", k=1, steps=(1,), timesteps=(800,))
    catalog = CATALOG.model_copy(update={"loras": (tied, *CATALOG.loras)})
    assert asked(catalog=catalog, lora="a800", num_inference_steps=1).key.lora == "a800"
    error = refused({"lora": "a800", "num_inference_steps": 2}, catalog=catalog)
    assert error.body.param == "num_inference_steps" and "for 1 alone, at timesteps 800" in error.body.message
    assert [catalog.choose(n) for n in (1, 2, 4)] == ["a800", "k4", "k4"]
    only = catalog.model_copy(update={"loras": (tied,)})
    assert (only.choose(1), only.choose(2)) == ("a800", "none")
    by_name = {model.lora: model.only_steps for model in models_of(SETTINGS, catalog)}
    assert by_name["a800"] == 1 and by_name["k4"] is None


def test_guidance_goes_to_a_lora_that_keeps_it():
    assert asked(num_inference_steps=4).key.lora == "k4"
    chosen = asked(num_inference_steps=4, guidance_scale=2.0, negative_prompt="a dog")
    assert chosen.key.lora == "free" and chosen.key.guided
    assert models_of(SETTINGS, CATALOG)[0].keeps_guidance
    # left out, guidance is on where the LoRA was made for it, and nowhere else
    assert (asked(lora="free").guidance, asked(lora="free").key.guided) == (3.0, True)
    assert asked(lora="free", negative_prompt="a dog").negative_prompt == "a dog"
    assert not asked(lora="free", guidance_scale=1.0).key.guided
    mild = read_settings({"model.guidance": 1.5})
    assert [asked(mild, lora=name).guidance for name in ("free", "k4", "none")] == [1.5, 1.0, 1.0]
    told = {model.lora: model.default_guidance for model in models_of(mild, CATALOG)}
    assert told == {None: 1.0, "k1": 1.0, "k4": 1.0, "free": 1.5, "none": 1.0}
    without = CATALOG.model_copy(update={"loras": CATALOG.loras[:2]})
    assert refused({"guidance_scale": 2.0}, catalog=without).body.param == "guidance_scale"
    assert not models_of(SETTINGS, without)[0].keeps_guidance
