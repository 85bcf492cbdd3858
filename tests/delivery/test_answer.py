"""The answer: its form, its measured size, and whether its images leave in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from a1111_worker import __version__
from a1111_worker.delivery.answer import (
    RUN_LIMIT,
    RUNSYNC_LIMIT,
    Delivered,
    build_answer,
    choose_mode,
    serialised_size,
)
from a1111_worker.domain import DeliveryMode, Generation, ImageFormat, OutputOptions
from a1111_worker.errors import ResultTooLarge
from tests.delivery.support import PNG, generation

AUTO, INLINE, BUCKET = DeliveryMode.AUTO, DeliveryMode.INLINE, DeliveryMode.BUCKET


def inline(made: Generation) -> dict[str, Any]:
    return build_answer(made, Delivered(made.answer["images"]), {"total": 1.5})


def test_the_worker_block_reports_what_was_verified() -> None:
    answer = build_answer(generation(), Delivered([PNG]), {"generate": 1.23456, "total": 2.0})

    assert answer["worker"] == {
        "checkpoint": {"name": "The Model", "file": "m.safetensors", "sha256": "ab" * 32},
        "refiner": None,
        "hires_checkpoint": None,
        "loras": [
            {
                "name": "Detail",
                "file": "d.safetensors",
                "tag": "d_cdcdcdcd",
                "version_id": 135867,
                "scale": 1.5,
                "sha256": "cd" * 32,
                "loaded": True,
                "pictures": 2,
                "matched": None,
                "trigger_words": [],
                "downloaded": True,
            },
            {
                "name": "Gone",
                "file": None,
                "tag": None,
                "version_id": None,
                "scale": 1.0,
                "sha256": None,
                "loaded": False,
                "pictures": 0,
                "matched": None,
                "trigger_words": [],
                "downloaded": False,
            },
        ],
        "embeddings": [],
        "vae": None,
        "seeds": [42, 43],
        "pictures": [
            {"width": 96, "height": 64, "seed": 42, "steps": 25},
            {"width": 96, "height": 64, "seed": 43, "steps": 25},
        ],
        "warnings": ["a word"],
        "delivery": {"mode": "inline", "format": "png", "urls": [], "expires_at": None},
        "timings": {"generate": 1.235, "total": 2.0},
        "versions": {"worker": __version__, "webui": "v1.10.1"},
        "lists": "0123456789abcdef",
    }


# -- its size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[], [PNG], [PNG, PNG, PNG]])
def test_the_measured_size_is_the_size_the_sdk_will_post(images: list[str]) -> None:
    answer = inline(generation(images=images))

    posted = json.dumps(answer, ensure_ascii=False).encode()
    assert 0 <= serialised_size(answer) - len(posted) <= 4


SMALL, LARGE = 1000, RUN_LIMIT
NEARLY = RUN_LIMIT - serialised_size(inline(generation(images=[""]))) - 50  # with what the SDK adds it is too large
TOO_LARGE = None

# what the job asks for, whether it is raw, characters of its image, whether there is a bucket; the mode
MODES = [
    (AUTO, False, SMALL, False, INLINE),
    (AUTO, False, SMALL, True, INLINE),  # a bucket is for what does not fit
    (AUTO, False, LARGE, True, BUCKET),
    (AUTO, False, NEARLY, True, BUCKET),
    (AUTO, False, LARGE, False, TOO_LARGE),
    (INLINE, False, SMALL, True, INLINE),
    (INLINE, False, LARGE, True, TOO_LARGE),  # the job asks for that
    (BUCKET, False, SMALL, True, BUCKET),
    (BUCKET, False, LARGE, True, BUCKET),
    (AUTO, True, SMALL, True, INLINE),
    (AUTO, True, LARGE, True, TOO_LARGE),  # a raw answer has no place for links
]


@pytest.mark.parametrize(("mode", "raw", "size", "has_bucket", "expected"), MODES)
def test_the_mode_depends_on_the_job_the_size_and_the_bucket(
    mode: DeliveryMode, raw: bool, size: int, has_bucket: bool, expected: DeliveryMode | None
) -> None:
    answer = inline(generation(images=["A" * size]))
    options = OutputOptions(delivery=mode, raw=raw)

    if expected is TOO_LARGE:
        with pytest.raises(ResultTooLarge):
            choose_mode(answer, options, RUN_LIMIT, has_bucket=has_bucket)
    else:
        assert choose_mode(answer, options, RUN_LIMIT, has_bucket=has_bucket) is expected


def test_a_bucket_does_not_help_an_answer_that_is_too_large_without_its_images() -> None:
    answer = inline(generation(images=[PNG], parameters={"script_args": "A" * RUN_LIMIT}))

    with pytest.raises(ResultTooLarge):
        choose_mode(answer, OutputOptions(), RUN_LIMIT, has_bucket=True)


PNGS, WEBPS = OutputOptions(), OutputOptions(ImageFormat.WEBP)
LARGER = RUNSYNC_LIMIT

# what the job asks for, characters of each image, limit, whether there is a bucket; words of the hint, words not in it
HINTS: list[tuple[OutputOptions, Sequence[int], int, bool, tuple[str, ...], tuple[str, ...]]] = [
    (PNGS, [LARGE], RUN_LIMIT, False, ("webp", "a smaller image", "/runsync", "BUCKET_ENDPOINT_URL"), ("fewer",)),
    (PNGS, [LARGE, SMALL], RUN_LIMIT, False, ("fewer images",), ("a smaller image",)),
    (WEBPS, [LARGE], RUN_LIMIT, False, ("a smaller image",), ("webp",)),  # it is WebP already
    (PNGS, [LARGER], RUN_LIMIT, False, ("webp",), ("/runsync",)),  # which would not help
    (PNGS, [LARGER], RUNSYNC_LIMIT, False, ("webp",), ("/runsync",)),  # it is a /runsync job already
    (OutputOptions(delivery=INLINE), [LARGE], RUN_LIMIT, True, ('"auto"',), ("BUCKET_",)),
    (OutputOptions(raw=True), [LARGE], RUN_LIMIT, True, ('leave out "raw"',), ("BUCKET_",)),
]


@pytest.mark.parametrize(("options", "sizes", "limit", "has_bucket", "words", "others"), HINTS)
def test_a_result_that_is_too_large_has_a_hint_how_it_would_fit(
    options: OutputOptions,
    sizes: Sequence[int],
    limit: int,
    has_bucket: bool,
    words: tuple[str, ...],
    others: tuple[str, ...],
) -> None:
    answer = inline(generation(images=["A" * size for size in sizes]))

    with pytest.raises(ResultTooLarge) as caught:
        choose_mode(answer, options, limit, has_bucket=has_bucket)

    hint = caught.value.hint or ""
    assert all(word in hint for word in words) and not any(word in hint for word in others), hint
