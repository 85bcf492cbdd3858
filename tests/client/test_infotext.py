"""The text in A1111's pictures, read as A1111 1.10.1 reads it (tests/data/webui-1.10.1/png_info)."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from a1111_client.infotext import NotAPicture, parse_infotext, read_infotext
from tests.support import DATA

RECORDED = sorted((DATA / "webui-1.10.1" / "png_info").glob("*.json"))
TRANSLATED = "novelai"  # A1111 rewrites another program's settings; this does not


def answer(path: Path) -> dict[str, Any]:
    exchange: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["response"]["body"]
    return exchange


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_settings_are_those_that_a1111_finds_in_the_same_text(path: Path) -> None:
    recorded = answer(path)

    assert parse_infotext(recorded["info"]) == recorded["parameters"]


@pytest.mark.parametrize("name", ["foreign_png_empty", "foreign_png_text", "webp_plain"])
def test_the_texts_of_a_picture_are_those_that_a1111_finds_in_it(name: str) -> None:
    path = DATA / "webui-1.10.1" / "png_info" / f"{name}.json"
    picture = json.loads(path.read_text(encoding="utf-8"))["request"]["body"]["image"]

    infotext, items = read_infotext(base64.b64decode(picture))

    assert (infotext, items) == (answer(path)["info"], answer(path)["items"])


def picture(kind: str, text: str) -> bytes:
    """A picture that carries the text where A1111 puts it."""
    image, file = Image.new("RGB", (8, 8)), io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        image.save(file, "png", pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
        image.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_text_is_found_in_every_format_that_a_worker_sends(kind: str) -> None:
    text = "a lighthouse, été\nNegative prompt: fog\nSteps: 2, Sampler: Euler, Seed: 5"

    assert read_infotext(picture(kind, text))[0] == text


def test_a_quoted_value_may_contain_commas() -> None:
    parts = parse_infotext('a cat\nSteps: 2, Seed: 5, Lora hashes: "one: 1f, two: 2e", Size: 64x128')

    assert (parts["Lora hashes"], parts["Size-1"], parts["Size-2"]) == ("one: 1f, two: 2e", "64", "128")


def test_bytes_that_are_no_picture_are_refused() -> None:
    with pytest.raises(NotAPicture):
        read_infotext(b"GIF89a, or so it says")
