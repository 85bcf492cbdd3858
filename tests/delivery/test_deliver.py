"""How an answer leaves: complete, within the platform's limit, with its images in it or in a bucket."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from a1111_worker.context import JobContext
from a1111_worker.delivery.answer import (
    ENVELOPE_BYTES,
    LINK_BYTES,
    RUN_LIMIT,
    RUNSYNC_LIMIT,
    serialised_size,
    size_limit,
)
from a1111_worker.delivery.deliver import Delivery, save_images
from a1111_worker.domain import Generation, OutputOptions, Stage
from a1111_worker.errors import GenerationFailed, ResultTooLarge
from tests.delivery.support import ONE, PNG, BucketUnderTest, generation
from tests.images import INFOTEXT


def deliver(job_id: str, made: Generation, options: OutputOptions | None = None) -> dict[str, Any]:
    return Delivery().deliver(made, options or OutputOptions(), JobContext(job_id=job_id))


def test_the_webuis_answer_is_not_changed() -> None:
    made = generation()

    answer = deliver("job-1", made)

    assert "worker" not in made.answer
    assert {key: answer[key] for key in made.answer} == made.answer
    assert answer["images"][0] is PNG  # byte for byte, and never copied


def test_a_raw_answer_is_the_webuis_alone() -> None:
    made = generation()

    answer = deliver("job-1", made, OutputOptions(raw=True))

    assert answer == made.answer


def test_the_time_of_the_delivery_is_measured() -> None:
    context = JobContext(job_id="job-1")

    answer = Delivery().deliver(generation(), OutputOptions(), context)

    spent = context.times.seconds()
    assert spent["deliver"] > 0.0
    assert answer["worker"]["timings"]["deliver"] == round(spent["deliver"], 3)
    assert sum(spent[stage.value] for stage in Stage) == spent["deliver"]


# id, characters of the image, whether the platform takes it
LIMITS = [
    ("job-1", RUN_LIMIT - 5000, True),
    ("job-1", RUN_LIMIT, False),
    ("sync-1", RUN_LIMIT, True),  # /runsync takes twice as much
    ("sync-1", RUNSYNC_LIMIT, False),
]


@pytest.mark.parametrize(("job_id", "size", "fits"), LIMITS)
def test_a_result_that_the_platform_would_drop_is_an_error_with_its_size(job_id: str, size: int, fits: bool) -> None:
    made = generation(images=["A" * size])

    if fits:
        assert serialised_size(deliver(job_id, made)) + ENVELOPE_BYTES <= size_limit(job_id)
    else:
        with pytest.raises(ResultTooLarge, match=r"the result is \d+\.\d MB and RunPod takes \d+ MB"):
            deliver(job_id, made)


@pytest.mark.parametrize("broken", [float("nan"), b"bytes", "\ud800"])
def test_an_answer_that_is_not_strict_json_fails_the_job(broken: Any) -> None:
    with pytest.raises(GenerationFailed):
        deliver("job-1", generation(parameters={"x": broken}))


# -- with a bucket ----------------------------------------------------------------------------------------------------


def test_a_result_that_is_too_large_for_the_platform_goes_to_the_bucket(bucket: BucketUnderTest) -> None:
    large = random.Random(1).randbytes(RUN_LIMIT * 3 // 4)

    answer = bucket.deliver(large, options=OutputOptions())

    assert answer["images"] == [] and serialised_size(answer) < 2000 + LINK_BYTES
    assert requests.get(answer["worker"]["delivery"]["urls"][0], timeout=10).content == large


def test_a_result_that_fits_stays_in_the_answer_though_there_is_a_bucket(bucket: BucketUnderTest) -> None:
    answer = bucket.deliver(ONE, options=OutputOptions())

    assert answer["worker"]["delivery"]["mode"] == "inline"
    assert bucket.proxy.asked == []


# -- a local run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_a_local_runs_files_are_named_by_job_number_and_seed(tmp_path: Path, raw: bool) -> None:
    info = json.dumps({"index_of_first_image": 1, "infotexts": [INFOTEXT, INFOTEXT], "all_seeds": [7]})
    made = replace(generation(images=[PNG, PNG], info=info), seeds=(None, 42))  # a script's grid has none
    answer = deliver("local/../test", made, OutputOptions(raw=raw))

    written = save_images(tmp_path / "out", "local/../test", answer)

    assert [path.name for path in written] == ["local----test-1.png", "local----test-2-42.png"]
    assert written[0].read_bytes() == base64.b64decode(PNG)


def test_a_raw_answer_that_describes_other_images_than_it_has_names_no_seed(tmp_path: Path) -> None:
    info = json.dumps({"index_of_first_image": 1, "infotexts": [INFOTEXT, INFOTEXT], "all_seeds": [7]})
    answer = deliver("job", generation(images=[PNG], info=info), OutputOptions(raw=True))

    assert [path.name for path in save_images(tmp_path / "out", "job", answer)] == ["job-1.png"]
