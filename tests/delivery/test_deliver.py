"""How an answer leaves: its form, its measured size, its pictures in a bucket, a local run's pictures."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from a1111_worker import __version__
from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.answer import (
    ENVELOPE,
    LINK,
    RUN_LIMIT,
    RUNSYNC_LIMIT,
    Delivered,
    answer_of,
    limit_of,
    size_of,
    way_out,
)
from a1111_worker.delivery.bucket import Bucket
from a1111_worker.delivery.deliver import Delivery, save_images
from a1111_worker.domain import (
    AppliedLora,
    BucketSettings,
    DeliveryMode,
    Generation,
    ImageFormat,
    Model,
    ModelKind,
    OutputOptions,
    Progress,
    Stage,
)
from a1111_worker.errors import DeliveryFailed, GenerationFailed, JobCancelled, JobTimeout, ResultTooLarge
from sandbox import draw
from tests.buckets import KEY_ID, SECRET, Fault, Line, Storage, storage

AUTO, INLINE, BUCKET = DeliveryMode.AUTO, DeliveryMode.INLINE, DeliveryMode.BUCKET
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()


def generation(**answer: Any) -> Generation:
    checkpoint = Model(
        kind=ModelKind.CHECKPOINT, name="The Model", file="m.safetensors", path=Path("x"), sha256="ab" * 32, size=1
    )
    lora = Model(
        kind=ModelKind.LORA,
        name="Detail",
        file="d.safetensors",
        path=Path("x"),
        sha256="cd" * 32,
        size=1,
        version_id=135867,
        downloaded=True,
    )
    return Generation(
        answer={"images": [PNG], "parameters": {"prompt": "猫"}, "info": '{"all_seeds": [42]}', **answer},
        checkpoint=checkpoint,
        loras=(AppliedLora("Detail", 1.5, lora, loaded=True), AppliedLora("Gone", 1.0, None, loaded=False)),
        seeds=(42, 43),
        webui_version="v1.10.1",
        warnings=("a word",),
    )


def inline(made: Generation) -> dict[str, Any]:
    return answer_of(made, Delivered(made.answer["images"]), {"total": 1.5})


def deliver(job_id: str, made: Generation, options: OutputOptions | None = None) -> dict[str, Any]:
    return Delivery().deliver(made, options or OutputOptions(), JobContext(job_id=job_id))


# -- the answer -------------------------------------------------------------------------------------------------------


def test_the_worker_block_says_what_was_proven() -> None:
    answer = answer_of(generation(), Delivered([PNG]), {"generate": 1.23456, "total": 2.0})

    assert answer["worker"] == {
        "checkpoint": {"name": "The Model", "file": "m.safetensors", "sha256": "ab" * 32},
        "loras": [
            {
                "name": "Detail",
                "file": "d.safetensors",
                "version_id": 135867,
                "scale": 1.5,
                "sha256": "cd" * 32,
                "loaded": True,
                "downloaded": True,
            },
            {
                "name": "Gone",
                "file": None,
                "version_id": None,
                "scale": 1.0,
                "sha256": None,
                "loaded": False,
                "downloaded": False,
            },
        ],
        "seeds": [42, 43],
        "warnings": ["a word"],
        "delivery": {"mode": "inline", "format": "png", "urls": [], "expires_at": None},
        "timings": {"generate": 1.235, "total": 2.0},
        "versions": {"worker": __version__, "webui": "v1.10.1"},
    }


def test_what_the_webui_answered_is_not_changed() -> None:
    made = generation()

    answer = deliver("job-1", made)

    assert "worker" not in made.answer
    assert {key: answer[key] for key in made.answer} == made.answer
    assert answer["images"][0] is PNG  # byte for byte, and never copied


def test_a_raw_answer_is_the_webuis_alone() -> None:
    made = generation()

    answer = deliver("job-1", made, OutputOptions(raw=True))

    assert answer == made.answer


def test_the_seconds_of_delivering_are_counted() -> None:
    context = JobContext(job_id="job-1")

    answer = Delivery().deliver(generation(), OutputOptions(), context)

    spent = context.timings.seconds()
    assert spent["deliver"] > 0.0
    assert answer["worker"]["timings"]["deliver"] == round(spent["deliver"], 3)
    assert sum(spent[stage.value] for stage in Stage) == spent["deliver"]


# -- its size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[], [PNG], [PNG, PNG, PNG]])
def test_the_measured_size_is_the_size_the_sdk_will_post(images: list[str]) -> None:
    answer = inline(generation(images=images))

    posted = json.dumps(answer, ensure_ascii=False).encode()
    assert 0 <= size_of(answer) - len(posted) <= 4


# id, bytes of the picture, whether the platform takes it
LIMITS = [
    ("job-1", RUN_LIMIT - 5000, True),
    ("job-1", RUN_LIMIT, False),
    ("sync-1", RUN_LIMIT, True),  # /runsync takes twice as much
    ("sync-1", RUNSYNC_LIMIT, False),
]


@pytest.mark.parametrize(("job_id", "size", "fits"), LIMITS)
def test_a_result_the_platform_would_drop_is_an_error_that_says_so(job_id: str, size: int, fits: bool) -> None:
    made = generation(images=["A" * size])

    if fits:
        assert size_of(deliver(job_id, made)) + ENVELOPE <= limit_of(job_id)
    else:
        with pytest.raises(ResultTooLarge, match=r"the result is \d+\.\d MB and RunPod takes \d+ MB"):
            deliver(job_id, made)


SMALL, LARGE = 1000, RUN_LIMIT
TOO_LARGE = None

# what the job wants, whether it wants no worker block, characters of its picture, whether there is a bucket: the way
WAYS = [
    (AUTO, False, SMALL, False, INLINE),
    (AUTO, False, SMALL, True, INLINE),  # a bucket is for what does not fit
    (AUTO, False, LARGE, True, BUCKET),
    (AUTO, False, LARGE, False, TOO_LARGE),
    (INLINE, False, SMALL, True, INLINE),
    (INLINE, False, LARGE, True, TOO_LARGE),  # the job said so
    (BUCKET, False, SMALL, True, BUCKET),
    (BUCKET, False, LARGE, True, BUCKET),
    (AUTO, True, SMALL, True, INLINE),
    (AUTO, True, LARGE, True, TOO_LARGE),  # a raw answer has no place for links
]


@pytest.mark.parametrize(("mode", "raw", "size", "has_bucket", "expected"), WAYS)
def test_the_way_out(mode: DeliveryMode, raw: bool, size: int, has_bucket: bool, expected: DeliveryMode | None) -> None:
    answer = inline(generation(images=["A" * size]))
    options = OutputOptions(delivery=mode, raw=raw)

    if expected is TOO_LARGE:
        with pytest.raises(ResultTooLarge):
            way_out(answer, options, RUN_LIMIT, has_bucket=has_bucket)
    else:
        assert way_out(answer, options, RUN_LIMIT, has_bucket=has_bucket) is expected


def test_a_bucket_does_not_help_what_is_large_without_its_pictures() -> None:
    answer = inline(generation(images=[PNG], parameters={"script_args": "A" * RUN_LIMIT}))

    with pytest.raises(ResultTooLarge):
        way_out(answer, OutputOptions(), RUN_LIMIT, has_bucket=True)


PNGS, WEBPS = OutputOptions(), OutputOptions(ImageFormat.WEBP)
LARGER = RUNSYNC_LIMIT

# what the job wants, characters of each picture, limit, whether there is a bucket: words of the hint, words not in it
HINTS: list[tuple[OutputOptions, Sequence[int], int, bool, tuple[str, ...], tuple[str, ...]]] = [
    (PNGS, [LARGE], RUN_LIMIT, False, ("webp", "a smaller image", "/runsync", "BUCKET_ENDPOINT_URL"), ("fewer",)),
    (PNGS, [LARGE, SMALL], RUN_LIMIT, False, ("fewer images",), ("a smaller image",)),
    (WEBPS, [LARGE], RUN_LIMIT, False, ("a smaller image",), ("webp",)),  # it is one already
    (PNGS, [LARGER], RUN_LIMIT, False, ("webp",), ("/runsync",)),  # which would not help
    (PNGS, [LARGER], RUNSYNC_LIMIT, False, ("webp",), ("/runsync",)),  # it came by that already
    (OutputOptions(delivery=INLINE), [LARGE], RUN_LIMIT, True, ('"auto"',), ("BUCKET_",)),
    (OutputOptions(raw=True), [LARGE], RUN_LIMIT, True, ('leave out "raw"',), ("BUCKET_",)),
]


@pytest.mark.parametrize(("options", "sizes", "limit", "has_bucket", "words", "others"), HINTS)
def test_what_is_too_large_is_told_how_it_would_fit(
    options: OutputOptions,
    sizes: Sequence[int],
    limit: int,
    has_bucket: bool,
    words: tuple[str, ...],
    others: tuple[str, ...],
) -> None:
    answer = inline(generation(images=["A" * size for size in sizes]))

    with pytest.raises(ResultTooLarge) as caught:
        way_out(answer, options, limit, has_bucket=has_bucket)

    hint = caught.value.hint or ""
    assert all(word in hint for word in words) and not any(word in hint for word in others), hint


@pytest.mark.parametrize("broken", [float("nan"), b"bytes", "\ud800"])
def test_what_is_no_strict_json_never_leaves(broken: Any) -> None:
    with pytest.raises(GenerationFailed):
        deliver("job-1", generation(parameters={"x": broken}))


# -- a local run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_a_local_runs_pictures_are_named_by_job_number_and_seed(tmp_path: Path, raw: bool) -> None:
    answer = deliver("local/../test", generation(images=[PNG, PNG]), OutputOptions(raw=raw))

    written = save_images(tmp_path / "out", "local/../test", answer)

    # A picture beyond the seeds, such as a script's grid, has none.
    assert [path.name for path in written] == ["local----test-1-42.png", "local----test-2.png"]
    assert written[0].read_bytes() == base64.b64decode(PNG)


# -- the bucket -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    with storage() as it:
        yield it


@pytest.fixture
def line(s3: Storage) -> Iterator[Line]:
    with Line(s3.url) as it:
        yield it


class Place:
    """A bucket of a test's own behind a line that may fail, and one who delivers there."""

    def __init__(
        self, s3: Storage, line: Line, name: str, pauses: Sequence[float] = (0.01, 0.01, 0.01), **settings: Any
    ) -> None:
        self.s3, self.line, self.name = s3, line, name
        self.settings = BucketSettings(
            **{
                "endpoint_url": line.url,
                "name": name,
                "access_key_id": KEY_ID,
                "secret_access_key": SECRET,
                **settings,
            }
        )
        self.delivery = Delivery(Bucket(self.settings, pauses=pauses, connect_timeout=2.0, read_timeout=2.0))

    def deliver(
        self,
        *images: bytes,
        job_id: str = "job-1",
        context: JobContext | None = None,
        options: OutputOptions | None = None,
    ) -> dict[str, Any]:
        made = generation(images=[base64.b64encode(image).decode() for image in images])
        options = options or OutputOptions(delivery=BUCKET)
        return self.delivery.deliver(made, options, replace(context or JobContext(), job_id=job_id))

    @property
    def is_empty(self) -> bool:
        return self.s3.keys(self.name) == [] and self.s3.unfinished(self.name) == []


@pytest.fixture(scope="module")
def one_place(s3: Storage) -> Iterator[Place]:
    with Line(s3.url) as line:
        it = Place(s3, line, s3.new_bucket())
        yield it
        it.delivery.close()


@pytest.fixture
def place(one_place: Place) -> Place:
    """A place as if it were new: building the client anew for each test would take longer than the tests."""
    one_place.line.faults.clear()
    one_place.line.asked.clear()
    for key in one_place.s3.keys(one_place.name):
        one_place.s3.s3.delete_object(Bucket=one_place.name, Key=key)
    return one_place


ONE, TWO, THREE = b"one" * 1000, b"two" * 1000, b"three" * 1000


def test_pictures_lie_in_the_bucket_and_their_links_can_be_read_by_anyone(place: Place) -> None:
    answer = place.deliver(ONE, TWO, THREE)

    delivered = answer["worker"]["delivery"]
    assert (answer["images"], delivered["mode"], delivered["format"]) == ([], "bucket", "png")
    assert place.s3.keys(place.name) == ["job-1/1-42.png", "job-1/2-43.png", "job-1/3.png"]
    for url, data in zip(delivered["urls"], (ONE, TWO, THREE), strict=True):
        read = requests.get(url, timeout=10)
        assert (read.status_code, read.headers["content-type"], read.content) == (200, "image/png", data)
    unsigned = delivered["urls"][0].partition("?")[0]
    assert requests.get(unsigned, timeout=10).status_code == 403


def test_a_link_lives_as_long_as_it_says(s3: Storage, line: Line) -> None:
    place = Place(s3, line, s3.new_bucket(), link_seconds=1234)

    delivered = place.deliver(ONE)["worker"]["delivery"]

    signed = {name: value for name, (value,) in parse_qs(urlsplit(delivered["urls"][0]).query).items()}
    assert signed["X-Amz-Expires"] == "1234"
    ends = datetime.datetime.strptime(delivered["expires_at"], "%Y-%m-%dT%H:%M:%SZ")
    begins = datetime.datetime.strptime(signed["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
    early = datetime.timedelta(seconds=1234) - (ends - begins)
    assert datetime.timedelta(0) <= early <= datetime.timedelta(seconds=5)
    place.delivery.close()


def test_under_a_public_url_links_are_plain_and_live_for_ever(s3: Storage, line: Line) -> None:
    name = s3.new_bucket()
    s3.publish(name)
    place = Place(s3, line, name, public_url=f"{line.url}/{name}", prefix="a1111/prod")

    delivered = place.deliver(ONE, job_id="3fa85f64-e1")["worker"]["delivery"]

    assert delivered["urls"] == [f"{line.url}/{name}/a1111/prod/3fa85f64-e1/1-42.png"]
    assert delivered["expires_at"] is None
    assert requests.get(delivered["urls"][0], timeout=10).content == ONE
    place.delivery.close()


def test_keys_begin_with_the_prefix_and_hold_nothing_of_a_job_as_it_is(s3: Storage, line: Line) -> None:
    place = Place(s3, line, s3.new_bucket(), prefix="a/b")

    place.deliver(ONE, job_id="../x y/猫\n" + "z" * 100)

    (key,) = s3.keys(place.name)
    assert key == f"a/b/---x-y---{'z' * 51}/1-42.png"
    place.delivery.close()


def test_what_is_put_is_what_every_storage_understands(place: Place) -> None:
    place.deliver(ONE)

    (put,) = (asked for asked in place.line.asked if asked.method == "PUT")
    assert put.path == f"/{place.name}/job-1/1-42.png"  # the bucket in the path, not in the host
    assert put.body == ONE and put.headers["content-type"] == "image/png"
    assert not any(name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for name in put.headers)


def test_the_region_is_signed_for(s3: Storage, line: Line) -> None:
    place = Place(s3, line, s3.new_bucket(), region="eu-central-1")

    (url,) = place.deliver(ONE)["worker"]["delivery"]["urls"]

    (put,) = (asked for asked in line.asked if asked.method == "PUT")
    assert "/eu-central-1/s3/aws4_request" in put.headers["authorization"]
    assert "eu-central-1" in url
    place.delivery.close()


@pytest.mark.parametrize(
    ("endpoint", "link"),
    [
        ("https://s3.example.com", "https://s3.example.com/results/a/b.png?"),
        ("https://results.s3.example.com", "https://results.s3.example.com/a/b.png?"),  # the bucket is in the host
        ("https://s3.example.com:8443", "https://s3.example.com:8443/results/a/b.png?"),
    ],
)
def test_the_bucket_may_be_named_by_the_host(endpoint: str, link: str) -> None:
    bucket = Bucket(BucketSettings(endpoint, "results", KEY_ID, SECRET))

    assert bucket.link("a/b.png").startswith(link)

    bucket.close()


def test_a_converted_picture_is_labelled_as_what_it_is(place: Place) -> None:
    png = draw.encode(draw.picture("a lighthouse", 64, 64), "a lighthouse", "png")

    answer = place.deliver(png, png, options=OutputOptions(ImageFormat.JPEG, delivery=BUCKET))

    delivered = answer["worker"]["delivery"]
    assert delivered["format"] == "jpeg"
    assert place.s3.keys(place.name) == ["job-1/1-42.jpg", "job-1/2-43.jpg"]
    read = requests.get(delivered["urls"][0], timeout=10)
    assert read.headers["content-type"] == "image/jpeg" and read.content[:2] == b"\xff\xd8"


def test_what_is_too_large_for_the_platform_goes_to_the_bucket_by_itself(place: Place) -> None:
    large = random.Random(1).randbytes(RUN_LIMIT * 3 // 4)

    answer = place.deliver(large, options=OutputOptions())

    assert answer["images"] == [] and size_of(answer) < 2000 + LINK
    assert requests.get(answer["worker"]["delivery"]["urls"][0], timeout=10).content == large


def test_what_fits_stays_in_the_answer(place: Place) -> None:
    answer = place.deliver(ONE, options=OutputOptions())

    assert answer["worker"]["delivery"]["mode"] == "inline"
    assert place.line.asked == []


def test_a_large_file_goes_in_parts(place: Place) -> None:
    large = random.Random(2).randbytes(20_000_000)

    (url,) = place.deliver(large)["worker"]["delivery"]["urls"]

    assert sorted(asked.query["partNumber"] for asked in place.line.asked if asked.method == "PUT") == ["1", "2", "3"]
    read = requests.get(url, timeout=30)
    assert read.content == large and read.headers["content-type"] == "image/png"


# what happens to the first tries of the second picture, and how many there are then
PASSING = [
    (Fault(500, on="/2-", times=1), 2),
    (Fault(503, on="/2-", times=3), 4),
    (Fault(429, on="/2-", times=1), 2),
    (Fault("cut", on="/2-", times=2), 3),
    (Fault("lost", on="/2-", times=1), 2),  # it is there already: the same again
    (Fault("hold", on="/2-", times=1), 2),  # given up after the read timeout
]


@pytest.mark.parametrize(("fault", "tries"), PASSING)
def test_what_passes_is_tried_again(place: Place, fault: Fault, tries: int) -> None:
    place.line.faults = [Fault(fault.what, fault.method, fault.on, fault.times)]

    answer = place.deliver(ONE, TWO)

    assert place.line.puts().count("job-1/2-43.png") == tries
    assert place.line.puts().count("job-1/1-42.png") == 1
    assert [requests.get(url, timeout=10).content for url in answer["worker"]["delivery"]["urls"]] == [ONE, TWO]


# what happens to the second picture for ever, tries of it, and words of the error
LASTING = [
    (500, 4, "the bucket failed again and again (500 InternalError)"),
    (503, 4, "(503 SlowDown)"),
    ("cut", 4, "cannot be reached (ConnectionClosedError)"),
    ("lost", 4, "cannot be reached"),  # it is there, and nobody says so
    (403, 1, "refused the worker's key (AccessDenied)"),
    (501, 1, "(501 NotImplemented)"),
]


@pytest.mark.parametrize(("what", "tries", "words"), LASTING)
def test_a_half_failed_upload_leaves_nothing(place: Place, what: Any, tries: int, words: str) -> None:
    place.line.faults = [Fault(what, on="/2-")]

    with pytest.raises(DeliveryFailed) as caught:
        place.deliver(ONE, TWO, THREE)

    assert words in caught.value.message and caught.value.retryable
    assert place.line.puts().count("job-1/2-43.png") == tries
    assert {"job-1/1-42.png", "job-1/3.png"} <= set(place.line.puts())  # they were there
    assert place.is_empty


# what happens to the first tries to delete the two pictures that are there
HARD_TO_DELETE = [
    [Fault(503, "DELETE", times=3)],
    [Fault(500, "DELETE", times=1)],
    [Fault("cut", "DELETE", times=1)],
    [Fault("cut", "DELETE", "/1-", times=3), Fault("cut", "DELETE", "/3.", times=3)],  # each has its own tries
    [Fault("lost", "DELETE", times=1)],
    [Fault("hold", "DELETE", times=1)],  # given up after the read timeout
]


@pytest.mark.parametrize("faults", HARD_TO_DELETE)
def test_a_storage_that_fails_for_a_moment_is_asked_again_to_delete_what_is_there(
    place: Place, faults: list[Fault]
) -> None:
    place.line.faults = [Fault(403, on="/2-"), *map(replace, faults)]

    with pytest.raises(DeliveryFailed, match="AccessDenied"):
        place.deliver(ONE, TWO, THREE)

    assert place.is_empty


def test_nobody_waits_long_for_a_storage_that_does_not_delete(
    s3: Storage, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(s3, line, s3.new_bucket(), pauses=(3600.0,))
    line.faults = [Fault(403, on="/2-"), Fault(503, "DELETE")]

    with pytest.raises(DeliveryFailed, match="AccessDenied"):
        place.deliver(ONE, TWO, THREE)

    assert "up to 2 pictures are left in the bucket (SlowDown)" in caplog.text
    place.delivery.close()


@pytest.mark.parametrize("what", ["cut", "hold", 500])
def test_a_large_file_of_which_a_part_is_refused_is_ended_even_where_that_fails_at_first(
    place: Place, what: Any
) -> None:
    place.line.faults = [Fault(403, on="/2-"), Fault(what, "DELETE", on="/2-", times=1)]

    with pytest.raises(DeliveryFailed):
        place.deliver(ONE, bytes(20_000_000))

    assert place.is_empty


def test_a_large_file_of_which_a_part_fails_leaves_nothing(place: Place) -> None:
    place.line.faults = [Fault(503, on="/2-")]

    with pytest.raises(DeliveryFailed):
        place.deliver(ONE, bytes(20_000_000))

    assert place.is_empty


def test_a_storage_that_dies_in_the_middle_is_a_failed_delivery(s3: Storage) -> None:
    line = Line(s3.url)
    line.start()
    place = Place(s3, line, s3.new_bucket())
    line.faults = [Fault("hold", on="/2-")]
    errors: list[Exception] = []

    def deliver() -> None:
        try:
            place.deliver(ONE, TWO)
        except DeliveryFailed as error:
            errors.append(error)

    delivering = threading.Thread(target=deliver)
    delivering.start()
    assert line.holding.wait(10)
    line.stop()
    delivering.join(30)

    assert "the bucket cannot be reached" in str(errors[0])
    place.delivery.close()


def test_a_bucket_that_does_not_exist_is_said(s3: Storage, line: Line) -> None:
    place = Place(s3, line, "no-such-bucket")

    with pytest.raises(DeliveryFailed, match="there is no such bucket") as caught:
        place.deliver(ONE, TWO)

    assert "BUCKET_NAME" in (caught.value.hint or "")
    assert len(line.puts()) == 2 and not any(asked.method == "DELETE" for asked in line.asked)
    place.delivery.close()


def test_a_wrong_key_is_said_and_the_right_one_works(s3: Storage, line: Line) -> None:
    name = s3.new_bucket()
    with s3.checking_keys() as (key_id, secret):
        for wrong_id, wrong_secret in (("AKIANOBODY", secret), (key_id, "another")):
            place = Place(s3, line, name, access_key_id=wrong_id, secret_access_key=wrong_secret)
            with pytest.raises(DeliveryFailed, match="refused the worker's key") as caught:
                place.deliver(ONE)
            assert "BUCKET_ACCESS_KEY_ID" in (caught.value.hint or "")
            place.delivery.close()

        place = Place(s3, line, name, access_key_id=key_id, secret_access_key=secret)
        assert len(place.deliver(ONE)["worker"]["delivery"]["urls"]) == 1
        place.delivery.close()


def test_a_job_that_is_cancelled_while_it_uploads_ends_at_once_and_leaves_nothing(s3: Storage, line: Line) -> None:
    deadline = Deadline()
    line.faults = [Fault(503, on="/2-")]
    place = Place(s3, line, s3.new_bucket(), pauses=(3600.0,))

    def report(look: Progress) -> None:
        if look.facts.get("bytes") == look.facts.get("total"):
            deadline.cancel()

    with pytest.raises(JobCancelled):
        place.deliver(ONE, TWO, context=JobContext(deadline, report))

    assert place.is_empty
    place.delivery.close()


def test_a_cancelled_upload_begins_with_no_further_picture(place: Place) -> None:
    place.line.holding.clear()
    place.line.faults = [Fault("hold")]
    deadline = Deadline()
    ended: list[Exception] = []

    def deliver() -> None:
        try:
            place.deliver(*[ONE] * 16, context=JobContext(deadline))
        except JobCancelled as error:
            ended.append(error)

    delivering = threading.Thread(target=deliver)
    delivering.start()
    assert place.line.holding.wait(10)
    deadline.cancel()
    delivering.join(30)

    assert len(ended) == 1
    assert 0 < len(place.line.puts()) < 16  # those that were under way
    assert place.is_empty


def test_an_upload_that_outlives_the_jobs_time_ends_with_it_and_leaves_nothing(place: Place) -> None:
    place.line.faults = [Fault("hold", on="/2-")]

    place.delivery.prepare()  # the job's time is not to be over before there is a client

    with pytest.raises(JobTimeout):
        place.deliver(ONE, TWO, context=JobContext(Deadline(0.5)))

    assert place.is_empty


def test_the_upload_is_shown_as_it_goes(place: Place) -> None:
    looks: list[Progress] = []

    place.deliver(ONE, TWO, context=JobContext(Deadline(), looks.append))

    total = len(ONE) + len(TWO)
    assert {look.stage for look in looks} == {Stage.DELIVER}
    assert looks[-1].percent == 100.0 and looks[-1].facts == {"bytes": total, "total": total}


def test_jobs_deliver_side_by_side_with_one_client(place: Place) -> None:
    together = threading.Barrier(4)
    answers: list[dict[str, Any]] = []

    def deliver(number: int) -> None:
        together.wait(10)
        answers.append(place.deliver(ONE, TWO, job_id=f"job-{number}"))

    threads = [threading.Thread(target=deliver, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(answers) == 4
    assert sorted(place.s3.keys(place.name)) == [
        f"job-{n}/{name}" for n in range(4) for name in ("1-42.png", "2-43.png")
    ]


def test_nothing_secret_is_in_an_error_or_the_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="a1111_worker")
    (url,) = place.deliver(ONE)["worker"]["delivery"]["urls"]
    place.line.faults = [Fault(403, times=1), Fault(500, on="/1-"), Fault(403, "DELETE")]

    errors = []
    for _ in range(2):
        with pytest.raises(DeliveryFailed) as caught:
            place.deliver(ONE)
        errors.append(json.dumps(caught.value.answer()))

    assert "left in the bucket (AccessDenied)" in caplog.text
    assert "uploaded 1 pictures" in caplog.text and "1 in the bucket" in caplog.text
    for said in (*errors, caplog.text):
        for secret in (KEY_ID, SECRET, "X-Amz", "Signature", url.partition("?")[0], "Traceback"):
            assert secret not in said
