"""A picture as a job writes it: base64, a `data:` URL with base64, or an https URL. Nothing is fetched or decoded here.

A1111 1.10.1 takes less: it fails for "DATA:", the URL-safe alphabet, missing padding, and parameters before ";base64".
"""

from __future__ import annotations

import base64
import binascii
import re

from a1111_worker.domain import PictureSource
from a1111_worker.origins import OriginRefused
from a1111_worker.transfer.egress import EgressPolicy

MAX_PICTURE_BYTES = 20_000_000
_MAX_CHARACTERS = MAX_PICTURE_BYTES * 3 // 2  # of base64; a third more than the bytes, and its line breaks

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]{1,20}:", re.IGNORECASE)

NO_PICTURE = f"is no picture: {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read"


class BadPicture(Exception):
    """A picture that cannot be used. The message says what is wrong: "is no picture …"; it repeats no content."""


def parse_picture(text: str, policy: EgressPolicy | None) -> PictureSource:
    """The picture that a text means. Raises BadPicture.

    `policy` is that of IMAGE_HOSTS; None: this worker fetches no pictures. Of base64, only the first
    bytes are looked at.
    """
    if re.match(r"\s*https?://", text[:100], re.IGNORECASE):
        return PictureSource(url=_parse_url(text.strip(), policy))
    if found := _DATA_URL.match(text.lstrip()[:300]):
        text = text.lstrip()[found.end() :]
    elif _SCHEME.match(text[:30]):
        raise BadPicture("must be base64, a data: URL with base64, or an https URL")
    if not text.strip():
        raise BadPicture("must not be blank")
    if len(text) > _MAX_CHARACTERS:
        raise too_large()
    first = "".join(text[:64].split())
    if not _decoded(first[: len(first) // 4 * 4]).startswith(_SIGNATURES):
        raise BadPicture(NO_PICTURE)
    return PictureSource(base64=text)


def decode_base64(text: str) -> bytes:
    """The bytes of a picture in base64. Raises BadPicture."""
    data = _decoded(text)
    if len(data) > MAX_PICTURE_BYTES:
        raise too_large()
    return data


def too_large() -> BadPicture:
    return BadPicture(f"is larger than {MAX_PICTURE_BYTES / 1e6:.0f} MB")


def _parse_url(url: str, policy: EgressPolicy | None) -> str:
    if policy is None:
        raise BadPicture("is a URL, and this worker fetches no pictures: send it in base64 (see IMAGE_HOSTS)")
    try:
        policy.check(url)
    except OriginRefused as error:
        raise BadPicture(f"is refused: {error}") from error
    return url


def _decoded(text: str) -> bytes:
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadPicture("is no base64") from error
