"""What is fetched, and what its file is called: a reference together with its site's answer about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from a1111_worker.catalog import KnownLora, lora_of_version
from a1111_worker.domain import ModelKind, ModelRef, RemoteFile
from a1111_worker.models.cache import CheckpointSpec
from a1111_worker.models.names import SUFFIX, digest_file, version_file
from a1111_worker.models.safetensors import check_kind, family_of, family_of_base_model, lora_hash, read_header
from a1111_worker.models.sidecars import ModelRecord, url_key, variant_filter


@dataclass(frozen=True)
class FetchTarget:
    """A reference and the file that it means. With `checkpoint` it is the fixed checkpoint."""

    ref: ModelRef
    remote: RemoteFile
    checkpoint: CheckpointSpec | None = None

    @property
    def label(self) -> str:
        """How messages and log lines name it."""
        return self.remote.name or self.ref.name or self.ref.label

    @property
    def title(self) -> str:
        """The name that its record gets."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        return self._known.title if self._known else self.label

    @property
    def is_primary(self) -> bool:
        """Whether it is the file that the version's id alone means."""
        is_asked_plainly = self.ref.file_id is None and not variant_filter(self.ref)
        is_described = self.remote.size is not None or self.remote.size_at_most is not None
        return is_asked_plainly or (self.remote.primary and is_described)

    @property
    def size(self) -> int | None:
        """Bytes that it will not exceed, or None if that is unknown."""
        return self.remote.size or self.remote.size_at_most

    @property
    def sha256(self) -> str | None:
        return self.remote.sha256 or self.ref.sha256

    @property
    def key(self) -> str:
        """What is fetched, as partial files and leases name it: the same for every worker, whatever a job calls it."""
        if self.remote.version_id is None:
            return f"u{url_key(self.ref.url or self.remote.url)}"
        if self.is_primary or self.remote.file_id is None:
            return f"v{self.remote.version_id}"
        return f"v{self.remote.version_id}-{self.remote.file_id}"

    @property
    def flight_key(self) -> str:
        """What jobs of one process may fetch together.

        A job that names another hash fetches on its own: a wrong hash is no other job's failure.
        """
        return f"{self.ref.kind.value}:{self.key}:{self.sha256}"

    @property
    def exact_ref(self) -> ModelRef:
        """The reference with the ids of the site's answer."""
        if self.remote.hub is not None:
            return replace(self.ref, hub=self.remote.hub, sha256=self.sha256)
        if self.remote.version_id is None:
            return self.ref
        file_id = None if self.is_primary else self.remote.file_id
        return replace(
            self.ref, version_id=self.remote.version_id, file_id=file_id, size=None, fp=None, url=None, model_id=None
        )

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs by which its file is found again. CivitAI's files are found by their ids."""
        if self.ref.hub is not None and self.remote.hub is not None:
            return self.ref.hub.url, self.remote.hub.url
        return (self.ref.url,) if self.ref.url is not None else ()

    @property
    def reserved_file(self) -> str | None:
        """The file name that this model must have and no other may, or None."""
        if self.checkpoint is not None:
            return self.checkpoint.file
        return self._known.file if self._known else None

    @property
    def _known(self) -> KnownLora | None:
        """The catalog's entry, whose file name belongs to this version alone."""
        if self.ref.kind is not ModelKind.LORA or self.remote.version_id is None or not self.is_primary:
            return None
        return lora_of_version(self.remote.version_id)

    @property
    def _source_stem(self) -> str | None:
        name = self.remote.file_name
        return None if name is None else name.removesuffix(SUFFIX)

    def file(self, sha256: str) -> str:
        """The file name of the model, once its hash is known."""
        if self.reserved_file is not None:
            return self.reserved_file
        name = self.ref.name or self.remote.name
        if self.remote.version_id is None:
            return digest_file(name, sha256)
        return version_file(name, self.remote.version_id, None if self.is_primary else self.remote.file_id)

    def record(self, path: Path, file: str, sha256: str) -> ModelRecord:
        """What is known of it once it is fetched to `path`. Raises ModelRejected if that is no safetensors file."""
        header = read_header(path)
        check_kind(self.ref.kind, header)
        variant = variant_filter(self.ref)
        return ModelRecord(
            kind=self.ref.kind,
            name=self.title,
            file=file,
            sha256=sha256,
            size=header.size,
            url=_without_query(self.remote.url),
            version_id=self.remote.version_id,
            file_id=self.remote.file_id,
            primary=self.is_primary,
            variant_filters=(variant,) if variant else (),
            base_model=self.remote.base_model,
            family=family_of(header, self.remote.base_model, kind=self.ref.kind),
            lora_hash=lora_hash(path, header) if self.ref.kind is ModelKind.LORA else None,
            trained_words=self.remote.trained_words,
            downloaded_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            restricted=self.remote.restricted,
            source_stem=self._source_stem,
        )

    def verified_record(self, record: ModelRecord) -> ModelRecord:
        """The record of a file that was there already, now that it is verified to be this one."""
        remote = self.remote
        return replace(
            self.with_variant_filter(record),
            name=self.title,
            url=_without_query(remote.url),
            version_id=remote.version_id,
            file_id=remote.file_id,
            primary=self.is_primary,
            base_model=remote.base_model,
            family=family_of_base_model(remote.base_model) if record.family is None else record.family,
            trained_words=remote.trained_words,
            restricted=remote.restricted,
            source_stem=self._source_stem,
        )

    def with_variant_filter(self, record: ModelRecord) -> ModelRecord:
        """The record, which now also knows that the reference's variant filter selects its file."""
        variant = variant_filter(self.ref)
        if not variant or variant in record.variant_filters:
            return record
        return replace(record, variant_filters=(*record.variant_filters, variant))


def _without_query(url: str) -> str:
    return url.partition("?")[0].partition("#")[0]
