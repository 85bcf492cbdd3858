"""A real S3 server for the tests of delivery, and buckets in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.buckets import FaultyProxy, S3Server, s3_server
from tests.delivery.support import BucketUnderTest


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.url) as server:
        yield server


@pytest.fixture(scope="module")
def shared_bucket(s3: S3Server) -> Iterator[BucketUnderTest]:
    with FaultyProxy(s3.url) as proxy:
        bucket = BucketUnderTest(s3, proxy, s3.new_bucket())
        yield bucket
        bucket.delivery.close()


@pytest.fixture
def bucket(shared_bucket: BucketUnderTest) -> BucketUnderTest:
    """A bucket as if it were new: building the client anew for each test would take longer than the tests."""
    shared_bucket.proxy.faults.clear()
    shared_bucket.proxy.asked.clear()
    for key in shared_bucket.s3.keys(shared_bucket.name):
        shared_bucket.s3.s3.delete_object(Bucket=shared_bucket.name, Key=key)
    return shared_bucket
