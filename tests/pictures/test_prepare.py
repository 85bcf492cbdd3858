"""The pictures of a job, all of them: in which order, within which limits, and with which complaints."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import PictureSize, PictureSource
from a1111_worker.errors import DownloadFailed, InvalidRequest, JobCancelled
from a1111_worker.pictures.fetch import PictureFetcher
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.transfer.egress import EgressPolicy
from tests.pictures.test_fetch import PictureHost


def picture(width: int = 16, height: int = 8, *, mode: str = "RGB", **more: Any) -> PictureSource:
    file = io.BytesIO()
    Image.new(mode, (width, height), "white").save(file, "PNG")
    return PictureSource(base64=base64.b64encode(file.getvalue()).decode(), **more)


def no_picture(text: bytes = b"\x89PNG\r\n\x1a\n") -> PictureSource:
    return PictureSource(base64=base64.b64encode(text).decode())


def complaints(preparer: PicturePreparer, sources: dict[str, PictureSource]) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as raised:
        preparer.prepare(sources, JobContext())
    return [(complaint.path, complaint.message) for complaint in raised.value.complaints]


def test_a_mask_is_brought_to_the_size_of_its_picture_in_whatever_order() -> None:
    sources = {"mask": picture(4, 4, mode="L", mask_of="init_images[0]"), "init_images[0]": picture(16, 8)}

    prepared = PicturePreparer().prepare(sources, JobContext())

    assert {path: one.size for path, one in prepared.items()} == {
        "init_images[0]": PictureSize(16, 8),
        "mask": PictureSize(16, 8),
    }
    assert prepared["mask"].brightness == 255 * 16 * 8


def test_a_job_without_pictures_has_none() -> None:
    assert PicturePreparer().prepare({}, JobContext()) == {}


def test_everything_that_is_wrong_is_said_at_once_with_its_path() -> None:
    whole = picture(64, 64)
    cut = PictureSource(base64=whole.base64[:160] if whole.base64 else "")
    sources = {
        "init_images[0]": picture(),
        "init_images[1]": no_picture(),
        "init_images[2]": cut,
        "init_images[3]": PictureSource(base64="iVBOR"),
        "mask": no_picture(b"GIF87a"),
    }

    found = complaints(PicturePreparer(), sources)

    assert [(path, message.split(":")[0]) for path, message in found] == [
        ("init_images[1]", "is no picture"),
        ("init_images[2]", "is cut off"),
        ("init_images[3]", "is no base64"),
        ("mask", "is no picture"),
    ]


def test_what_all_pictures_take_is_limited_before_one_is_decoded() -> None:
    sources = {"init_images[0]": picture(100, 100), "init_images[1]": picture(100, 101)}

    found = complaints(PicturePreparer(max_decoded=60_000), sources)

    assert [path for path, _ in found] == ["init_images[0]"]
    assert PicturePreparer(max_decoded=60_300).prepare(sources, JobContext()).keys() == sources.keys()


def test_pictures_behind_urls_are_fetched_and_each_fault_has_its_path() -> None:
    data = base64.b64decode(picture().base64 or "")
    with PictureHost() as host:
        for path in ("/a", "/b"):
            host.answers[path] = lambda exchange: exchange.send(200, data)
        host.answers["/gone"] = lambda exchange: exchange.send(404)
        host.answers["/busy"] = lambda exchange: exchange.send(503)
        preparer = PicturePreparer(PictureFetcher(EgressPolicy([host.url])))

        def sources(*paths: str) -> dict[str, PictureSource]:
            return {f"init_images[{n}]": PictureSource(url=f"{host.url}{path}") for n, path in enumerate(paths)}

        assert len(preparer.prepare(sources("/a", "/b"), JobContext())) == 2
        assert complaints(preparer, sources("/a", "/gone")) == [
            ("init_images[1]", "cannot be fetched: its host answered 404")
        ]
        with pytest.raises(DownloadFailed, match=r"init_images\[1\]: its host answered 503"):
            preparer.prepare(sources("/a", "/busy"), JobContext())


def test_a_cancelled_job_decodes_nothing() -> None:
    deadline = Deadline()
    deadline.cancel()

    with pytest.raises(JobCancelled):
        PicturePreparer().prepare({"init_images[0]": picture()}, JobContext(deadline))
