"""What the tests of delivery share: a generation, and a bucket of a test's own."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

from a1111_worker.context import JobContext
from a1111_worker.delivery.bucket import Bucket, BucketTimings
from a1111_worker.delivery.deliver import Delivery
from a1111_worker.domain import (
    AppliedLora,
    BucketSettings,
    DeliveryMode,
    Generation,
    Menus,
    Model,
    ModelKind,
    OutputOptions,
    PictureFacts,
)
from tests.buckets import KEY_ID, SECRET, FaultyProxy, S3Server

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()
ONE, TWO, THREE = b"one" * 1000, b"two" * 1000, b"three" * 1000
QUICK = BucketTimings(shortest_pause=0.01, longest_pause=0.02, connect=2.0, read=2.0)


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
        loras=(AppliedLora("Detail", 1.5, lora, loaded=True, pictures=2), AppliedLora("Gone", 1.0, None, loaded=False)),
        seeds=(42, 43),
        pictures=(PictureFacts(96, 64, 42, 25), PictureFacts(96, 64, 43, 25)),
        webui_version="v1.10.1",
        warnings=("a word",),
        menus=Menus("0123456789abcdef"),
    )


class BucketUnderTest:
    """A bucket of a test's own, behind a proxy that may fail, and a delivery that uses it."""

    def __init__(
        self, s3: S3Server, proxy: FaultyProxy, name: str, timings: BucketTimings = QUICK, **settings: Any
    ) -> None:
        self.s3, self.proxy, self.name = s3, proxy, name
        self.settings = BucketSettings(
            **{
                "endpoint_url": proxy.url,
                "name": name,
                "access_key_id": KEY_ID,
                "secret_access_key": SECRET,
                **settings,
            }
        )
        self.delivery = Delivery(Bucket(self.settings, timings))

    def deliver(
        self,
        *images: bytes,
        job_id: str = "job-1",
        context: JobContext | None = None,
        options: OutputOptions | None = None,
    ) -> dict[str, Any]:
        made = generation(images=[base64.b64encode(image).decode() for image in images])
        options = options or OutputOptions(delivery=DeliveryMode.BUCKET)
        return self.delivery.deliver(made, options, replace(context or JobContext(), job_id=job_id))

    @property
    def is_empty(self) -> bool:
        return self.s3.keys(self.name) == [] and self.s3.unfinished(self.name) == []
