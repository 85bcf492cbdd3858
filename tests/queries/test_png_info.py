"""A `png_info` job: what a picture's file says, as A1111 answers it, without asking A1111."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from a1111_worker.queries.png_info import parse_parameters
from tests.support import DATA, SMALL, World, wait_until, world

RECORDED = sorted(DATA.glob("webui-*/png_info/*.json"))
INFOTEXT = "a lighthouse, été\nNegative prompt: fog\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x32"


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("png-info")) as a_world:
        yield a_world


def png_info(it: World, image: Any) -> dict[str, Any]:
    return it.run({"id": "texts", "input": {"task": "png_info", "image": image}})


def recorded(path: Path) -> tuple[str, dict[str, Any]]:
    """The picture that was sent to A1111, and its answer."""
    exchange = json.loads(path.read_text(encoding="utf-8"))
    return exchange["request"]["body"]["image"], exchange["response"]["body"]


def is_whole(path: Path) -> bool:
    return "chars>" not in recorded(path)[0]


def picture(kind: str, **texts: str) -> str:
    """A picture with texts where A1111 and others put them, in base64."""
    image, file = Image.new("RGB", (64, 32)), io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        image.save(file, "png", pnginfo=info)
    elif kind == "gif":
        image.save(file, "gif", comment=texts["comment"].encode())
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = texts["comment"].encode("utf-8")
        if kind.endswith("unicode"):
            exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + texts["comment"].encode("utf-16-be")
        image.save(file, kind.partition("-")[0], exif=exif)
    return base64.b64encode(file.getvalue()).decode()


NAME = "{0.parent.parent.name}-{0.stem}".format


@pytest.mark.parametrize("path", [path for path in RECORDED if "1.10.1" in str(path)], ids=NAME)
def test_the_parameters_are_those_that_a1111_finds_in_the_same_text(path: Path) -> None:
    _, answer = recorded(path)

    assert parse_parameters(answer["info"]) == answer["parameters"]


@pytest.mark.parametrize("path", [path for path in RECORDED if is_whole(path)], ids=NAME)
def test_the_texts_of_a_recorded_picture_are_those_that_a1111_finds(it: World, path: Path) -> None:
    image, recorded_answer = recorded(path)

    answer = png_info(it, image)

    assert (answer["info"], answer["items"]) == (recorded_answer["info"], recorded_answer["items"])


# the picture, its infotext, its other texts
PICTURES = [
    (picture("png", parameters=INFOTEXT, Software="me", workflow="{}"), INFOTEXT, {"Software": "me", "workflow": "{}"}),
    (picture("jpeg-unicode", comment=INFOTEXT), INFOTEXT, {}),
    (picture("webp-unicode", comment=INFOTEXT), INFOTEXT, {}),
    (picture("jpeg", comment="hello"), "hello", {}),  # an EXIF text without a name of its encoding
    (picture("png"), "", {}),
    (picture("png", Software="NovelAI", Description="a cat", Comment="no JSON"), "", {"Description": "a cat"}),
]


@pytest.mark.parametrize(("image", "infotext", "items"), PICTURES)
def test_the_text_is_found_where_a1111_puts_it(it: World, image: str, infotext: str, items: dict[str, str]) -> None:
    for form in (image, f"data:image/png;base64,{image}", f"  {image}"):
        answer = png_info(it, form)

        assert answer["info"] == infotext
        assert answer["items"].items() >= items.items()
        assert answer["parameters"]["Prompt"] == infotext.partition("\nNegative")[0]


def test_a_comment_of_a_gif_is_its_infotext(it: World) -> None:
    answer = png_info(it, picture("gif", comment="hello"))

    assert (answer["info"], answer["items"]["comment"]) == ("hello", "hello")


def test_a_picture_of_novelai_is_translated(it: World) -> None:
    settings = {"steps": 28, "sampler": "k_euler", "seed": 1, "strength": 0.7, "noise": 0.2, "scale": 11, "uc": "bad"}
    image = picture("png", Software="NovelAI", Description="a cat", Comment=json.dumps(settings))
    _, expected = recorded(DATA / "webui-1.10.1" / "png_info" / "novelai.json")

    answer = png_info(it, image)

    assert answer["info"] == expected["info"].replace("40x24", "64x32")
    assert answer["items"] == expected["items"]


def test_the_text_of_the_workers_own_picture_is_read(it: World) -> None:
    drawn = it.ask(seed=7)

    answer = png_info(it, drawn["images"][0])

    assert answer["info"] == json.loads(drawn["info"])["infotexts"][0]
    assert answer["parameters"]["Seed"] == "7"
    assert answer["worker"]["lists"] == drawn["worker"]["lists"]


def test_a_picture_is_read_while_a_generation_hangs(it: World) -> None:
    it.webui.step_seconds = 60
    before, asked = len(it.generations()), len(it.webui.asked)

    async def scene() -> None:
        hanging = asyncio.ensure_future(it.worker.handle({"id": "a", "input": {"prompt": "a lighthouse", **SMALL}}))
        await asyncio.to_thread(wait_until, lambda: len(it.generations()) > before, "the generation")
        answer = await it.worker.handle({"id": "b", "input": {"task": "png_info", "image": PICTURES[0][0]}})

        assert answer["info"] == INFOTEXT
        assert not [path for path in it.requests_since(asked) if path.endswith("png-info")]
        assert not hanging.done()
        it.webui.step_seconds = 0
        hanging.cancel()
        await asyncio.wait([hanging])

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))


BAD = [
    (None, "image: must be a picture as text, not null"),
    (5, "image: must be a picture as text, not 5"),
    ("", "image: must not be blank"),
    ("!!!", "image: is no picture"),
    ("https://example.com/a.png", "image: is a URL, and this worker fetches no pictures"),
    (base64.b64encode(b"\x89PNG\r\n\x1a\n, or so it says").decode(), "image: is "),
]


@pytest.mark.parametrize(("image", "sentence"), BAD)
def test_what_is_no_picture_is_a_complaint(it: World, image: Any, sentence: str) -> None:
    answer = png_info(it, image)

    assert answer["code"] == "INVALID_REQUEST"
    assert sentence in answer["error"]
    assert [complaint["path"] for complaint in answer["complaints"]] == ["image"]


def test_the_picture_is_required(it: World) -> None:
    assert it.run({"id": "x", "input": {"task": "png_info"}})["message"] == "image: is required"
