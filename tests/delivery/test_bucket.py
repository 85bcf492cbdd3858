"""A bucket for results, against a real S3 server behind a proxy that fails on request."""

from __future__ import annotations

import datetime
import json
import logging
import random
import threading
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.bucket import Bucket, BucketTimings
from a1111_worker.delivery.deliver import Delivery
from a1111_worker.domain import BucketSettings, DeliveryMode, ImageFormat, OutputOptions, Progress, Stage
from a1111_worker.errors import ConfigError, DeliveryFailed, JobCancelled, JobTimeout
from sandbox import draw
from tests.buckets import KEY_ID, SECRET, FaultyProxy, S3Fault, S3Server
from tests.delivery.support import ONE, THREE, TWO, BucketUnderTest

LONG_PAUSES = BucketTimings(tries=2, shortest_pause=3600.0, longest_pause=3600.0, connect=2.0, read=2.0)


def test_images_are_in_the_bucket_and_anyone_can_read_their_links(bucket: BucketUnderTest) -> None:
    answer = bucket.deliver(ONE, TWO, THREE)

    delivered = answer["worker"]["delivery"]
    assert (answer["images"], delivered["mode"], delivered["format"]) == ([], "bucket", "png")
    assert bucket.s3.keys(bucket.name) == ["job-1/1-42.png", "job-1/2-43.png", "job-1/3.png"]
    for url, data in zip(delivered["urls"], (ONE, TWO, THREE), strict=True):
        read = requests.get(url, timeout=10)
        assert (read.status_code, read.headers["content-type"], read.content) == (200, "image/png", data)
    unsigned = delivered["urls"][0].partition("?")[0]
    assert requests.get(unsigned, timeout=10).status_code == 403


def test_a_link_is_valid_as_long_as_the_answer_says(s3: S3Server, proxy: FaultyProxy) -> None:
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket(), link_seconds=1234)

    delivered = bucket.deliver(ONE)["worker"]["delivery"]

    signed = {name: value for name, (value,) in parse_qs(urlsplit(delivered["urls"][0]).query).items()}
    assert signed["X-Amz-Expires"] == "1234"
    ends = datetime.datetime.strptime(delivered["expires_at"], "%Y-%m-%dT%H:%M:%SZ")
    begins = datetime.datetime.strptime(signed["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
    early = datetime.timedelta(seconds=1234) - (ends - begins)
    assert datetime.timedelta(0) <= early <= datetime.timedelta(seconds=5)
    bucket.delivery.close()


def test_links_under_a_public_url_are_plain_and_valid_for_ever(s3: S3Server, proxy: FaultyProxy) -> None:
    name = s3.new_bucket()
    s3.publish(name)
    bucket = BucketUnderTest(s3, proxy, name, public_url=f"{proxy.url}/{name}", prefix="a1111/prod")

    delivered = bucket.deliver(ONE, job_id="3fa85f64-e1")["worker"]["delivery"]

    assert delivered["urls"] == [f"{proxy.url}/{name}/a1111/prod/3fa85f64-e1/1-42.png"]
    assert delivered["expires_at"] is None
    assert requests.get(delivered["urls"][0], timeout=10).content == ONE
    bucket.delivery.close()


def test_keys_begin_with_the_prefix_and_contain_only_safe_characters_of_the_job_id(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket(), prefix="a/b")

    bucket.deliver(ONE, job_id="../x y/猫\n" + "z" * 100)

    (key,) = s3.keys(bucket.name)
    assert key == f"a/b/---x-y---{'z' * 51}/1-42.png"
    bucket.delivery.close()


def test_an_upload_is_a_request_that_every_storage_understands(bucket: BucketUnderTest) -> None:
    bucket.deliver(ONE)

    (put,) = (asked for asked in bucket.proxy.asked if asked.method == "PUT")
    assert put.path == f"/{bucket.name}/job-1/1-42.png"  # the bucket in the path, not in the host
    assert put.body == ONE and put.headers["content-type"] == "image/png"
    assert not any(name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for name in put.headers)


def test_the_region_is_signed_for(s3: S3Server, proxy: FaultyProxy) -> None:
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket(), region="eu-central-1")

    (url,) = bucket.deliver(ONE)["worker"]["delivery"]["urls"]

    (put,) = (asked for asked in proxy.asked if asked.method == "PUT")
    assert "/eu-central-1/s3/aws4_request" in put.headers["authorization"]
    assert "eu-central-1" in url
    bucket.delivery.close()


# endpoint, bucket, and how a link begins
ENDPOINTS = [
    ("https://s3.example.com", "results", "https://s3.example.com/results/a/b.png?"),
    (
        "https://results.s3.example.com",
        "results",
        "https://results.s3.example.com/a/b.png?",
    ),  # the host names the bucket
    ("https://s3.example.com:8443", "results", "https://s3.example.com:8443/results/a/b.png?"),
    ("https://my_bucket.s3.example.com", "my_bucket", "https://s3.example.com/my_bucket/a/b.png?"),  # `_` is in no host
]


@pytest.mark.parametrize(("endpoint", "name", "link"), ENDPOINTS)
def test_the_endpoints_host_may_name_the_bucket(endpoint: str, name: str, link: str) -> None:
    bucket = Bucket(BucketSettings(endpoint, name, KEY_ID, SECRET))

    bucket.prepare()

    assert bucket.link("a/b.png").startswith(link)
    bucket.close()


# settings that boto3 refuses, and how the error begins
UNUSABLE = [
    ({"endpoint_url": "https://my_bucket.example.com"}, "BUCKET_ENDPOINT_URL='https://my_bucket.example.com': takes "),
    ({"endpoint_url": "https://-a.example.com"}, "BUCKET_ENDPOINT_URL='https://-a.example.com': takes "),
    ({"endpoint_url": f"https://{'a' * 64}.example.com"}, "BUCKET_ENDPOINT_URL='https://aaa"),
    ({"endpoint_url": "https://results."}, "BUCKET_ENDPOINT_URL='https://results.': takes "),  # the bucket's name alone
    ({"region": "eu-"}, "BUCKET_REGION='eu-': takes "),
    ({"region": "-eu"}, "BUCKET_REGION='-eu': takes "),
    ({"region": "1"}, "BUCKET_REGION='1': takes "),
]


@pytest.mark.parametrize(("settings", "begins"), UNUSABLE)
def test_a_setting_that_can_never_work_is_named_with_its_value(settings: dict[str, str], begins: str) -> None:
    given: dict[str, Any] = {
        "endpoint_url": "https://s3.example.com",
        "access_key_id": KEY_ID,
        "secret_access_key": SECRET,
        **settings,
    }
    delivery = Delivery(Bucket(BucketSettings(name="results", **given)))

    with pytest.raises(ConfigError) as caught:
        delivery.prepare()

    assert str(caught.value).startswith(begins)
    assert SECRET not in str(caught.value) and KEY_ID not in str(caught.value)
    delivery.close()


@pytest.mark.parametrize("region", ["us-east-1", "auto", "eu-central-1", "EU1"])
def test_every_region_that_boto3_takes_can_be_used(region: str) -> None:
    bucket = Bucket(BucketSettings("https://s3.example.com", "results", KEY_ID, SECRET, region=region))

    bucket.prepare()

    bucket.close()


def test_a_converted_image_has_its_own_extension_and_content_type(bucket: BucketUnderTest) -> None:
    png = draw.encode(draw.picture("a lighthouse", 64, 64), "a lighthouse", "png")

    answer = bucket.deliver(png, png, options=OutputOptions(ImageFormat.JPEG, delivery=DeliveryMode.BUCKET))

    delivered = answer["worker"]["delivery"]
    assert delivered["format"] == "jpeg"
    assert bucket.s3.keys(bucket.name) == ["job-1/1-42.jpg", "job-1/2-43.jpg"]
    read = requests.get(delivered["urls"][0], timeout=10)
    assert read.headers["content-type"] == "image/jpeg" and read.content[:2] == b"\xff\xd8"


def test_a_large_file_is_sent_in_parts(bucket: BucketUnderTest) -> None:
    large = random.Random(2).randbytes(20_000_000)

    (url,) = bucket.deliver(large)["worker"]["delivery"]["urls"]

    assert sorted(asked.query["partNumber"] for asked in bucket.proxy.asked if asked.method == "PUT") == ["1", "2", "3"]
    read = requests.get(url, timeout=30)
    assert read.content == large and read.headers["content-type"] == "image/png"


# what happens to the first tries of the second image, and how many tries there are then
TEMPORARY = [
    (S3Fault(500, on="/2-", times=1), 2),
    (S3Fault(503, on="/2-", times=3), 4),
    (S3Fault(429, on="/2-", times=1), 2),
    (S3Fault("cut", on="/2-", times=2), 3),
    (S3Fault("lost", on="/2-", times=1), 2),  # it is stored already, and is stored again
    (S3Fault("hold", on="/2-", times=1), 2),  # given up after the read timeout
]


@pytest.mark.parametrize(("fault", "tries"), TEMPORARY)
def test_an_upload_that_fails_for_a_moment_is_tried_again(bucket: BucketUnderTest, fault: S3Fault, tries: int) -> None:
    bucket.proxy.faults = [S3Fault(fault.what, fault.method, fault.on, fault.times)]

    answer = bucket.deliver(ONE, TWO)

    assert bucket.proxy.puts().count("job-1/2-43.png") == tries
    assert bucket.proxy.puts().count("job-1/1-42.png") == 1
    assert [requests.get(url, timeout=10).content for url in answer["worker"]["delivery"]["urls"]] == [ONE, TWO]


# what happens to every try of the second image, how many tries there are, and words of the error
LASTING = [
    (500, 4, "the bucket failed at every try (500 InternalError)"),
    (503, 4, "(503 SlowDown)"),
    ("cut", 4, "cannot be reached (ConnectionClosedError)"),
    ("lost", 4, "cannot be reached"),  # the file is stored, and its answer never comes
    (403, 1, "refused the worker's key (AccessDenied)"),
    (501, 1, "(501 NotImplemented)"),
]


@pytest.mark.parametrize(("what", "tries", "words"), LASTING)
def test_a_half_failed_upload_leaves_nothing(bucket: BucketUnderTest, what: Any, tries: int, words: str) -> None:
    bucket.proxy.faults = [S3Fault(what, on="/2-")]

    with pytest.raises(DeliveryFailed) as caught:
        bucket.deliver(ONE, TWO, THREE)

    assert words in caught.value.message and caught.value.retryable
    assert bucket.proxy.puts().count("job-1/2-43.png") == tries
    assert {"job-1/1-42.png", "job-1/3.png"} <= set(bucket.proxy.puts())  # they were there
    assert bucket.is_empty


# what happens to the first tries to delete the two images that are stored
HARD_TO_DELETE = [
    [S3Fault(503, "DELETE", times=3)],
    [S3Fault(500, "DELETE", times=1)],
    [S3Fault("cut", "DELETE", times=1)],
    [S3Fault("cut", "DELETE", "/1-", times=3), S3Fault("cut", "DELETE", "/3.", times=3)],  # each has its own tries
    [S3Fault("lost", "DELETE", times=1)],
    [S3Fault("hold", "DELETE", times=1)],  # given up after the read timeout
]


@pytest.mark.parametrize("faults", HARD_TO_DELETE)
def test_a_deletion_that_fails_for_a_moment_is_tried_again(bucket: BucketUnderTest, faults: list[S3Fault]) -> None:
    bucket.proxy.faults = [S3Fault(403, on="/2-"), *map(replace, faults)]

    with pytest.raises(DeliveryFailed, match="AccessDenied"):
        bucket.deliver(ONE, TWO, THREE)

    assert bucket.is_empty


def test_a_job_does_not_wait_long_for_a_storage_that_does_not_delete(
    s3: S3Server, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket(), LONG_PAUSES)
    proxy.faults = [S3Fault(403, on="/2-"), S3Fault(503, "DELETE")]

    with pytest.raises(DeliveryFailed, match="AccessDenied"):
        bucket.deliver(ONE, TWO, THREE)

    assert "up to 2 pictures are left in the bucket (SlowDown)" in caplog.text
    bucket.delivery.close()


@pytest.mark.parametrize("what", ["cut", "hold", 500])
def test_a_multipart_upload_that_is_refused_is_aborted_even_if_that_fails_at_first(
    bucket: BucketUnderTest, what: Any
) -> None:
    bucket.proxy.faults = [S3Fault(403, on="/2-"), S3Fault(what, "DELETE", on="/2-", times=1)]

    with pytest.raises(DeliveryFailed):
        bucket.deliver(ONE, bytes(20_000_000))

    assert bucket.is_empty


def test_a_multipart_upload_that_fails_leaves_nothing(bucket: BucketUnderTest) -> None:
    bucket.proxy.faults = [S3Fault(503, on="/2-")]

    with pytest.raises(DeliveryFailed):
        bucket.deliver(ONE, bytes(20_000_000))

    assert bucket.is_empty


def test_a_storage_that_dies_during_an_upload_is_a_failed_delivery(s3: S3Server) -> None:
    proxy = FaultyProxy(s3.url)
    proxy.start()
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket())
    proxy.faults = [S3Fault("hold", on="/2-")]
    errors: list[Exception] = []

    def deliver() -> None:
        try:
            bucket.deliver(ONE, TWO)
        except DeliveryFailed as error:
            errors.append(error)

    delivering = threading.Thread(target=deliver)
    delivering.start()
    assert proxy.holding.wait(10)
    proxy.stop()
    delivering.join(30)

    assert "the bucket cannot be reached" in str(errors[0])
    bucket.delivery.close()


def test_a_bucket_that_does_not_exist_is_an_error_that_names_the_setting(s3: S3Server, proxy: FaultyProxy) -> None:
    bucket = BucketUnderTest(s3, proxy, "no-such-bucket")

    with pytest.raises(DeliveryFailed, match="there is no such bucket") as caught:
        bucket.deliver(ONE, TWO)

    assert "BUCKET_NAME" in (caught.value.hint or "")
    assert len(proxy.puts()) == 2 and not any(asked.method == "DELETE" for asked in proxy.asked)
    bucket.delivery.close()


def test_a_wrong_key_is_an_error_that_names_its_settings_and_the_right_key_works(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    name = s3.new_bucket()
    with s3.checking_keys() as (key_id, secret):
        for wrong_id, wrong_secret in (("AKIANOBODY", secret), (key_id, "another")):
            bucket = BucketUnderTest(s3, proxy, name, access_key_id=wrong_id, secret_access_key=wrong_secret)
            with pytest.raises(DeliveryFailed, match="refused the worker's key") as caught:
                bucket.deliver(ONE)
            assert "BUCKET_ACCESS_KEY_ID" in (caught.value.hint or "")
            bucket.delivery.close()

        bucket = BucketUnderTest(s3, proxy, name, access_key_id=key_id, secret_access_key=secret)
        assert len(bucket.deliver(ONE)["worker"]["delivery"]["urls"]) == 1
        bucket.delivery.close()


def test_a_job_that_is_cancelled_during_its_upload_ends_at_once_and_leaves_nothing(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    deadline = Deadline()
    proxy.faults = [S3Fault(503, on="/2-")]
    bucket = BucketUnderTest(s3, proxy, s3.new_bucket(), LONG_PAUSES)

    def report(progress: Progress) -> None:
        if progress.facts.get("bytes") == progress.facts.get("total"):
            deadline.cancel()

    with pytest.raises(JobCancelled):
        bucket.deliver(ONE, TWO, context=JobContext(deadline, report))

    assert bucket.is_empty
    bucket.delivery.close()


def test_a_cancelled_upload_begins_no_further_image(bucket: BucketUnderTest) -> None:
    bucket.proxy.holding.clear()
    bucket.proxy.faults = [S3Fault("hold")]
    deadline = Deadline()
    ended: list[Exception] = []

    def deliver() -> None:
        try:
            bucket.deliver(*[ONE] * 16, context=JobContext(deadline))
        except JobCancelled as error:
            ended.append(error)

    delivering = threading.Thread(target=deliver)
    delivering.start()
    assert bucket.proxy.holding.wait(10)
    deadline.cancel()
    delivering.join(30)

    assert len(ended) == 1
    assert 0 < len(bucket.proxy.puts()) < 16  # the uploads that had begun
    assert bucket.is_empty


def test_an_upload_ends_when_the_jobs_time_is_up_and_leaves_nothing(bucket: BucketUnderTest) -> None:
    bucket.proxy.faults = [S3Fault("hold", on="/2-")]

    bucket.delivery.prepare()  # otherwise the job's time could be up before there is a client

    with pytest.raises(JobTimeout):
        bucket.deliver(ONE, TWO, context=JobContext(Deadline(0.5)))

    assert bucket.is_empty


def test_the_upload_reports_its_progress(bucket: BucketUnderTest) -> None:
    reported: list[Progress] = []

    bucket.deliver(ONE, TWO, context=JobContext(report=reported.append))

    total = len(ONE) + len(TWO)
    assert {progress.stage for progress in reported} == {Stage.DELIVER}
    assert reported[-1].percent == 100.0 and reported[-1].facts == {"bytes": total, "total": total}


def test_progress_counts_an_image_that_is_sent_again_only_once(bucket: BucketUnderTest) -> None:
    bucket.proxy.faults = [S3Fault(503, on="/2-", times=2)]
    reported: list[Progress] = []

    bucket.deliver(ONE, TWO, context=JobContext(report=reported.append))

    assert reported[-1].facts["bytes"] == len(ONE) + len(TWO)
    assert max(progress.facts["bytes"] for progress in reported) == len(ONE) + len(TWO)


def test_jobs_deliver_side_by_side_with_one_client(bucket: BucketUnderTest) -> None:
    together = threading.Barrier(4)
    answers: list[dict[str, Any]] = []

    def deliver(number: int) -> None:
        together.wait(10)
        answers.append(bucket.deliver(ONE, TWO, job_id=f"job-{number}"))

    threads = [threading.Thread(target=deliver, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(answers) == 4
    assert sorted(bucket.s3.keys(bucket.name)) == [
        f"job-{n}/{name}" for n in range(4) for name in ("1-42.png", "2-43.png")
    ]


def test_nothing_secret_is_in_an_error_or_the_log(bucket: BucketUnderTest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="a1111_worker")
    (url,) = bucket.deliver(ONE)["worker"]["delivery"]["urls"]
    bucket.proxy.faults = [S3Fault(403, times=1), S3Fault(500, on="/1-"), S3Fault(403, "DELETE")]

    errors = []
    for _ in range(2):
        with pytest.raises(DeliveryFailed) as caught:
            bucket.deliver(ONE)
        errors.append(json.dumps(caught.value.answer()))

    assert "left in the bucket (AccessDenied)" in caplog.text
    assert "uploaded 1 pictures" in caplog.text and "1 in the bucket" in caplog.text
    for text in (*errors, caplog.text):
        for secret in (KEY_ID, SECRET, "X-Amz", "Signature", url.partition("?")[0], "Traceback"):
            assert secret not in text
