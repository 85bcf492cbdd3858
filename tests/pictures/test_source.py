"""What a job may write for a picture. Nothing is fetched or decoded here, apart from base64."""

from __future__ import annotations

import base64

import pytest

from a1111_worker.domain import PictureSource
from a1111_worker.pictures.source import MAX_PICTURE_BYTES, BadPicture, decode_base64, parse_picture
from a1111_worker.transfer.egress import EgressPolicy

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(251, 256)) * 20
TEXT = base64.b64encode(PNG).decode()
POLICY = EgressPolicy(["pictures.example"])


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f" {TEXT[:40]}\r\n{TEXT[40:]}\n",
        TEXT.rstrip("="),  # from here on, A1111 fails
        TEXT.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{TEXT}",
        f"data:image/jpeg;base64,{TEXT}",  # the label may lie
        f"DATA:image/png;base64,{TEXT}",
        f"data:image/png;charset=x;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:;base64,{TEXT}",
    ],
)
def test_base64_is_taken_in_all_its_forms(text: str) -> None:
    source = parse_picture(text, None)

    assert source.url is None and source.base64 is not None
    assert decode_base64(source.base64) == PNG


def test_an_url_of_a_listed_host_is_taken() -> None:
    url = "https://pictures.example/a.png?signature=secret"

    source = parse_picture(f" {url}\n", POLICY)

    assert source.url == url
    assert "secret" not in repr(source) and TEXT not in repr(parse_picture(TEXT, None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be blank"),
        (" \n", "must not be blank"),
        ("data:image/png;base64,", "must not be blank"),
        ("ä" * 100, "is no base64"),
        ("/etc/passwd", "is no picture: PNG, JPEG, WEBP, GIF, BMP and TIFF are read"),
        (base64.b64encode(b"%!PS-Adobe-3.0 EPSF").decode(), "is no picture"),
        ("file:///etc/passwd", "must be base64, a data: URL with base64, or an https URL"),
        ("data:image/png,abc", "must be base64, a data: URL with base64, or an https URL"),
        ("https://elsewhere.example/a.png", "is refused: https://elsewhere.example is not among"),
        ("http://pictures.example/a.png", "is refused: http://pictures.example is not among"),
        ("https://user:password@pictures.example/a.png", "is refused: not a plain https URL"),
        ("https://pictures.example:8443/a.png", "is refused"),
        ("A" * (MAX_PICTURE_BYTES * 2), "is larger than 20 MB"),
    ],
    ids=lambda value: value[:30],
)
def test_everything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadPicture, match=message):
        parse_picture(text, POLICY)


def test_without_image_hosts_no_url_is_taken() -> None:
    with pytest.raises(BadPicture, match="this worker fetches no pictures"):
        parse_picture("https://pictures.example/a.png", None)


@pytest.mark.parametrize("text", ["iVBORw0KG", TEXT[:-3] + "ä==", TEXT + "A=B"])
def test_what_is_no_base64_to_its_end_is_found_when_it_is_decoded(text: str) -> None:
    with pytest.raises(BadPicture, match="is no base64"):
        decode_base64(text)


def test_the_limit_counts_bytes() -> None:
    text = base64.b64encode(bytes(MAX_PICTURE_BYTES + 1)).decode()

    with pytest.raises(BadPicture, match="is larger than 20 MB"):
        decode_base64(text)
    assert len(decode_base64(text[:-4])) <= MAX_PICTURE_BYTES


def test_a_source_has_one_form() -> None:
    assert parse_picture(TEXT, POLICY) == PictureSource(base64=TEXT)
