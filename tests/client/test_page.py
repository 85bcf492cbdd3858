"""The page in a real browser, in front of what `make gateway` starts.

Needs Debian's chromium (`apt-get install chromium`); without it these tests are skipped. With SCREENSHOT=1 the picture
in docs/ is made again.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from a1111_client.gateway.guard import parse_access
from sandbox.draw import encode, picture
from tests.client import scripted
from tests.client.started import Started
from tests.support import DATA, ROOT

CHROMIUM = shutil.which("chromium")
PATIENCE = 20_000  # milliseconds for what the page is expected to show
SCREENSHOT = ROOT / "docs" / "page.png"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")

# Playwright can neither drop nor paste a file: these are the events that a browser sends then.
GIVE = """([kinds, selector, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "photo.png", { type: "image/png" }));
    const more = { dataTransfer: transfer, clipboardData: transfer, bubbles: true, cancelable: true };
    for (const kind of kinds)
        document.querySelector(selector).dispatchEvent(
            kind === "paste" ? new ClipboardEvent(kind, more) : new DragEvent(kind, more));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


class Desk:
    """The page, what it asked for and what the browser complained about."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        expect(page.get_by_label("Sampler")).to_have_value("DPM++ 2M", timeout=PATIENCE)

    def fill(self, **fields: object) -> None:
        """A small picture, and these fields by their labels."""
        for label, value in {"Width": 64, "Height": 64, "Steps": 2, **fields}.items():
            self.page.get_by_label(label, exact=True).fill(str(value))

    def draw(self, prompt: str, **fields: object) -> None:
        self.fill(Prompt=prompt, **fields)
        self.page.get_by_role("button", name="Draw", exact=True).click()

    def picture_of(self, prompt: str) -> Any:
        """The picture in the gallery."""
        return self.page.locator("#gallery").get_by_role("img", name=prompt)

    def card_of(self, prompt: str) -> Any:
        return self.page.locator("#gallery > li").filter(has=self.page.get_by_role("img", name=prompt))

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The inputs of the jobs that were sent."""
        sent = [request for request in self.requests if request.method == "POST" and request.url.endswith("/jobs")]
        return [json.loads(request.post_data or "")["input"] for request in sent]

    def drop(self, selector: str, data: bytes) -> None:
        self.page.evaluate(GIVE, [["dragover", "drop"], selector, base64.b64encode(data).decode()])

    def paste(self, data: bytes) -> None:
        self.page.evaluate(GIVE, [["paste"], "#prompt", base64.b64encode(data).decode()])


@pytest.fixture
def desk(started: Started, browser: Browser) -> Iterator[Desk]:
    """A page of a test's own. In the end it has asked nobody else, and the browser has not complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=started.url)
    made = Desk(context.new_page(), started.url)
    yield made
    hosts = {request.url.split("/")[2] for request in made.requests if request.url.startswith(("http", "ws"))}
    assert hosts == {started.url.split("/")[2]}
    assert made.complaints == []
    context.close()


def drawn(text: str) -> bytes:
    return encode(picture(text, 64, 64), text, "png")


def test_a_picture_is_drawn_and_shown_with_its_seed_its_times_and_what_was_verified(desk: Desk) -> None:
    desk.draw("a lighthouse", **{"Seed (−1: random)": 42})

    expect(desk.picture_of("a lighthouse, seed 42")).to_be_visible(timeout=PATIENCE)
    card = desk.card_of("a lighthouse, seed 42")
    expect(card).to_contain_text("Seed 42, 64 × 64")
    expect(card).to_contain_text("SHA-256")
    expect(card).to_contain_text("generate")
    expect(card).to_contain_text(re.compile(r"[0-9]\.[0-9] GPU seconds"))
    assert desk.picture_of("a lighthouse, seed 42").evaluate("image => image.naturalWidth") == 64
    expect(desk.page.get_by_role("status")).to_have_text("The picture is there.")


def test_progress_moves_and_a_cancelled_job_leaves_no_picture(desk: Desk) -> None:
    desk.draw("a long walk", Steps=150)

    bar = desk.page.get_by_role("progressbar", name="Progress of a long walk")
    expect(bar).to_be_visible(timeout=PATIENCE)
    desk.page.wait_for_function("() => document.querySelector('progress')?.value > 0.1")
    before = bar.evaluate("bar => bar.value")
    desk.page.wait_for_function("before => document.querySelector('progress')?.value > before", arg=before)
    desk.page.get_by_role("button", name="Cancel a long walk").click()

    expect(desk.page.get_by_role("status")).to_have_text("Cancelled.", timeout=PATIENCE)
    expect(desk.page.get_by_text("Nothing is being drawn.")).to_be_visible()
    expect(desk.picture_of("a long walk")).to_have_count(0)


def test_the_slider_of_a_lora_is_in_the_job_and_its_proof_beside_the_picture(desk: Desk) -> None:
    desk.page.get_by_label("From the catalog and the cache").select_option(label="Detail Tweaker XL")
    slider = desk.page.get_by_label("Weight of Detail Tweaker XL")
    expect(slider).to_have_value("1.5")
    slider.fill("0.8")
    desk.page.get_by_label("Any other").fill("https://civitai.com/model-versions/294259")
    desk.page.keyboard.press("Enter")
    desk.draw("a brick wall")

    card = desk.card_of("a brick wall")
    expect(card).to_contain_text("LoRA Detail Tweaker XL at 0.8: verified", timeout=PATIENCE)
    assert desk.inputs[-1]["loras"] == [
        {"version_id": 135867, "scale": 0.8},
        {"url": "https://civitai.com/model-versions/294259", "scale": 1},
    ]
    card.get_by_role("button", name="Take its settings").click()
    expect(desk.page.get_by_label("Weight of detail_tweaker_xl")).to_have_value("0.8")
    expect(desk.page.get_by_label("Prompt", exact=True)).to_have_value("a brick wall")


def test_a_dropped_picture_is_changed_where_the_mask_is_painted(desk: Desk) -> None:
    photo = drawn("a photo")
    desk.drop("#drop", photo)
    mask = desk.page.get_by_label("Mask: what you paint")
    expect(mask).to_be_visible(timeout=PATIENCE)
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 4
    desk.page.mouse.move(x, y)
    desk.page.mouse.down()
    desk.page.mouse.move(x + 30, y)
    desk.page.mouse.up()
    desk.draw("a red door")

    expect(desk.picture_of("a red door")).to_be_visible(timeout=PATIENCE)
    sent = desk.inputs[-1]
    assert (sent["task"], sent["denoising_strength"]) == ("img2img", 0.75)
    assert base64.b64decode(sent["init_images"][0]) == photo
    painted = Image.open(io.BytesIO(base64.b64decode(sent["mask"]))).convert("L")
    assert (painted.size, painted.getpixel((32, 16)), painted.getpixel((2, 62))) == ((64, 64), 255, 0)


def test_a_picture_is_pasted_and_its_mask_painted_by_keyboard(desk: Desk) -> None:
    desk.paste(drawn("a photo"))
    desk.page.get_by_label("Mask: what you paint").focus()
    desk.page.keyboard.press("ArrowRight")
    desk.page.keyboard.press("Space")
    desk.draw("a blue door")

    expect(desk.picture_of("a blue door")).to_be_visible(timeout=PATIENCE)
    assert "mask" in desk.inputs[-1]


def test_an_error_is_shown_with_its_code_and_what_to_do(desk: Desk) -> None:
    desk.page.get_by_label("Any other").fill("nobody")
    desk.page.get_by_role("button", name="Add").click()
    desk.draw("a ghost")

    failed = desk.page.locator("#queue .failed").filter(has_text="a ghost")
    expect(failed).to_contain_text("MODEL_NOT_FOUND", timeout=PATIENCE)
    expect(failed).to_contain_text("What to do: ")
    failed.get_by_role("button", name="Dismiss").click()
    expect(failed).to_have_count(0)


def test_a_picture_of_the_gallery_is_upscaled_and_is_there_after_a_reload(desk: Desk) -> None:
    desk.draw("a small boat")
    desk.page.get_by_label("Upscale with").select_option("Lanczos")
    desk.card_of("a small boat").get_by_role("button", name="Upscale").click()

    upscaled = desk.picture_of("An upscaled picture")
    expect(upscaled).to_be_visible(timeout=PATIENCE)
    assert upscaled.evaluate("image => image.naturalWidth") == 128
    desk.page.reload()
    expect(desk.picture_of("a small boat")).to_be_visible(timeout=PATIENCE)
    expect(upscaled).to_be_visible(timeout=PATIENCE)


def test_a_dropped_picture_gives_its_settings_with_its_loras(desk: Desk) -> None:
    settings = "Steps: 7, Sampler: Euler a, CFG scale: 3, Seed: 9, Size: 128x192"
    infotext = f"a cat <lora:detail_tweaker_xl:0.6>\nNegative prompt: a dog\n{settings}"
    desk.drop("#prompt", encode(picture("a cat", 64, 64), infotext, "png"))

    expect(desk.page.get_by_label("Prompt", exact=True)).to_have_value("a cat", timeout=PATIENCE)
    values = {"Negative prompt": "a dog", "Steps": "7", "Sampler": "Euler a", "Scheduler": "Automatic", "Width": "128"}
    for label, value in {**values, "Height": "192", "Seed (−1: random)": "9", "CFG scale": "3"}.items():
        expect(desk.page.get_by_label(label, exact=True)).to_have_value(value)
    expect(desk.page.get_by_label("Weight of detail_tweaker_xl")).to_have_value("0.6")


@pytest.mark.parametrize(
    ("kind", "part"), [("curl", "curl "), ("Python", '"prompt": "it\'s a \\"fox\\""'), ("JSON", '"input": {')]
)
def test_the_job_of_the_form_is_copied(desk: Desk, kind: str, part: str) -> None:
    desk.fill(Prompt='it\'s a "fox"')
    desk.page.locator("#copy-form").get_by_role("button", name=f"Copy as {kind}").click()

    expect(desk.page.get_by_role("status")).to_have_text("Copied.")
    copied = str(desk.page.evaluate("() => navigator.clipboard.readText()"))
    assert part in copied
    if kind == "Python":
        done = subprocess.run([sys.executable, "-c", copied], env={"PATH": os.environ["PATH"]}, capture_output=True)
        assert done.stdout.startswith(b"COMPLETED {"), done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(desk: Desk, scheme: Any) -> None:
    desk.page.emulate_media(color_scheme=scheme)
    desk.page.get_by_label("From the catalog and the cache").select_option(label="Detail Tweaker XL")
    desk.drop("#drop", drawn("a photo"))
    expect(desk.page.get_by_label("Mask: what you paint")).to_be_visible(timeout=PATIENCE)
    desk.draw("a garden")
    expect(desk.picture_of("a garden").first).to_be_visible(timeout=PATIENCE)

    desk.page.evaluate((DATA / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    found = desk.page.evaluate("() => axe.run()")

    assert found["passes"]
    serious = [fault for fault in found["violations"] if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in serious] == []


def test_everything_fits_a_telephone_and_the_prompt_is_sent_by_keyboard(desk: Desk) -> None:
    desk.page.set_viewport_size({"width": 360, "height": 700})
    desk.fill(Prompt="a kite")
    desk.page.get_by_label("Prompt", exact=True).press("Control+Enter")

    expect(desk.picture_of("a kite")).to_be_visible(timeout=PATIENCE)
    assert desk.page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_a_gateway_with_users_asks_who_it_is_until_that_is_right(browser: Browser, tmp_path: Path) -> None:
    access = parse_access(host="127.0.0.1", api_auth="ann:one")
    with scripted.desk(tmp_path, access=access, asleep=True) as gateway:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(gateway.url)
        for password in ("two", "one"):
            page.get_by_label("User").fill("ann")
            page.get_by_label("Password").fill(password)
            page.get_by_role("button", name="Go on").click()
            expect(page.get_by_text("is not right")).to_be_visible(visible=password == "two", timeout=PATIENCE)

        expect(page.get_by_label("Sampler")).to_have_value("DPM++ 2M", timeout=PATIENCE)
        expect(page.get_by_label("Checkpoint")).to_have_value("House")
        page.close()


@pytest.mark.skipif(not os.environ.get("SCREENSHOT"), reason="SCREENSHOT=1 makes the picture in docs/ again")
def test_the_screenshot_of_the_docs(desk: Desk, tmp_path: Path) -> None:
    desk.page.set_viewport_size({"width": 1100, "height": 760})
    desk.page.get_by_label("From the catalog and the cache").select_option(label="Detail Tweaker XL")
    desk.draw("a lighthouse on a rocky coast at dawn", Width=512, Height=512, Steps=20, **{"Seed (−1: random)": 42})
    expect(desk.picture_of("a lighthouse on a rocky coast at dawn")).to_be_visible(timeout=PATIENCE)
    desk.page.evaluate("() => scrollTo(0, 0)")
    desk.page.screenshot(path=tmp_path / "page.png")
    Image.open(tmp_path / "page.png").convert("RGB").quantize(64).save(SCREENSHOT, optimize=True)
