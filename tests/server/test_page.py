"""Our page in a headless browser: a picture dropped in, the answer read, the kept patches seen; and its script in Node.

The former needs playwright (the package alone: it drives a Chromium that is installed, as `chromium` or in
$ST3_CHROMIUM).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import ROOT, Server, Start, data_url

CHROMIUM = os.environ.get("ST3_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DROP = """
(url) => {
  const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "picture.png", { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
}
"""
# Of each patch, 24 × 24: whether its middle is far darker than the picture is there, as of one that is not read.
DARK = """
() => {
  const view = document.querySelector("#view canvas"), context = view.getContext("2d"), n = 24, dark = [];
  const plain = document.createElement("canvas");
  plain.width = view.width; plain.height = view.height;
  plain.getContext("2d").drawImage(document.getElementById("picture"), 0, 0, view.width, view.height);
  const sum = (c, i) => {
    const s = view.width / n, p = c.getImageData((i % n + 0.5) * s, (Math.floor(i / n) + 0.5) * s, 1, 1).data;
    return p[0] + p[1] + p[2];
  };
  for (let i = 0; i < n * n; i++) dark.push(sum(context, i) < 0.5 * sum(plain.getContext("2d"), i));
  return dark;
}
"""


def test_the_pages_script_in_node():
    # broken if a second question could be asked during an answer, the picture of another were drawn, tiles were drawn
    # as one or over the picture, or a reason for which nothing is pruned were not said
    node = shutil.which("node")
    if not node:
        pytest.skip("no Node.js")
    script = ROOT / "native" / "server" / "page" / "st3.js"
    words = [node, Path(__file__).with_name("page.js"), script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium: install one, or name it with ST3_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def test_a_dropped_picture_is_answered_and_its_patches_are_drawn(server: Server, scenes, browser):
    # broken if the page's script, its policy or the report were
    page = browser.new_page(bypass_csp=False)
    complaints = []
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    elsewhere = []
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else elsewhere.append(r.url))
    page.goto(f"{server.url}/st3")
    page.evaluate(DROP, data_url(scenes[0].picture))
    page.fill("#question", scenes[0].questions[0][0])
    page.wait_for_selector("#ask:enabled")
    page.click("#ask")
    page.wait_for_selector("#kept:not([hidden])", timeout=60_000)
    assert page.inner_text("#answer").strip() == scenes[0].questions[0][1]
    assert "576 visual tokens" in page.inner_text("#summary")

    st3 = page.evaluate("st3")
    last = len(st3["per_layer"]) - 1
    for layer in (0, st3["cuts"][0] + 1, last):
        page.evaluate(
            "(n) => { const s = document.getElementById('layer'); s.value = n; s.dispatchEvent(new Event('input')); }",
            layer,
        )
        dark = page.evaluate(DARK)
        assert dark == [n <= layer for n in st3["layers"][0]]
        assert f"reads {st3['per_layer'][layer]} of 576" in page.inner_text("#at")
    assert len(page.query_selector_all("#steps figure")) == len(st3["cuts"]) + 1
    assert not complaints
    assert not elsewhere
    page.close()


def test_an_error_is_shown(start_server: Start, scenes, browser):
    # broken if a person waited for ever
    guarded = start_server("--api-key", "sesame", "-np", "1")
    page = browser.new_page()
    page.goto(f"{guarded.url}/st3")
    page.set_input_files("#file", str(scenes[0].picture))
    page.wait_for_selector("#ask:enabled")
    page.click("#ask")
    page.wait_for_selector("#note:has-text('API Key')")  # a function would be eval, which the page's policy forbids
    page.fill("#key", "sesame")
    page.click("#ask")
    page.wait_for_selector("#kept:not([hidden])", timeout=60_000)
    page.close()


def test_llama_cpps_page_loads(server: Server, browser):
    # broken if the build had none though npm was there, or it could not talk to the server
    page = browser.new_page()
    response = page.goto(f"{server.url}/")
    if page.url.endswith("/st3"):
        pytest.skip("this build has our page alone (no npm)")
    assert response.status == 200
    page.wait_for_selector("textarea", timeout=60_000)
    page.close()
