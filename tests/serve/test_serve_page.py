"""The page in headless Chromium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.pictures import read_parameters

pytestmark = pytest.mark.cluster
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
DONE = ".card[data-steps='8'] .download:not([hidden])"


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """A page that fails the test on a script's error, or a request to anybody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # an answer of 400 is told to the user; Chromium writes it to its console beside
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "status of 400" not in m.text else None)
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    page.goto(server.url)
    page.wait_for_selector(".health.ok")
    expect(page.locator("#examples button").nth(3)).to_be_attached()
    yield page
    context.close()
    assert wrong == []


def draw(page, seed: int, prompt: str = "a noto pizza") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click("#draw")
    page.wait_for_selector(DONE, timeout=60_000)
    expect(page.locator("#draw")).to_have_text("Draw", timeout=60_000)


def images(page) -> list[str]:
    return page.eval_on_selector_all(".card img", "all => all.map(one => one.src)")


def test_four_step_counts_of_one_seed_side_by_side(page):
    page.evaluate(
        """() => {
            window.previews = [];
            new MutationObserver(() => window.previews.push(document.querySelectorAll('img.preview').length))
                .observe(document.querySelector('#results'), {subtree: true, attributes: true});
        }"""
    )
    draw(page, 7)
    files = [base64.b64decode(src.partition(",")[2]) for src in images(page)]
    made = [read_parameters(file) for file in files]
    assert [(one["num_inference_steps"], one["seed"]) for one in made] == [(n, 7) for n in (1, 2, 4, 8)]
    assert len(set(files)) == 4
    times = page.eval_on_selector_all(".times", "all => all.map(one => one.textContent)")
    assert all(re.match(r"[\d.]+ m?s model[\d.]+ m?s in all", text) for text in times)
    assert max(page.evaluate("window.previews")) >= 1, "no preview was shown on the way"
    assert (
        page.locator(".card").evaluate_all("all => new Set(all.map(one => one.getBoundingClientRect().top)).size") == 1
    )
    with page.expect_download() as download:
        page.click(".card[data-steps='4'] .download")
    assert download.value.suggested_filename == "a-noto-pizza-7-4.png"
    assert read_parameters(download.value.path().read_bytes())["prompt"] == "a noto pizza"


def test_seeds_loras_and_history(page):
    draw(page, 7)
    first = images(page)
    page.select_option("#lora", "k8")
    page.fill("#seed", "8")
    draw(page, 8)
    assert images(page) != first
    assert read_parameters(base64.b64decode(images(page)[0].partition(",")[2]))["lora"]["name"] == "k8"
    entries = page.locator("#history button")
    assert entries.count() == 2
    assert "seed 8, k8" in entries.nth(0).inner_text()
    entries.nth(1).click()
    expect(page.locator("#draw")).to_have_text("Stop", timeout=60_000)
    expect(page.locator("#draw")).to_have_text("Draw", timeout=60_000)
    assert images(page) == first, "a drawing of the history comes back as it was"
    assert page.input_value("#seed") == "7"
    # another draw takes another seed, unless it is to be kept
    page.check("#keep-seed")
    page.click("#draw")
    expect(page.locator("#draw")).to_have_text("Draw", timeout=60_000)
    assert page.input_value("#seed") == "7"
    page.uncheck("#keep-seed")
    page.click("#draw")
    expect(page.locator("#draw")).to_have_text("Draw", timeout=60_000)
    assert page.input_value("#seed") != "7"
    page.reload()
    page.wait_for_selector("#history button")
    page.click("#clear")
    assert page.locator("#history-section").is_hidden()


def test_guidance_shows_where_it_can_be_used(page):
    page.click("summary")
    assert page.locator("#negative").is_visible(), "the automatic choice takes the one that keeps guidance"
    page.select_option("#lora", "k8")
    assert page.locator("#negative").is_hidden()
    page.select_option("#lora", "cfg")
    assert page.locator("#negative").is_visible()
    page.locator("#guidance").fill("3")
    page.fill("#negative", "blue")
    draw(page, 1)
    made = read_parameters(base64.b64decode(images(page)[2].partition(",")[2]))
    assert (made["guidance_scale"], made["negative_prompt"]) == (3, "blue")


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_code_that_is_copied_makes_the_same_image(page, tmp_path, language):
    prompt = """it's a "noto" pizza é 🍕"""
    draw(page, 12, prompt)
    page.check(f"input[value={language}]")
    page.select_option("#code-steps", "2")
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied", timeout=60_000)
    code = page.evaluate("navigator.clipboard.readText()")
    command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    file = (tmp_path / "image.png").read_bytes()
    assert file == base64.b64decode(images(page)[1].partition(",")[2])
    assert read_parameters(file)["prompt"] == prompt


def test_by_keyboard_alone(page):
    page.keyboard.press("/")
    page.keyboard.press("Control+a")
    page.keyboard.type("a noto cactus")
    page.keyboard.press("Enter")
    expect(page.locator("#draw")).to_have_text("Stop", timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#draw")).to_have_text("Draw", timeout=60_000)
    assert page.locator("#message").is_hidden(), "stopping is no error"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"prompt", "draw", "seed", "dice", "keep-seed", "lora", "SUMMARY", "copy", "theme"} <= set(reached)


def test_errors_are_told(page):
    page.fill("#prompt", "cat " * 40)
    page.click("#draw")
    page.wait_for_selector("#message:not([hidden])")
    assert "the text encoder reads 22" in page.inner_text("#message")
    assert page.inner_text("#draw") == "Draw"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 640), (768, 1024), (1600, 1000)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(page, width, height, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.locator(".card").evaluate_all(
        "all => new Set(all.map(one => one.getBoundingClientRect().left)).size"
    )
    assert columns == (2 if width <= 760 else 4)
    contrasts = page.evaluate(CONTRAST)
    assert contrasts and min(contrasts.values()) >= 4.5, contrasts


CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = (colour) => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'white';
    };
    const found = {};
    for (const element of document.querySelectorAll('h1, h2, h3, label, button, summary, a, textarea, select, code, #health')) {
        if (!element.offsetParent) continue;
        const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
        found[element.id || element.tagName + element.className] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }
    return found;
}"""


def test_the_description_can_be_read(page, server):
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("article")
    text = page.inner_text("main")
    for word in ("/v1/images/generations", "num_inference_steps", "negative_prompt", "1 to 8", "429"):
        assert word in text
    assert json.loads(page.evaluate("fetch('/openapi.json').then(a => a.text())"))["openapi"].startswith("3.")
