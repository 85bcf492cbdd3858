"""How a job's images are delivered: converted as the job asks, in the answer or as links into a bucket."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from a1111_worker.context import JobContext
from a1111_worker.delivery.answer import Delivered, build_answer, choose_mode, format_summary, size_limit
from a1111_worker.delivery.bucket import Bucket
from a1111_worker.delivery.formats import Converted, convert, decode_image, image_file_name, is_unchanged, job_slug
from a1111_worker.domain import DeliveryMode, Generation, OutputOptions, Progress, Stage, Upscaling
from a1111_worker.errors import DeliveryFailed
from a1111_worker.images import detect_format
from a1111_worker.webui.infotext import parse_infotext

log = logging.getLogger(__name__)

R = TypeVar("R", Generation, Upscaling)

CONVERSION_THREADS = 4


class Delivery:
    """Delivers jobs, any number at once, with a bucket or without one."""

    def __init__(self, bucket: Bucket | None = None) -> None:
        self._bucket = bucket

    def prepare(self) -> None:
        """Do now what the first image for the bucket would wait for.

        Raises ConfigError for a bucket setting that can never work. Any other failure is only logged: jobs without the
        bucket succeed all the same, and a job that needs it tries again.
        """
        if self._bucket is None:
            return
        try:
            self._bucket.prepare()
        except DeliveryFailed as error:
            log.warning("%s: %s", error.message, error.__cause__)

    def close(self) -> None:
        if self._bucket is not None:
            self._bucket.close()

    def deliver(self, result: R, options: OutputOptions, context: JobContext) -> dict[str, Any]:
        """The job's answer: strict JSON, within the platform's limit.

        Raises ResultTooLarge, DeliveryFailed, JobTimeout or JobCancelled; nothing is left in the bucket then.
        """
        with context.times.measure(Stage.DELIVER):
            result, images = _convert_all(result, options, context)
            delivered = Delivered(images, options.format)
            draft = build_answer(result, delivered, context.times.seconds())
            mode = choose_mode(draft, options, size_limit(context.job_id), has_bucket=self._bucket is not None)
            if mode is DeliveryMode.BUCKET and self._bucket is not None:
                delivered = self._bucket.deliver(result.seeds, delivered, context)
        answer = build_answer(result, delivered, context.times.seconds())
        log.info("%s", format_summary(answer["worker"]))
        if options.raw:
            del answer["worker"]
        return answer


def save_images(folder: Path, job_id: str, answer: Mapping[str, Any]) -> list[Path]:
    """Write a local run's images to `<job>-<number>-<seed>.png`. Files of these names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = answer["worker"]["seeds"] if "worker" in answer else _seeds_of_raw(answer)
    written = []
    for number, image in enumerate(answer["images"], start=1):
        path = folder / f"{job_slug(job_id)}-{image_file_name(number, seeds, detect_format(image))}"
        path.write_bytes(decode_image(image))
        written.append(path)
    return written


def _seeds_of_raw(answer: Mapping[str, Any]) -> list[int | None]:
    """The seed of each image of a raw answer, by the texts in its `info`; none if they do not describe the images."""
    info = json.loads(answer.get("info", "{}"))  # enlarged pictures have none
    texts = [parse_infotext(str(text)) for text in info.get("infotexts", ())]
    if len(texts) != len(answer["images"]):
        return []
    first = info.get("index_of_first_image", 0)  # those before it are grids
    return [None if index < first or text.is_of_grid else text.seed for index, text in enumerate(texts)]


def _convert_all(result: R, options: OutputOptions, context: JobContext) -> tuple[R, list[str]]:
    """The images in the job's format, converted in parallel, and the result with the warnings about them."""
    images: list[str] = result.answer["images"]
    if is_unchanged(options):
        return result, images
    context.report(Progress(Stage.DELIVER, detail=f"makes {options.format.value} of {len(images)} pictures"))

    def convert_one(image: str) -> Converted:
        context.deadline.check()
        return convert(image, options)

    count = min(len(images), os.cpu_count() or 1, CONVERSION_THREADS)
    with ThreadPoolExecutor(count, thread_name_prefix="convert") as threads:
        converted = list(threads.map(convert_one, images))
    warnings: list[str] = list(dict.fromkeys(entry.warning for entry in converted if entry.warning))
    return replace(result, warnings=(*result.warnings, *warnings)), [entry.image for entry in converted]
