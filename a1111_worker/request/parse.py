"""Where a job enters: its raw input becomes the request of its task, or a list of everything that is wrong with it.

`task` chooses the table: field by field, what a job of this task may contain. No module after this one sees the raw
input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from a1111_worker.domain import HealthRequest, ModelsRequest, Request, Task
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.fields import TASK, Field, Limits
from a1111_worker.request.generating import read_img2img, read_txt2img
from a1111_worker.request.img2img import img2img_fields
from a1111_worker.request.queries import no_fields, png_info_fields, prefetch_fields, read_png_info, read_prefetch
from a1111_worker.request.reader import InputReader
from a1111_worker.request.txt2img import txt2img_fields
from a1111_worker.request.upscale import read_upscale, upscale_fields
from a1111_worker.request.values import InvalidValue, describe_value


def parse_request(raw: object, limits: Limits) -> Request:
    """The job's input, checked as far as that is possible without a WebUI. InvalidRequest holds every complaint."""
    if raw is None:
        raise InvalidRequest([Complaint("input", 'is missing: a job is {"input": {"prompt": "…"}}')])
    if not isinstance(raw, dict):
        raise InvalidRequest([Complaint("input", f"must be an object, not {describe_value(raw)}")])
    if (other := _format_of_another_worker(raw)) is not None:
        raise InvalidRequest([Complaint("input", other)])
    form = FORMS[_task_of(raw)]
    reader = InputReader(raw, form.fields(limits), limits)
    request = form.read(reader)
    reader.raise_complaints()
    return request


@dataclass(frozen=True)
class Form:
    """What a job of a task may contain, and how its request is made of the checked fields."""

    fields: Callable[[Limits], Mapping[str, Field]]
    read: Callable[[InputReader], Request]


FORMS: Mapping[Task, Form] = {
    Task.TXT2IMG: Form(txt2img_fields, read_txt2img),
    Task.IMG2IMG: Form(img2img_fields, read_img2img),
    Task.UPSCALE: Form(upscale_fields, read_upscale),
    Task.PNG_INFO: Form(png_info_fields, read_png_info),
    Task.MODELS: Form(no_fields, lambda _reader: ModelsRequest()),
    Task.PREFETCH: Form(prefetch_fields, read_prefetch),
    Task.HEALTH: Form(no_fields, lambda _reader: HealthRequest()),
}


def names_task(raw: object, task: Task) -> bool:
    """Whether a raw input names this task: how long a job may take must be known before the whole input is read."""
    return isinstance(raw, dict) and raw.get("task") == task.value


def _format_of_another_worker(raw: Mapping[Any, Any]) -> str | None:
    """The complaint about a job that was written for another worker of this kind, None if it was not."""
    if "prompt" not in raw and isinstance(raw.get("payload"), dict) and {"api", "endpoint"} & raw.keys():
        return (
            "has the format of ashleykleynhans/runpod-worker-a1111 (api and payload): "
            "here the fields of payload are the input itself, and task says what is done with them"
        )
    if "prompt" not in raw and isinstance(raw.get("workflow"), dict):
        return (
            "has the format of runpod-workers/worker-comfyui (workflow): this worker runs no ComfyUI; "
            'it takes the body of A1111\'s txt2img: {"input": {"prompt": "…"}}'
        )
    return None


def _task_of(raw: Mapping[Any, Any]) -> Task:
    """The task of a job. The other fields of a job whose task is unknown mean nothing yet."""
    name = raw.get("task")
    if name is None:
        return Task.TXT2IMG
    try:
        return Task(TASK.value.check(name))
    except InvalidValue as error:
        raise InvalidRequest([Complaint("task", message) for _, message in error.problems]) from error
