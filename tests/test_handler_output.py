"""Whole jobs, and how their images leave: each output option, with the real handler and a real S3 server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.buckets import KEY_ID, SECRET, FaultyProxy, S3Fault, S3Server, s3_server
from tests.images import infotext_of
from tests.support import DETAIL, World, world


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A worker without a bucket."""
    with world(tmp_path_factory.mktemp("plain")) as it:
        yield it


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as it:
        yield it


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.url) as it:
        yield it


@pytest.fixture(scope="module")
def results(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory, proxy: FaultyProxy, results: str) -> Iterator[World]:
    """A worker with a bucket."""
    with world(
        tmp_path_factory.mktemp("bucketed"),
        BUCKET_ENDPOINT_URL=proxy.url,
        BUCKET_ACCESS_KEY_ID=KEY_ID,
        BUCKET_SECRET_ACCESS_KEY=SECRET,
        BUCKET_NAME=results,
        BUCKET_PREFIX="a1111",
        BUCKET_LINK_TTL="600",
    ) as it:
        yield it


@pytest.fixture(autouse=True)
def _healthy(plain: World, bucketed: World, proxy: FaultyProxy) -> Iterator[None]:
    yield
    proxy.faults.clear()
    plain.webui.image_bytes = bucketed.webui.image_bytes = None


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# -- in the answer ----------------------------------------------------------------------------------------------------


def test_a_job_without_output_options_gets_the_webuis_own_bytes(plain: World) -> None:
    defaults = plain.ask(output={"format": "png", "delivery": "auto", "metadata": True, "raw": False})
    answer = plain.ask()

    assert defaults["images"] == answer["images"]
    assert answer["worker"]["delivery"] == {"mode": "inline", "format": "png", "urls": [], "expires_at": None}
    assert "lighthouse" in str(infotext_of(answer["images"][0]))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a_job_gets_its_images_in_its_format_with_their_infotext(plain: World, form: str) -> None:
    before = infotext_of(plain.ask(batch_size=2, loras=[{"version_id": DETAIL}])["images"][1])

    answer = plain.ask(batch_size=2, loras=[{"version_id": DETAIL}], output={"format": form, "quality": 80})

    assert len(answer["images"]) == 2
    assert [opened(base64.b64decode(image)).format for image in answer["images"]] == [form.upper()] * 2
    assert infotext_of(answer["images"][1]) == before
    assert answer["worker"]["delivery"]["format"] == form
    assert answer["worker"]["timings"]["deliver"] > 0


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_without_metadata_no_image_has_an_infotext(plain: World, form: str) -> None:
    original = opened(base64.b64decode(plain.ask()["images"][0]))

    answer = plain.ask(output={"format": form, "metadata": False})

    data = base64.b64decode(answer["images"][0])
    assert infotext_of(answer["images"][0]) is None and b"lighthouse" not in data
    if form == "png":
        assert opened(data).tobytes() == original.tobytes()
    assert "lighthouse" in answer["info"]  # the answer itself still has it


def test_a_raw_answer_is_the_webuis_alone(plain: World) -> None:
    whole = plain.ask()

    raw = plain.ask(output={"raw": True})

    assert sorted(raw) == ["images", "info", "parameters"]
    assert raw["images"] == whole["images"]


def test_the_webui_never_sees_the_output_options(plain: World) -> None:
    plain.ask(output={"format": "webp"}, allow_blank=True)

    assert not {"output", "allow_blank"} & plain.generations()[-1].keys()


def test_a_quality_for_png_is_answered_with_a_warning(plain: World) -> None:
    assert plain.ask(output={"quality": 50})["worker"]["warnings"] == [
        "output.quality does nothing for png, which is lossless"
    ]


# the job's output options, and what must be in the error
REFUSED: list[tuple[Any, str]] = [
    ({"format": "gif"}, "output.format: must be one of png, jpeg, webp"),
    ({"format": "webp", "quality": 101}, "output.quality: must be a whole number from 1 to 100"),
    ({"delivery": "bucket"}, "output.delivery: is refused: this worker has no bucket"),
    ("webp", "output: must be an object"),
]


@pytest.mark.parametrize(("output", "words"), REFUSED)
def test_output_options_that_cannot_work_are_refused_before_the_generation(
    plain: World, output: Any, words: str
) -> None:
    before = len(plain.generations())

    answer = plain.ask(output=output)

    assert answer["code"] == "INVALID_REQUEST" and words in answer["error"]
    assert len(plain.generations()) == before


def test_a_local_runs_images_are_saved_in_their_own_format(tmp_path: Path) -> None:
    with world(tmp_path, OUTPUT_DIR=str(tmp_path / "out")) as it:
        answer = it.ask("local_test", output={"format": "jpeg", "raw": True})

    (saved,) = (tmp_path / "out").iterdir()
    assert saved.name == "local_test-1-42.jpg"
    assert saved.read_bytes() == base64.b64decode(answer["images"][0])


# -- too large --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", ["job-1", "sync-1"])
def test_a_result_that_the_platform_would_drop_is_an_error_with_a_hint(plain: World, job_id: str) -> None:
    plain.webui.image_bytes = 16_000_000

    answer = plain.ask(job_id)

    assert answer["code"] == "RESULT_TOO_LARGE" and "21.3 MB" in answer["error"]
    assert '"format": "webp"' in answer["hint"] and "BUCKET_ENDPOINT_URL" in answer["hint"]


def test_the_hint_of_a_result_that_is_too_large_works(plain: World) -> None:
    plain.webui.image_bytes = 8_000_000

    failed = plain.ask()
    smaller = plain.ask(output={"format": "webp"})
    patient = plain.ask("sync-1")

    assert failed["code"] == "RESULT_TOO_LARGE" and "/runsync" in failed["hint"]
    assert len(smaller["images"]) == len(patient["images"]) == 1


# -- in the bucket ----------------------------------------------------------------------------------------------------


def test_a_job_may_have_links_instead_of_images(bucketed: World, s3: S3Server, results: str) -> None:
    inline = bucketed.ask("job-a", batch_size=2)

    answer = bucketed.ask("job-b", batch_size=2, output={"delivery": "bucket"})

    delivered = answer["worker"]["delivery"]
    assert (answer["images"], delivered["mode"], delivered["format"]) == ([], "bucket", "png")
    assert [key for key in s3.keys(results) if "job-b" in key] == ["a1111/job-b/1-42.png", "a1111/job-b/2-43.png"]
    read = [requests.get(url, timeout=10) for url in delivered["urls"]]
    assert [base64.b64encode(response.content).decode() for response in read] == inline["images"]  # byte for byte
    assert delivered["expires_at"].endswith("Z")
    assert json.loads(answer["info"])["all_seeds"] == [42, 43]


def test_a_result_that_does_not_fit_goes_to_the_bucket(bucketed: World) -> None:
    bucketed.webui.image_bytes = 9_000_000

    answer = bucketed.ask()

    (url,) = answer["worker"]["delivery"]["urls"]
    assert answer["images"] == [] and len(requests.get(url, timeout=10).content) == 9_000_000


def test_a_result_that_fits_stays_in_the_answer_though_there_is_a_bucket(bucketed: World, proxy: FaultyProxy) -> None:
    before = len(proxy.asked)

    answer = bucketed.ask()

    assert answer["worker"]["delivery"]["mode"] == "inline" and len(answer["images"]) == 1
    assert len(proxy.asked) == before


@pytest.mark.parametrize("output", [{"delivery": "inline"}, {"raw": True}])
def test_a_job_that_excludes_links_gets_an_error_that_names_them(bucketed: World, output: dict[str, Any]) -> None:
    bucketed.webui.image_bytes = 9_000_000

    answer = bucketed.ask(output=output)

    assert answer["code"] == "RESULT_TOO_LARGE" and "links into the bucket" in answer["hint"]


def test_a_raw_answer_cannot_have_links(bucketed: World) -> None:
    answer = bucketed.ask(output={"delivery": "bucket", "raw": True})

    assert answer["code"] == "INVALID_REQUEST" and "output.raw" in answer["error"]


def test_a_bucket_that_refuses_fails_the_job_and_harms_no_other(
    bucketed: World, proxy: FaultyProxy, s3: S3Server, results: str
) -> None:
    proxy.faults.append(S3Fault(403, on="/2-", times=1))

    failed = bucketed.ask("job-x", batch_size=2, output={"delivery": "bucket", "format": "webp"})
    after = bucketed.ask("job-y", output={"delivery": "bucket", "format": "webp"})

    assert failed["code"] == "DELIVERY_FAILED" and failed["retryable"] is True
    assert SECRET not in json.dumps(failed)
    assert [key for key in s3.keys(results) if "job-x" in key] == []
    assert opened(requests.get(after["worker"]["delivery"]["urls"][0], timeout=10).content).format == "WEBP"
