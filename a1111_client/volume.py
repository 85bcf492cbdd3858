"""`a1111 volume upload`: a folder of models onto a network volume, through RunPod's S3 API, without a worker.

    DIR/checkpoints/jib_mix.safetensors         →  models/checkpoints/jib_mix.safetensors
    DIR/checkpoints/jib_mix.safetensors.json    →  models/checkpoints/jib_mix.safetensors.json, after the model
    DIR/loras/.urls/3f9c…                       →  models/loras/.urls/3f9c…
    DIR/loras/.parts/…, .leases/, .holds/, .trash/, *.uses    stay here: they belong to a running worker

Every file is looked at before the first one is sent. What is there with the same size and SHA-256 is left alone; what
is there and differs is an error. The bucket is the volume's id, a key is a path below /runpod-volume (RunPod's page
"S3-compatible API", August 2026).
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1111_client.errors import EndpointError

FOLDERS = ("checkpoints", "loras", "embeddings", "vaes", "vae", "controlnet", "upscalers")
"""What a folder of models has; anything else in it stays here."""

_KEPT_HIDDEN = ".urls"  # which file a URL gave; all other hidden folders are a running worker's
_SIDECAR, _USES = ".json", ".uses"
_HASH = "sha256"  # the metadata of an object
_SMALL = 1 << 20  # bytes of a sidecar, at most
_CHUNK = 4 << 20

Tell = Callable[["LocalFile", int], None]


def s3_url(data_center: str) -> str:
    """The address of the volumes in a data center."""
    return f"https://s3api-{data_center.lower()}.runpod.io/"


@dataclass(frozen=True)
class LocalFile:
    """A file to copy. `name` is its path below the folder, with `/`."""

    path: Path
    name: str
    size: int

    @property
    def is_knowledge(self) -> bool:
        """Whether it only says something about a model: a sidecar, or a file of `.urls`."""
        return self.name.endswith(_SIDECAR) or f"/{_KEPT_HIDDEN}/" in self.name


@dataclass(frozen=True)
class Stored:
    """What the volume has under a key. `sha256` is what its metadata says; None: it keeps none."""

    size: int
    sha256: str | None


class Step(enum.Enum):
    """What is to be done with a file."""

    SEND = "send"
    SKIP = "is there"
    KEEP = "the volume has its own, which is kept"
    READ_BACK = "is there with the same size, and is read back"
    UNKNOWN = "is there with the same size, and the volume keeps no hash of it: --verify reads it back"
    CONFLICT = "is there, and is another file"


def find_files(folder: Path) -> list[LocalFile]:
    """The files of a models folder in the order in which they are copied: every model before what is known about it.

    Raises EndpointError if it is no such folder.
    """
    there = [name for name in FOLDERS if (folder / name).is_dir()]
    if not there:
        raise EndpointError(
            "BAD_OPTION",
            f"{folder} has none of the folders {', '.join(FOLDERS)}",
            hint="make one with `python model_manager.py prefetch checkpoint NAME… --models-dir DIR`",
        )
    found = []
    for path in (path for name in there for path in sorted((folder / name).rglob("*"))):
        parts = path.relative_to(folder).parts
        hidden = [part for part in parts if part.startswith(".")]
        if path.name.endswith(_USES) or hidden not in ([], [_KEPT_HIDDEN]) or not path.is_file():
            continue
        if path.name.endswith(_SIDECAR) and not path.with_name(path.name.removesuffix(_SIDECAR)).is_file():
            continue
        found.append(LocalFile(path, "/".join(parts), path.stat().st_size))
    return sorted(found, key=lambda file: file.is_knowledge)  # the order among equals stays


def decide(file: LocalFile, sha256: str, stored: Stored | None, *, model_is_there: bool, verify: bool) -> Step:
    """What to do with a file of this hash. `model_is_there`: its model is on the volume, byte for byte.

    A worker writes into the sidecars of models that are there: such a sidecar is its own business.
    """
    if stored is None:
        return Step.SEND
    if stored.size == file.size:
        if stored.sha256 == sha256:
            return Step.SKIP
        if stored.sha256 is None:
            return Step.READ_BACK if verify or file.size <= _SMALL else Step.UNKNOWN
    return Step.KEEP if file.is_knowledge and model_is_there else Step.CONFLICT


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as opened:
        return _digest(iter(lambda: opened.read(_CHUNK), b""))


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


IN_THE_WAY = (Step.UNKNOWN, Step.CONFLICT)
"""What only --replace overwrites."""


class Volume:
    """A network volume: its bucket, through boto3. `url` is the address of its data center's S3 API.

    `part_size` and `at_once` are for files that are sent in parts. RunPod may take `patience` seconds to put the parts
    of a file together.
    """

    def __init__(
        self,
        bucket: str,
        *,
        url: str,
        region: str,
        key: tuple[str, str],
        part_size: int = 64 << 20,
        at_once: int = 4,
        patience: float = 600.0,
    ) -> None:
        import boto3  # half a second, which other commands need not wait
        from botocore.config import Config

        self.bucket, self.url = bucket, url
        self.part_size = part_size
        self._at_once, self._patience = at_once, patience
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "total_max_attempts": 6},
            connect_timeout=10,
            read_timeout=120,
            max_pool_connections=at_once + 2,
            # Newer checksums are sent as trailers, which not every store of this kind takes.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = boto3.Session(*key, region_name=region)
        self._s3: Any = session.client("s3", endpoint_url=url, config=config)

    def close(self) -> None:
        self._s3.close()

    def look(self, key: str) -> Stored | None:
        """What is there under a key."""
        with _translated(key):
            try:
                head = self._s3.head_object(Bucket=self.bucket, Key=key)
            except self._s3.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
        return Stored(head["ContentLength"], head.get("Metadata", {}).get(_HASH))

    def read_hash(self, key: str) -> str:
        """The SHA-256 of what is there, read back."""
        with _translated(key):
            return _digest(self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].iter_chunks(_CHUNK))

    def delete(self, key: str) -> None:
        with _translated(key):
            self._s3.delete_object(Bucket=self.bucket, Key=key)

    def send(self, file: LocalFile, key: str, sha256: str, states: Path, tell: Tell) -> None:
        """Put a file under a key. A large one goes on where an earlier try has stopped: `states` remembers it."""
        if file.size <= self.part_size:
            with _translated(key), file.path.open("rb") as opened:
                self._s3.put_object(Bucket=self.bucket, Key=key, Body=opened, Metadata={_HASH: sha256})
            tell(file, file.size)
            return
        upload = _Upload.of(self, key, sha256, states)
        with _translated(key):
            parts = upload.sent_parts()
            if parts is None:
                created = self._s3.create_multipart_upload(Bucket=self.bucket, Key=key, Metadata={_HASH: sha256})
                upload.remember(created["UploadId"])
                parts = {}
            self._send_parts(file, key, upload.id, parts, tell)
            self._complete(file, key, upload.id, parts)
        upload.forget()

    def _send_parts(self, file: LocalFile, key: str, upload_id: str, parts: dict[int, str], tell: Tell) -> None:
        """Send the parts that are missing, several at once, and add their tags to `parts`."""
        count = -(-file.size // self.part_size)
        lock, stopping = threading.Lock(), threading.Event()

        def size_of(number: int) -> int:
            return min(self.part_size, file.size - (number - 1) * self.part_size)

        def send(number: int) -> None:
            if stopping.is_set():
                return
            with file.path.open("rb") as opened:
                opened.seek((number - 1) * self.part_size)
                body = opened.read(size_of(number))
            try:
                sent = self._s3.upload_part(
                    Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body
                )
            except BaseException:
                stopping.set()
                raise
            with lock:
                parts[number] = sent["ETag"]
            tell(file, len(body))

        tell(file, sum(size_of(number) for number in parts))
        threads = ThreadPoolExecutor(self._at_once)
        try:
            for done in [threads.submit(send, number) for number in range(1, count + 1) if number not in parts]:
                done.result()
        except BaseException as error:
            stopping.set()
            # What was sent stays, and the next run goes on with it. Ctrl-C does not wait for the parts on their way:
            # on a slow line that takes minutes.
            threads.shutdown(wait=not isinstance(error, KeyboardInterrupt))
            raise
        threads.shutdown()

    def _complete(self, file: LocalFile, key: str, upload_id: str, parts: dict[int, str]) -> None:
        """Have the parts put together. If RunPod's proxy gives up on the answer meanwhile, look for the file."""
        from botocore.exceptions import BotoCoreError, ClientError

        listed = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(parts.items())]
        try:
            self._s3.complete_multipart_upload(
                Bucket=self.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": listed}
            )
        except (ClientError, BotoCoreError) as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else 0
            if 400 <= status < 500 and status != 404:  # 404: an answer was lost, and the second try finds it done
                raise
            until = time.monotonic() + (0.0 if status == 404 else self._patience)
            while (found := self.look(key)) is None or found.size != file.size:
                if time.monotonic() > until:
                    raise
                time.sleep(min(5.0, self._patience / 10))

    def abort(self, key: str, upload_id: str) -> None:
        """Drop the parts of an unfinished upload, if it is still there."""
        with contextlib.suppress(self._s3.exceptions.ClientError):
            self._s3.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)

    def parts_of(self, key: str, upload_id: str) -> dict[int, str] | None:
        """The tags of the parts that an unfinished upload has; None if there is none of this id."""
        pages = self._s3.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload_id)
        try:
            return {part["PartNumber"]: part["ETag"] for page in pages for part in page.get("Parts", ())}
        except self._s3.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise


@dataclass
class _Upload:
    """An upload in parts, and the file that remembers it: `{"id": …, "sha256": …, "part_size": …}`."""

    volume: Volume
    key: str
    sha256: str
    state: Path
    id: str = ""

    @classmethod
    def of(cls, volume: Volume, key: str, sha256: str, states: Path) -> _Upload:
        name = hashlib.sha256("\n".join((volume.url, volume.bucket, key)).encode()).hexdigest()[:32]
        return cls(volume, key, sha256, states / f"{name}.json")

    def sent_parts(self) -> dict[int, str] | None:
        """The tags of the parts that are there; None if this upload begins anew."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.state.read_text(encoding="utf-8"))
            if (found["sha256"], found["part_size"]) == (self.sha256, self.volume.part_size):
                self.id = str(found["id"])
                return self.volume.parts_of(self.key, self.id)
            self.volume.abort(self.key, str(found["id"]))  # the file has changed: those parts are of no use
        return None

    def remember(self, upload_id: str) -> None:
        self.id = upload_id
        self.state.parent.mkdir(parents=True, exist_ok=True)
        known = {"id": upload_id, "sha256": self.sha256, "part_size": self.volume.part_size}
        self.state.write_text(json.dumps(known), encoding="utf-8")

    def forget(self) -> None:
        self.state.unlink(missing_ok=True)


@dataclass(frozen=True)
class Planned:
    """A file, its key, its hash, and what is to be done with it."""

    file: LocalFile
    key: str
    sha256: str
    step: Step


def plan(volume: Volume, files: Iterable[LocalFile], prefix: str, *, verify: bool, tell: Tell) -> list[Planned]:
    """Look at every file, here and there. Nothing is sent. `tell` gets the bytes that were read here."""
    planned: dict[str, Planned] = {}
    for file in files:
        key = f"{prefix.strip('/')}/{file.name}".lstrip("/")
        sha256 = hash_of(file.path)
        tell(file, file.size)
        if problem := _contradiction(file, sha256):
            raise EndpointError("BAD_OPTION", problem, hint="fetch it again, or remove its sidecar")
        model = planned.get(file.name.removesuffix(_SIDECAR))
        # What a URL gave is of no model alone; a worker finds it out again if it is wrong.
        is_there = model.step is Step.SKIP if model else f"/{_KEPT_HIDDEN}/" in file.name
        stored = volume.look(key)
        step = decide(file, sha256, stored, model_is_there=is_there, verify=verify)
        if step is Step.READ_BACK:
            stored = Stored(file.size, volume.read_hash(key))
            step = decide(file, sha256, stored, model_is_there=is_there, verify=verify)
        planned[file.name] = Planned(file, key, sha256, step)
    return list(planned.values())


def _contradiction(file: LocalFile, sha256: str) -> str:
    """Why a model is not what its own sidecar says; empty if it is, or if nothing is said."""
    sidecar = file.path.with_name(file.path.name + _SIDECAR)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        said = json.loads(sidecar.read_bytes()[:_SMALL]).get("sha256")
        if isinstance(said, str) and said != sha256:
            return f"{file.name} has not the SHA-256 that its sidecar says"
    return ""


def upload(volume: Volume, planned: Iterable[Planned], states: Path, *, verify: bool, tell: Tell) -> list[str]:
    """Send what is to be sent, and compare what is there afterwards; the files of which only the size was compared.

    What is in the way is replaced. Old sidecars go first: no worker shall believe one of a new file.
    """
    work = [item for item in planned if item.step not in (Step.SKIP, Step.KEEP)]
    for item in work:
        if item.step is not Step.SEND:
            volume.delete(item.key if item.file.is_knowledge else item.key + _SIDECAR)
    unproven = []
    for item in work:
        volume.send(item.file, item.key, item.sha256, states, tell)
        stored = volume.look(item.key)
        found = stored.sha256 if stored else None
        if stored is not None and found is None and verify:
            found = volume.read_hash(item.key)
        if stored is None or stored.size != item.file.size or found not in (None, item.sha256):
            raise EndpointError("UPLOAD_FAILED", f"{item.key} is not on the volume as it was sent", retryable=True)
        if found is None:
            unproven.append(item.file.name)
    return unproven


@contextlib.contextmanager
def _translated(key: str) -> Iterator[None]:
    """boto3's errors in our words. None of them may hold a key or a signed address."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(error.response.get("Error", {}).get("Code", ""))[:80]
        if status in (401, 403):
            raise EndpointError(
                "ENDPOINT_REFUSED",
                f"the volume refuses the key ({code})",
                hint="RUNPOD_S3_ACCESS_KEY_ID and RUNPOD_S3_SECRET_ACCESS_KEY: console, Settings, S3 API Keys",
            ) from None
        if status == 404:
            raise EndpointError("ENDPOINT_NOT_FOUND", "there is no such volume in this data center") from None
        if status == 507:
            raise EndpointError("UPLOAD_FAILED", f"{key}: the volume is full") from None
        raise EndpointError("UPLOAD_FAILED", f"{key}: the volume answered {status} {code}", retryable=True) from None
    except BotoCoreError as error:
        raise EndpointError(
            "ENDPOINT_UNREACHABLE", f"{key}: the volume gives no answer ({type(error).__name__})", retryable=True
        ) from None
