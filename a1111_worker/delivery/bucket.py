"""An S3-compatible bucket for results. It gets all images of a job or none:

    <prefix>/<job id>/<number>-<seed>.<png, jpg or webp>

boto3 is imported by `prepare`, or when the first image is delivered.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.answer import Delivered
from a1111_worker.delivery.formats import decode_image, image_file_name, job_slug
from a1111_worker.domain import BucketSettings, Progress, Stage
from a1111_worker.errors import ConfigError, DeliveryFailed
from a1111_worker.retry import Backoff

log = logging.getLogger(__name__)

MIB = 1 << 20
MULTIPART_FROM = 8 * MIB  # a file of so many bytes is sent in parts

TEMPORARY_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ServiceUnavailable")


class BucketFile(NamedTuple):
    """A file for the bucket, and its key there."""

    key: str
    data: bytes
    content_type: str


@dataclass(frozen=True)
class BucketTimings:
    """Every limit of the policy, in seconds, and `tries`: how often one request is sent at most.

    `connect` and `read` are the storage's silence that counts as a failure; a deletion waits `read_deletion` at most.
    `cleanup`: a failed job's files are deleted for so long; no try begins after that.
    """

    tries: int = 4
    shortest_pause: float = 0.5
    longest_pause: float = 4.0
    connect: float = 5.0
    read: float = 20.0
    read_deletion: float = 5.0
    cleanup: float = 20.0

    def backoff(self) -> Backoff:
        return Backoff(self.shortest_pause, self.longest_pause)


class Bucket:
    """One bucket, and one client for it. Thread-safe."""

    def __init__(self, settings: BucketSettings, timings: BucketTimings | None = None) -> None:
        self._settings = settings
        self._timings = timings or BucketTimings()
        self._building = threading.Lock()

    def prepare(self) -> None:
        """Import boto3 and build the client: half a second, once.

        Raises ConfigError for a setting that can never work. Raises DeliveryFailed if the client cannot be built for
        any other reason; the next call tries again.
        """
        with self._building:
            try:
                _ = self._transfers
            except ConfigError:
                raise
            except Exception as error:  # botocore's, of what it reads from the environment and from files
                raise DeliveryFailed(
                    f"the client for the bucket cannot be built ({type(error).__name__})",
                    hint="the operator must read the worker's log, and check the variables AWS_…",
                ) from error

    def close(self) -> None:
        with self._building:
            if "_transfers" in self.__dict__:
                self._transfers.shutdown()
                self._client.close()
            if "_cleanup_client" in self.__dict__:
                self._cleanup_client.close()

    def deliver(self, seeds: Sequence[int | None], inline: Delivered, context: JobContext) -> Delivered:
        """The same images as links. Raises DeliveryFailed, JobTimeout or JobCancelled; then none of them is there."""
        folder = "/".join(part for part in (self._settings.prefix, job_slug(context.job_id)) if part)
        files = [
            BucketFile(
                f"{folder}/{image_file_name(number, seeds, inline.format)}",
                decode_image(image),
                f"image/{inline.format.value}",
            )
            for number, image in enumerate(inline.images, start=1)
        ]
        self.put(files, context)
        signed_at = time.time()
        urls = [self.link(file.key) for file in files]
        return Delivered((), inline.format, urls, self._expiry(signed_at))

    def put(self, files: Sequence[BucketFile], context: JobContext) -> None:
        """Upload all files, or leave none there. Raises what `deliver` raises."""
        self.prepare()
        began, size = time.monotonic(), sum(len(file.data) for file in files)
        log.info("uploading %d pictures, %.1f MB", len(files), size / 1e6)
        upload = _Upload(self._transfers, self._settings.name, context, size)
        try:
            self._upload_all(files, upload, context.deadline)
        except BaseException:
            self._clean_up(upload)
            raise
        log.info("uploaded %d pictures in %.2f s", len(files), time.monotonic() - began)

    def link(self, key: str) -> str:
        """The URL where anyone can read a key: signed and for a limited time, or under the public URL for ever."""
        if self._settings.public_url is not None:
            return f"{self._settings.public_url}/{quote(key)}"
        params = {"Bucket": self._settings.name, "Key": key}
        url: str = self._client.generate_presigned_url("get_object", params, ExpiresIn=self._settings.link_seconds)
        return url

    def _expiry(self, signed_at: float) -> str | None:
        if self._settings.public_url is not None:
            return None
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(signed_at) + self._settings.link_seconds))

    def _upload_all(self, files: Sequence[BucketFile], upload: _Upload, deadline: Deadline) -> None:
        """Upload, and upload again what failed, as long as that can help."""
        missing, backoff = list(files), self._timings.backoff()
        for tries_left in reversed(range(self._timings.tries)):
            failures = upload.send(missing)
            deadline.check()
            if not failures:
                return
            lasting = next((error for error in failures.values() if not _is_temporary(error)), None)
            if lasting is not None or not tries_left:
                error = lasting or next(iter(failures.values()))
                raise _delivery_failed(error) from error
            missing, pause = list(failures), backoff.next_pause()
            log.warning("%d of %d pictures did not arrive; trying again in %.1f s", len(missing), len(files), pause)
            deadline.wait(pause)

    def _clean_up(self, upload: _Upload) -> None:
        """Leave nothing of a failed job there. The job's time may be over, so this has a limit of its own."""
        from botocore.exceptions import BotoCoreError, ClientError

        until = time.monotonic() + self._timings.cleanup
        left = [(self._delete, key) for key in upload.maybe_stored]
        left += [(self._abort_multipart, key) for key in upload.maybe_unfinished]
        while left:
            remove, key = left[0]
            try:
                self._retry(partial(remove, key), until)
            except (BotoCoreError, ClientError) as error:
                count = len({key for _, key in left})
                log.warning("up to %d pictures are left in the bucket (%s)", count, _error_code(error))
                return
            del left[0]

    def _retry(self, request: Callable[[], None], until: float) -> None:
        """Send a request, and send it again after a failure that may be temporary. No try begins after `until`."""
        from botocore.exceptions import BotoCoreError, ClientError

        backoff = self._timings.backoff()
        for tries_left in reversed(range(self._timings.tries)):
            try:
                request()
                return
            except (BotoCoreError, ClientError) as error:
                pause = backoff.next_pause()
                if not tries_left or not _is_temporary(error) or time.monotonic() + pause > until:
                    raise
            time.sleep(pause)

    def _delete(self, key: str) -> None:
        self._open_cleanup_client().delete_object(Bucket=self._settings.name, Key=key)

    def _abort_multipart(self, key: str) -> None:
        """Abort a multipart upload that was neither completed nor aborted: it would cost money for ever."""
        client, bucket = self._open_cleanup_client(), self._settings.name
        for found in client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", []):
            client.abort_multipart_upload(Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])

    def _open_cleanup_client(self) -> Any:
        with self._building:
            return self._cleanup_client

    @cached_property
    def _client(self) -> Any:
        return self._new_client(self._timings.read)

    @cached_property
    def _cleanup_client(self) -> Any:
        """A second client, for requests without an image: a shorter silence counts as a failure."""
        return self._new_client(min(self._timings.read, self._timings.read_deletion))

    def _new_client(self, read_timeout: float) -> Any:
        """A client for the bucket. boto3 itself decides which endpoints and regions can be used."""
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import InvalidRegionError

        settings = self._settings
        endpoint = urlsplit(settings.endpoint_url)
        bucket_host = f"{settings.name}."  # https://BUCKET.host: the bucket is named by the host and not by the path
        is_virtual = endpoint.netloc.startswith(bucket_host)
        session: Any = Session(settings.access_key_id, settings.secret_access_key, region_name=settings.region)
        try:
            return session.client(
                "s3",
                endpoint_url=f"{endpoint.scheme}://{endpoint.netloc.removeprefix(bucket_host)}",
                config=Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "virtual" if is_virtual else "path"},
                    # This module tries again by itself, within the deadline.
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    # Storages other than Amazon's refuse the checksums that boto3 has added on its own since 1.36.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    connect_timeout=self._timings.connect,
                    read_timeout=read_timeout,
                ),
            )
        except InvalidRegionError as error:
            raise ConfigError(
                f"BUCKET_REGION={settings.region!r}: takes a region such as eu-central-1: "
                "letters, digits and `-`, no `-` at either end, and not digits alone"
            ) from error
        except ValueError as error:
            if not str(error).startswith("Invalid endpoint"):
                raise
            raise ConfigError(
                f"BUCKET_ENDPOINT_URL={settings.endpoint_url!r}: takes an origin whose host is a name of "
                "letters, digits, `-` and `.`, or an address"
            ) from error

    @cached_property
    def _transfers(self) -> Any:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=MULTIPART_FROM,
            multipart_chunksize=8 * MIB,
            max_concurrency=8,
            preferred_transfer_client="classic",
        )
        return create_transfer_manager(self._client, config)


class _Upload:
    """One job's files on their way: what was tried, what may be stored, and the progress."""

    def __init__(self, transfers: Any, bucket: str, context: JobContext, size: int) -> None:
        self._transfers = transfers
        self._bucket = bucket
        self._context = context
        self._size = size
        self._sent: dict[str, int] = {}  # bytes, by key
        self._counting = threading.Lock()
        self._refused: set[str] = set()
        self._tried: dict[str, BucketFile] = {}

    @property
    def maybe_stored(self) -> list[str]:
        """Keys that were sent and not refused: if an answer was lost, the file may be there."""
        return [key for key in self._tried if key not in self._refused]

    @property
    def maybe_unfinished(self) -> list[str]:
        """Keys that were sent in parts. s3transfer aborts a multipart upload that failed, and that may fail too."""
        return [key for key, file in self._tried.items() if len(file.data) >= MULTIPART_FROM]

    def send(self, files: Sequence[BucketFile]) -> dict[BucketFile, Exception]:
        """Upload files side by side; returns those that failed, and why. Ends early if the job's time does."""
        failures: dict[BucketFile, Exception] = {}
        transfers: list[Any] = []

        def cancel_all() -> None:
            for transfer in transfers:
                transfer.cancel()

        for file in files:
            self._tried[file.key], self._sent[file.key] = file, 0
            headers = {"ContentType": file.content_type}
            transfers.append(self._transfers.upload(io.BytesIO(file.data), self._bucket, file.key, headers, [self]))
        with self._context.deadline.on_end(cancel_all):
            for file, transfer in zip(files, transfers, strict=True):
                try:
                    transfer.result()
                except Exception as error:  # botocore's, s3transfer's, and those that pass through them
                    failures[file] = error
                    if _is_refusal(error):
                        self._refused.add(file.key)
        return failures

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        """s3transfer calls this from its threads. The number is negative if bytes have to be sent again."""
        with self._counting:
            self._sent[future.meta.call_args.key] += bytes_transferred
            sent = sum(self._sent.values())
        percent = min(100.0, 100 * sent / max(1, self._size))
        facts = {"bytes": sent, "total": self._size}
        self._context.report(Progress(Stage.DELIVER, round(percent, 1), "uploads the pictures", facts=facts))


def _is_temporary(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, SSLError

    if isinstance(error, ClientError):
        return not _is_refusal(error)
    return isinstance(error, ConnectionError | HTTPClientError) and not isinstance(error, SSLError)


def _is_refusal(error: Exception) -> bool:
    """Whether the storage refused the request for good, so that nothing of it is stored."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError) or _error_code(error) in TEMPORARY_CODES:
        return False
    status = _error_status(error)
    return status in (0, 501) or (status < 500 and status not in (408, 429))


def _delivery_failed(error: Exception) -> DeliveryFailed:
    """The error for the caller: with the storage's own code, never with its message, which may repeat a key."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return DeliveryFailed(
            f"the bucket cannot be reached ({_error_code(error)})",
            hint="try again; if it fails again, the operator must check BUCKET_ENDPOINT_URL",
        )
    code, status = _error_code(error), _error_status(error)
    if code == "NoSuchBucket" or status == 404:
        return DeliveryFailed(
            f"there is no such bucket ({code})", hint="the operator must check BUCKET_NAME and BUCKET_ENDPOINT_URL"
        )
    if status in (401, 403):
        return DeliveryFailed(
            f"the bucket refused the worker's key ({code})",
            hint="the operator must check BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, and what that key may do",
        )
    if status < 500:
        return DeliveryFailed(
            f"the bucket refused the pictures ({status} {code})", hint="the operator must check BUCKET_REGION"
        )
    return DeliveryFailed(f"the bucket failed at every try ({status} {code})", hint="try again")


def _error_status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _error_code(error: Any) -> str:
    """The storage's code for a failure, or the class of an error of our side: letters and digits."""
    from botocore.exceptions import ClientError

    is_from_storage = isinstance(error, ClientError)
    code = error.response.get("Error", {}).get("Code", "") if is_from_storage else type(error).__name__
    return re.sub(r"[^A-Za-z0-9]", "", str(code))[:60] or "no code"
