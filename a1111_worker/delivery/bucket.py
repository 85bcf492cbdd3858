"""An S3-compatible bucket for results. It gets all images of a job or none:

    <prefix>/<job id>/<number>-<seed>.<png, jpg or webp>

boto3 is imported when the first image goes there, or by `prepare`.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.answer import Delivered
from a1111_worker.delivery.formats import decode_image, image_file_name, job_slug
from a1111_worker.domain import BucketSettings, Progress, Stage
from a1111_worker.errors import DeliveryFailed

log = logging.getLogger(__name__)

MIB = 1 << 20


PARTS_FROM = 8 * MIB  # a file of so many bytes is sent in parts


class File(NamedTuple):
    """What is to lie in the bucket under a key."""

    key: str
    data: bytes
    content_type: str


class Bucket:
    """One bucket, and one client for it. Thread-safe; the waiting is all in the arguments, in seconds."""

    def __init__(
        self,
        settings: BucketSettings,
        *,
        pauses: Sequence[float] = (0.5, 1.5, 4.0),
        connect_timeout: float = 5.0,
        read_timeout: float = 20.0,
        undo_limit: float = 20.0,
    ) -> None:
        self._settings = settings
        self._pauses = pauses  # between the tries of what may pass
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._undo_limit = undo_limit  # no try to take pictures back begins after that
        self._opening = threading.Lock()

    def prepare(self) -> None:
        """Import boto3 and build the client: half a second, once."""
        with self._opening:
            _ = self._transfers

    def close(self) -> None:
        with self._opening:
            if "_transfers" in self.__dict__:
                self._transfers.shutdown()
                self._client.close()
            if "_undoing" in self.__dict__:
                self._undoing.close()

    def deliver(self, seeds: Sequence[int], inline: Delivered, context: JobContext) -> Delivered:
        """The same pictures, there; or DeliveryFailed, JobTimeout, JobCancelled, and none of them there."""
        folder = "/".join(part for part in (self._settings.prefix, job_slug(context.job_id)) if part)
        files = [
            File(
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

    def put(self, files: Sequence[File], context: JobContext) -> None:
        """Upload all of them, or leave nothing there."""
        self.prepare()
        began, size = time.monotonic(), sum(len(file.data) for file in files)
        log.info("uploading %d pictures, %.1f MB", len(files), size / 1e6)
        upload = _Upload(self._transfers, self._settings.name, context, size)
        try:
            self._put(files, upload, context.deadline)
        except BaseException:
            self._take_back(upload)
            raise
        log.info("uploaded %d pictures in %.2f s", len(files), time.monotonic() - began)

    def link(self, key: str) -> str:
        """Where anyone may read a key: signed for a while, or under the public URL for ever."""
        if self._settings.public_url is not None:
            return f"{self._settings.public_url}/{quote(key)}"
        where = {"Bucket": self._settings.name, "Key": key}
        url: str = self._client.generate_presigned_url("get_object", where, ExpiresIn=self._settings.link_seconds)
        return url

    def _expiry(self, signed_at: float) -> str | None:
        if self._settings.public_url is not None:
            return None
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(signed_at) + self._settings.link_seconds))

    def _put(self, files: Sequence[File], upload: _Upload, deadline: Deadline) -> None:
        """Try, and try again what did not arrive, as long as that may help."""
        missing = list(files)
        for pause in (*self._pauses, None):
            failures = upload.send(missing)
            deadline.check()
            if not failures:
                return
            fatal = next((error for error in failures.values() if not _may_pass(error)), None)
            if fatal is not None or pause is None:
                error = fatal or next(iter(failures.values()))
                raise _delivery_failed(error) from error
            missing = list(failures)
            log.warning("%d of %d pictures did not arrive; trying again in %.1f s", len(missing), len(files), pause)
            deadline.wait(pause)

    def _take_back(self, upload: _Upload) -> None:
        """Leave nothing of a failed job there. The job's time may be over: this has a time of its own."""
        from botocore.exceptions import BotoCoreError, ClientError

        with self._opening:
            _ = self._undoing
        left = [(self._delete, key) for key in upload.perhaps_there]
        left += [(self._abort, key) for key in upload.perhaps_unfinished]
        until = time.monotonic() + self._undo_limit
        while left:
            undo, key = left[0]
            for pause in (*self._pauses, None):
                try:
                    undo(key)
                    break
                except (BotoCoreError, ClientError) as error:
                    if pause is None or not _may_pass(error) or time.monotonic() + pause > until:
                        count = len({key for _, key in left})
                        log.warning("up to %d pictures are left in the bucket (%s)", count, _code_of(error))
                        return
                time.sleep(pause)
            del left[0]

    def _delete(self, key: str) -> None:
        self._undoing.delete_object(Bucket=self._settings.name, Key=key)

    def _abort(self, key: str) -> None:
        """End what was sent in parts and has neither become a file nor been ended: it would cost money for ever."""
        bucket = self._settings.name
        for found in self._undoing.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", []):
            self._undoing.abort_multipart_upload(Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])

    @cached_property
    def _client(self) -> Any:
        return self._new_client(self._read_timeout)

    @cached_property
    def _undoing(self) -> Any:
        """A second client, for requests without a picture: it takes silence for a failure sooner."""
        return self._new_client(min(self._read_timeout, 5.0))

    def _new_client(self, read_timeout: float) -> Any:
        from boto3.session import Session
        from botocore.config import Config

        settings = self._settings
        endpoint = urlsplit(settings.endpoint_url)
        own_host = f"{settings.name}."  # https://BUCKET.host: the bucket is named by the host and not by the path
        is_virtual = endpoint.netloc.startswith(own_host)
        session: Any = Session(settings.access_key_id, settings.secret_access_key, region_name=settings.region)
        return session.client(
            "s3",
            endpoint_url=f"{endpoint.scheme}://{endpoint.netloc.removeprefix(own_host)}",
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "virtual" if is_virtual else "path"},
                retries={"total_max_attempts": 1, "mode": "standard"},  # we try again ourselves, within the deadline
                # Stores other than Amazon's refuse the checksums that boto3 has added on its own since 1.36.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=self._connect_timeout,
                read_timeout=read_timeout,
            ),
        )

    @cached_property
    def _transfers(self) -> Any:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=PARTS_FROM,
            multipart_chunksize=8 * MIB,
            max_concurrency=8,
            preferred_transfer_client="classic",
        )
        return create_transfer_manager(self._client, config)


class _Upload:
    """One job's pictures on their way: what arrived, what perhaps did, and the progress."""

    def __init__(self, transfers: Any, bucket: str, context: JobContext, size: int) -> None:
        self._transfers = transfers
        self._bucket = bucket
        self._context = context
        self._size = size
        self._sent = 0
        self._counting = threading.Lock()
        self._refused: set[str] = set()
        self._tried: dict[str, File] = {}

    @property
    def perhaps_there(self) -> list[str]:
        """Keys that were sent and not refused: an answer that was lost says nothing."""
        return [key for key in self._tried if key not in self._refused]

    @property
    def perhaps_unfinished(self) -> list[str]:
        """Keys that were sent in parts: whoever sends them ends what failed, and that may fail too."""
        return [key for key, file in self._tried.items() if len(file.data) >= PARTS_FROM]

    def send(self, files: Sequence[File]) -> dict[File, Exception]:
        """Upload side by side; what failed, and how. Ends early when the job's time does."""
        failures: dict[File, Exception] = {}
        transfers: list[Any] = []

        def end() -> None:
            for transfer in transfers:
                transfer.cancel()

        for file in files:
            self._tried[file.key] = file
            headers = {"ContentType": file.content_type}
            transfers.append(self._transfers.upload(io.BytesIO(file.data), self._bucket, file.key, headers, [self]))
        with self._context.deadline.on_end(end):
            for file, transfer in zip(files, transfers, strict=True):
                try:
                    transfer.result()
                except Exception as error:  # botocore's, s3transfer's, and what they let through
                    failures[file] = error
                    if _is_refusal(error):
                        self._refused.add(file.key)
        return failures

    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        """What s3transfer calls, from its threads; a second try gives bytes back."""
        with self._counting:
            self._sent += bytes_transferred
            sent = self._sent
        percent = min(100.0, 100 * sent / max(1, self._size))
        facts = {"bytes": sent, "total": self._size}
        self._context.report(Progress(Stage.DELIVER, round(percent, 1), "uploads the pictures", facts=facts))


PASSING_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ServiceUnavailable")


def _may_pass(error: Exception) -> bool:
    """Whether the same upload may succeed a little later."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, SSLError

    if isinstance(error, ClientError):
        return not _is_refusal(error)
    return isinstance(error, ConnectionError | HTTPClientError) and not isinstance(error, SSLError)


def _is_refusal(error: Exception) -> bool:
    """Whether the storage said no, and meant it."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError) or _code_of(error) in PASSING_CODES:
        return False
    status = _status_of(error)
    return status in (0, 501) or (status < 500 and status not in (408, 429))


def _delivery_failed(error: Exception) -> DeliveryFailed:
    """What the caller is told: the storage's own code, never its words, which may repeat a key."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return DeliveryFailed(
            f"the bucket cannot be reached ({_code_of(error)})", hint="try again; the operator: BUCKET_ENDPOINT_URL"
        )
    code, status = _code_of(error), _status_of(error)
    if code == "NoSuchBucket" or status == 404:
        return DeliveryFailed(
            f"there is no such bucket ({code})", hint="the operator: BUCKET_NAME, BUCKET_ENDPOINT_URL"
        )
    if status in (401, 403):
        return DeliveryFailed(
            f"the bucket refused the worker's key ({code})",
            hint="the operator: BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, and what that key may do",
        )
    if status < 500:
        return DeliveryFailed(f"the bucket refused the pictures ({status} {code})", hint="the operator: BUCKET_REGION")
    return DeliveryFailed(f"the bucket failed again and again ({status} {code})", hint="try again")


def _status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code_of(error: Any) -> str:
    """The storage's code for a failure, or the name of ours: letters and digits."""
    from botocore.exceptions import ClientError

    is_said = isinstance(error, ClientError)
    code = error.response.get("Error", {}).get("Code", "") if is_said else type(error).__name__
    return re.sub(r"[^A-Za-z0-9]", "", str(code))[:60] or "no code"
