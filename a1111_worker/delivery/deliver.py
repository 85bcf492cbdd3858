"""How a job's pictures leave: converted as the job wants them, in the answer or as links into a bucket.

The bucket is any S3-compatible one, and gets all pictures of a job or none:

    <prefix>/<job id>/<number>-<seed>.<png, jpg or webp>

boto3 is imported when the first picture goes there (or by `prepare`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from a1111_worker import images as image_files
from a1111_worker.context import JobContext
from a1111_worker.delivery import formats
from a1111_worker.delivery.answer import Delivered, answer_of, in_one_line, limit_of, way_out
from a1111_worker.delivery.bucket import Bucket
from a1111_worker.delivery.formats import decode_image, image_file_name, job_slug
from a1111_worker.domain import DeliveryMode, Generation, OutputOptions, Progress, Stage

log = logging.getLogger(__name__)


class Delivery:
    """Delivers jobs, any number at once, with a bucket or without one."""

    def __init__(self, bucket: Bucket | None = None) -> None:
        self._bucket = bucket

    def prepare(self) -> None:
        """Do now what the first picture for the bucket would wait for."""
        if self._bucket is not None:
            self._bucket.prepare()

    def close(self) -> None:
        if self._bucket is not None:
            self._bucket.close()

    def deliver(self, generation: Generation, options: OutputOptions, context: JobContext) -> dict[str, Any]:
        """The job's answer: strict JSON, no larger than the platform takes it.

        Raises ResultTooLarge, DeliveryFailed, JobTimeout or JobCancelled; nothing is left in the bucket then.
        """
        with context.timings.measure(Stage.DELIVER):
            generation, images = _converted(generation, options, context)
            delivered = Delivered(images, options.format)
            draft = answer_of(generation, delivered, context.timings.seconds())
            way = way_out(draft, options, limit_of(context.job_id), has_bucket=self._bucket is not None)
            if way is DeliveryMode.BUCKET and self._bucket is not None:
                delivered = self._bucket.deliver(generation.seeds, delivered, context)
        answer = answer_of(generation, delivered, context.timings.seconds())
        log.info("%s", in_one_line(answer["worker"]))
        if options.raw:
            del answer["worker"]
        return answer


def save_images(folder: Path, job_id: str, answer: Mapping[str, Any]) -> list[Path]:
    """Write a local run's pictures, `<job>-<n>-<seed>.png`; what is there already under these names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = json.loads(answer["info"]).get("all_seeds", [])
    written = []
    for number, image in enumerate(answer["images"], start=1):
        path = folder / f"{job_slug(job_id)}-{image_file_name(number, seeds, image_files.format_of(image))}"
        path.write_bytes(decode_image(image))
        written.append(path)
    return written


def _converted(generation: Generation, options: OutputOptions, context: JobContext) -> tuple[Generation, list[str]]:
    """The pictures in the job's format, in parallel, and the generation with what is to be said of them."""
    images: list[str] = generation.answer["images"]
    if formats.is_untouched(options):
        return generation, images
    context.report(Progress(Stage.DELIVER, detail=f"makes {options.format.value} of {len(images)} pictures"))

    def convert(image: str) -> formats.Converted:
        context.deadline.check()
        return formats.convert(image, options)

    with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1, 4), thread_name_prefix="convert") as threads:
        converted = list(threads.map(convert, images))
    said = dict.fromkeys(one.warning for one in converted if one.warning)
    return replace(generation, warnings=(*generation.warnings, *said)), [one.picture for one in converted]


# -- the bucket -------------------------------------------------------------------------------------------------------


# -- what a bucket says -----------------------------------------------------------------------------------------------
