"""The JSON Schema of jobs and answers: made from the tables, and true of every job that the door takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from a1111_worker.domain import Task
from a1111_worker.errors import InvalidRequest
from a1111_worker.request.json_schema import job_schema
from a1111_worker.request.parse import parse_request
from tests.request.helpers import LIMITS
from tests.request.test_img2img import picture
from tests.request.test_parse import JOBS
from tests.support import DETAIL, ROOT, world
from tests.webui.test_clients import bodies

SCHEMA = job_schema()
JOB = Draft202012Validator(SCHEMA)


def validator(name: str) -> Draft202012Validator:
    """Of one of the schema's definitions."""
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)

    assert {task.value for task in Task} <= set(SCHEMA["$defs"])


def test_the_handler_prints_the_schema_that_is_in_the_docs() -> None:
    printed = subprocess.run(
        [sys.executable, "handler.py", "--schema"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout

    assert json.loads(printed) == SCHEMA
    assert (ROOT / "docs" / "schema.json").read_text(encoding="utf-8") == printed, (
        "python handler.py --schema > docs/schema.json"
    )


@settings(deadline=None, max_examples=200)
@given(JOBS)
def test_every_job_that_is_taken_is_valid(raw: Any) -> None:
    try:
        parse_request(raw, LIMITS)
    except InvalidRequest:
        return

    assert [error.message for error in JOB.iter_errors({"input": raw})] == []


@pytest.mark.parametrize("body", list(bodies()))
def test_what_clients_send_is_valid(body: dict[str, Any]) -> None:
    JOB.validate({"input": body})


# an input that no worker takes, and the definition that it would have to be valid against
INVALID = [
    ({"prompt": 5}, "txt2img"),
    ({"steps": 30}, "txt2img"),
    ({"prompt": "x", "steps": 0}, "txt2img"),
    ({"prompt": "x", "steps": "many"}, "txt2img"),
    ({"prompt": "x", "width": 65}, "txt2img"),
    ({"prompt": "x", "num_inference_steps": 5}, "txt2img"),
    ({"prompt": "x", "on_lora_error": "ignore"}, "txt2img"),
    ({"prompt": "x", "loras": [{"url": "x", "weight": 1}]}, "txt2img"),
    ({"prompt": "x", "output": {"format": "gif"}}, "txt2img"),
    ({"prompt": "x", "checkpoint": ["other"]}, "txt2img"),
    ({"prompt": "x", "task": "health"}, "txt2img"),
    ({"task": "img2img", "prompt": "x"}, "img2img"),
    ({"task": "upscale", "image": 5}, "upscale"),
    ({"task": "upscale", "imageList": [{"name": "no data"}]}, "upscale"),
    ({"task": "prefetch", "loras": "x"}, "prefetch"),
    ({"task": "health", "prompt": "x"}, "health"),
]


@pytest.mark.parametrize(("job", "task"), INVALID)
def test_what_no_worker_takes_is_invalid(job: dict[str, Any], task: str) -> None:
    assert not validator(task).is_valid(job)
    assert not JOB.is_valid({"input": job})


UPSCALE = {"task": "upscale", "upscaler_1": "Lanczos"}


@pytest.mark.parametrize(
    "job",
    [
        {"task": "img2img", "init_images": [picture()], "mask": picture(), "mask_blur": "4", "denoising_strength": 0.5},
        {**UPSCALE, "image": picture(), "upscaling_resize": 1.5},
        {**UPSCALE, "imageList": [{"data": picture(), "name": "x"}, picture()], "output": {"format": "webp"}},
    ],
)
def test_a_job_with_pictures_is_valid(job: dict[str, Any]) -> None:
    parse_request(job, LIMITS)

    JOB.validate({"input": job})


def test_real_answers_are_valid(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        answers = {
            "generation_answer": it.ask(loras=[{"version_id": DETAIL}, {"name": "nobody"}], on_lora_error="warn"),
            "upscale_answer": it.run({"id": "4", "input": {**UPSCALE, "image": picture()}}),
            "png_info_answer": it.run({"id": "0", "input": {"task": "png_info", "image": it.ask()["images"][0]}}),
            "models_answer": it.run({"id": "1", "input": {"task": "models"}}),
            "prefetch_answer": it.run({"id": "2", "input": {"task": "prefetch", "loras": [DETAIL, "nobody"]}}),
            "health_answer": it.run({"id": "3", "input": {"task": "health"}}),
            "error_answer": it.ask(steps=0),
        }

    for name, answer in answers.items():
        validator(name).validate(answer)
    assert set(answers) == {name for name in SCHEMA["$defs"] if name.endswith("_answer")}
