"""The types of fields that hold pictures of the job."""

from __future__ import annotations

from functools import lru_cache

from a1111_worker.domain import PictureSource
from a1111_worker.pictures.source import BadPicture, parse_picture
from a1111_worker.request.fields import Limits
from a1111_worker.request.values import InvalidValue, ValueType, list_of, mismatch
from a1111_worker.transfer.egress import EgressPolicy


def picture(limits: Limits) -> ValueType:
    """A picture. The checked value is a PictureSource."""
    policy = image_policy(limits.image_hosts)

    def check(value: object) -> PictureSource:
        if not isinstance(value, str):
            raise mismatch("a picture as text", value)
        try:
            return parse_picture(value, policy)
        except BadPicture as error:
            raise InvalidValue(str(error)) from error

    return ValueType("string", "a picture: base64, a data: URL, or an https URL", check)


def pictures(limits: Limits) -> ValueType:
    """Pictures, at least one. The checked value is a list of PictureSource."""
    several = list_of(picture(limits), limits.max_input_images, "pictures")

    def check(value: object) -> list[PictureSource]:
        found: list[PictureSource] = several.check(value)
        if not found:
            raise InvalidValue("must have a picture")
        return found

    return ValueType(several.type, several.expected, check, several.schema)


@lru_cache(maxsize=8)
def image_policy(hosts: tuple[str, ...]) -> EgressPolicy | None:
    """What may be reached for pictures, by IMAGE_HOSTS; None: nothing."""
    return EgressPolicy(hosts) if hosts else None
