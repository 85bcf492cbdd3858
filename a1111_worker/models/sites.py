"""The sites that models are published on, and the one interface that the cache knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from a1111_worker.context import Deadline
from a1111_worker.domain import ModelRef, RemoteFile


@dataclass(frozen=True)
class SiteTimings:
    """How long the client of a site waits, in seconds."""

    connect: float = 10.0
    answer: float = 20.0  # from a request to the end of its response
    shortest: float = 0.5  # the first pause before another try; pauses grow with decorrelated jitter up to …
    longest: float = 10.0
    too_many: float = 60.0  # all pauses together that a 429 or a Retry-After may cause


class ModelSite(Protocol):
    """The client of a site: CivitAI's or Hugging Face's. Many threads may use it at once."""

    def describe(self, ref: ModelRef, deadline: Deadline) -> RemoteFile:
        """What is known about the file that `ref` means. Raises ModelError if it is not available."""

    def link(self, remote: RemoteFile, deadline: Deadline) -> str:
        """A URL of the file's bytes that needs no key. It may be signed: then it is valid for a while, and a secret."""


class ModelSites:
    """Asks the site that a reference names: Hugging Face for its files, CivitAI for everything else."""

    def __init__(self, civitai: ModelSite, hugging_face: ModelSite) -> None:
        self._civitai = civitai
        self._hugging_face = hugging_face

    def describe(self, ref: ModelRef, deadline: Deadline) -> RemoteFile:
        return (self._civitai if ref.hub is None else self._hugging_face).describe(ref, deadline)

    def link(self, remote: RemoteFile, deadline: Deadline) -> str:
        return (self._civitai if remote.hub is None else self._hugging_face).link(remote, deadline)
