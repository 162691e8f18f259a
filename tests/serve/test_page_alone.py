"""The page where things are not as they should be, before an application without a cluster; and the code it writes."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from hypersd_ray.trainer.local import free_port
from serve.access import digest
from serve.settings import Settings
from tests.serve.conftest import ROOT
from tests.serve.test_serve_faults import serve_one

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
@pytest.mark.parametrize("prompt", ['a:"1",{"x":-2}', 'it\'s \\n "two"\nlines é 🍕 $(x) `y`', "[:1,2]:{3}"])
def test_the_code_has_the_prompt_as_it_is(prompt, tmp_path):
    asked = {
        "prompt": prompt,
        "seed": 7,
        "lora": "k4",
        "scale": 0.5,
        "eta": 0,
        "guidance": 2,
        "negative": prompt,
        "size": "a",
    }
    script = f"""
        import {{ asCurl, asPython, bodyOf }} from "{(ROOT / "serve/page/code.js").as_uri()}";
        const body = bodyOf({json.dumps(asked)}, 4, ["a"]);
        console.log(JSON.stringify([body, asPython(body, "http://x", true), asCurl(body, "http://127.0.0.1:1", false)]));
    """
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    body, python, curl = json.loads(done.stdout)
    assert (body["eta"], body["guidance_scale"], body["lora"]) == (0, 2, {"name": "k4", "scale": 0.5})
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    given = {
        word.arg: ast.literal_eval(word.value)
        for call in calls
        for word in call.keywords
        if word.arg in ("prompt", "extra_body")
    }
    assert {"prompt": given["prompt"], **given["extra_body"]} == body
    tried = subprocess.run(
        ["sh", "-c", curl.replace("curl -sS", "printf '%s\\n'")], cwd=tmp_path, capture_output=True, text=True
    )
    assert json.dumps(body, separators=(",", ":"), ensure_ascii=False) in tried.stdout


@pytest.fixture(scope="module")
def locked():
    """The address of an application that wants the key `right`."""
    port = free_port()
    app = serve_one(
        keys=(digest("right"),), ingress={"page": True}, model={"guidance": 2.0}, limits={"lora_scale": 1.2}
    ).app
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(locked):
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page, wrong = chromium.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(locked)
        yield page
        chromium.close()
        assert wrong == []


def test_a_page_without_a_key_asks_for_it_and_goes_on(page):
    expect(page.locator("#message")).to_contain_text("API key is needed")
    page.fill("#prompt", "fine")
    page.click("#draw")
    expect(page.locator("#message")).to_contain_text("API key is needed")
    expect(page.locator("#draw")).to_have_text("Draw")
    page.fill("#key", "right")
    page.click("#draw")
    page.wait_for_selector(".card[data-steps='8'] .download:not([hidden])")
    assert page.locator("#message").is_hidden()
    assert page.get_attribute("#scale", "max") == "1.2"
    assert page.get_attribute("#guidance", "max") == str(int(Settings().limits.guidance))
    # what is being drawn makes way for what is asked for
    page.fill("#prompt", "slow")
    page.click("#draw")
    expect(page.locator("#draw")).to_have_text("Stop")
    page.locator("#history button").first.click()
    page.wait_for_selector(".card[data-steps='8'] .download:not([hidden])", timeout=4000)
    assert page.input_value("#prompt") == "fine" and page.locator("#history button").count() == 1
    # a drawing that cannot be made again is not made
    page.evaluate(
        """() => {
            const all = JSON.parse(localStorage.getItem('hypersd.history'));
            localStorage.setItem('hypersd.history', JSON.stringify([{...all[0], lora: 'old'}, {...all[0], size: '1x1'}, ...all]));
        }"""
    )
    page.reload()
    page.fill("#key", "right")
    page.locator("#key").blur()
    for i, word in enumerate(["the LoRA old", "the size 1x1"]):
        page.locator("#history button").nth(i).click()
        expect(page.locator("#message")).to_contain_text(word)
        expect(page.locator("#draw")).to_have_text("Draw")
