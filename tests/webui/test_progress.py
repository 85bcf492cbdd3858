"""A caller sees progress that can be believed, whatever A1111 shows: held against recorded looks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import HeldModels, ImageFormat, Progress, Stage
from a1111_worker.images import detect_format, make_preview
from a1111_worker.webui.progress import PREVIEW_BYTES, GenerationProgress
from a1111_worker.webui.responses import WebUIProgress, parse_progress
from tests.images import png_bytes, to_base64
from tests.support import DATA, parse_generation, world


def reports(path: Path) -> list[Progress]:
    """The reports of a recorded generation."""
    case = json.loads(path.read_text())
    progress = GenerationProgress(case["request"]["body"])
    looks = case.get("progress_changes") or [each for each in case["progress"] if each["t"] < case["answer_at"]]
    found = [progress.report(parse_progress(look)) for look in looks]
    return [report for report in found if report is not None]


def recordings() -> list[Any]:
    return [
        pytest.param(path, id=f"{path.parent.parent.name}-{path.stem}")
        for path in sorted(DATA.glob("webui-*/progress/*.json"))
        if path.stem != "progress_20_then_4_steps"  # two jobs, and so two generations
    ]


@pytest.mark.parametrize("path", recordings())
def test_every_report_can_be_believed(path: Path) -> None:
    body = json.loads(path.read_text())["request"]["body"]

    found = reports(path)

    assert len(found) >= 3
    percents = [report.percent for report in found if report.percent is not None]
    assert percents == sorted(percents)
    assert all(0 <= percent < 100 for percent in percents)
    assert all(report.eta_s is None or report.eta_s > 0 for report in found)
    totals = {total for report in found for total in re.findall(r"step \d+ of (\d+)", report.detail)}
    assert totals <= {str(body["steps"]), str(body.get("hr_second_pass_steps", body["steps"]))}
    for report in found:
        if report.detail == "before the first step":
            assert report.eta_s is None


# each with what its job asks for, and the last details
IMG2IMG = [
    ("progress", {}, "step 30 of 31, image 1 of 1"),
    ("progress_batch", {"n_iter": 2}, "step 7 of 8, image 2 of 2"),
    ("progress_sd_upscale", {"script_name": "sd upscale"}, "step 4 of 5, image 1 of 1"),
]


@pytest.mark.parametrize(("name", "body", "last"), IMG2IMG)
def test_the_steps_of_an_img2img_are_those_that_are_done(name: str, body: dict[str, Any], last: str) -> None:
    """Of 40 steps with a strength of 0.75 A1111 does 31, and `info` says 40."""
    case = json.loads((DATA / "webui-1.10.1" / "img2img" / f"{name}.json").read_text())
    progress = GenerationProgress(body)
    keys = ("job", "job_count", "job_no", "sampling_step", "sampling_steps")

    found = []
    for done, *state in case["seen"]:
        look = {"progress": done, "eta_relative": 1.0, "state": dict(zip(keys, state, strict=True))}
        if (report := progress.report(parse_progress(look))) is not None:
            found.append(report)

    percents = [report.percent or 0 for report in found]
    assert percents == sorted(percents) and percents[-1] > 80
    assert found[0].detail == "before the first step"
    assert found[-1].detail == last


def test_an_adaptive_sampler_has_no_total_once_it_is_past_it() -> None:
    found = reports(DATA / "webui-1.10.1" / "progress" / "progress_4_steps_DPM_adaptive.json")

    details = [report.detail for report in found]
    assert details[0] == "before the first step"
    assert "step 4 of 4, image 1 of 1" in details
    assert details[-1] == "step 19, image 1 of 1"
    assert (found[-1].percent, found[-1].eta_s) == (99.0, None)


def test_the_second_pass_is_no_second_image() -> None:
    found = reports(DATA / "webui-1.9.3" / "progress" / "progress_hires_4_steps_second_2.json")

    details = [report.detail for report in found]
    assert "step 2 of 4, image 1 of 1" in details
    assert "second pass, image 1 of 1" in details  # its steps are still those of the first
    assert "step 1 of 2, second pass, image 1 of 1" in details


# (the body, a look as job_no + 1, job_count, step, steps, progress and eta), and the report
LOOKS: list[tuple[dict[str, Any], tuple[int, int, int, int, float, float], tuple[float, str, float | None]]] = [
    ({}, (1, 1, 0, 20, 0.01, 96.0), (0.0, "before the first step", None)),
    ({}, (1, 1, 3, 20, 0.16, 2.0), (16.0, "step 3 of 20, image 1 of 1", 2.0)),
    ({"n_iter": 3}, (2, 3, 0, 20, 0.34, 2.0), (34.0, "image 2 of 3", 2.0)),
    ({"n_iter": 3, "batch_size": 2}, (2, 3, 5, 20, 0.5, 2.0), (50.0, "step 5 of 20, batch 2 of 3", 2.0)),
    ({"n_iter": 2, "enable_hr": True}, (4, 4, 5, 20, 0.8, 2.0), (80.0, "step 5 of 20, second pass, image 2 of 2", 2.0)),
    ({"enable_hr": True}, (3, 2, 0, 20, 1.0, -0.04), (99.0, "second pass, image 1 of 1", None)),  # nearly done
    (
        {"enable_hr": True},
        (1, 3, 5, 20, 0.1, 2.0),
        (10.0, "step 5 of 20, image 1 of 3", 2.0),
    ),  # a script counts its own
]


@pytest.mark.parametrize(("body", "look", "expected"), LOOKS)
def test_a_look_becomes_a_report(
    body: dict[str, Any], look: tuple[int, int, int, int, float, float], expected: tuple[float, str, float | None]
) -> None:
    image, images, step, steps, progress, eta = look

    report = GenerationProgress(body).report(WebUIProgress(progress, eta, image, images, step, steps))

    percent, detail, left = expected
    assert report == Progress(Stage.GENERATE, percent, detail, left)


def test_without_a_generation_there_is_nothing_to_report() -> None:
    progress = GenerationProgress({})

    assert progress.report(WebUIProgress(0.0, 0.0, 1, 0, 0, 20)) is None
    assert progress.report(WebUIProgress(0.01, 9.0, 1, -1, 0, 20)) is None


def test_it_never_goes_back() -> None:
    progress = GenerationProgress({"n_iter": 2})
    looks = [(1, 15, 0.38), (2, 0, 0.51), (1, 0, 0.01), (2, 2, 0.4)]

    found = [progress.report(WebUIProgress(done, 1.0, image, 2, step, 20)) for image, step, done in looks]

    assert [report.percent for report in found if report] == [38.0, 51.0, 51.0, 51.0]


def test_a_job_with_an_adaptive_sampler_reports_no_more_than_it_knows(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.ask(steps=20)  # whose number of steps the first looks at the next job show
        it.webui.step_seconds = it.webui.encode_seconds = 0.05
        seen: list[Progress] = []
        job = {"prompt": "a lighthouse", "steps": 4, "width": 64, "height": 64, "sampler_name": "DPM adaptive"}
        request = it.worker.generator.resolve(parse_generation(job, it.worker.limits))

        it.worker.generator.start(request, HeldModels(), JobContext(Deadline(20), seen.append)).discard()

    details = {report.detail for report in seen if report.stage is Stage.GENERATE}
    assert "before the first step" in details
    assert not any("of 20" in detail for detail in details)
    assert {"step 19, image 1 of 1", "step 3 of 4, image 1 of 1"} & details
    assert all(report.eta_s is None or report.eta_s > 0 for report in seen)


def test_each_report_carries_the_newest_preview() -> None:
    progress = GenerationProgress({})
    grey, red = (to_base64(png_bytes(Image.new("RGB", (16, 16), colour))) for colour in ("grey", "red"))
    looks = [None, grey, None, "broken", red, None]

    found = [progress.report(WebUIProgress(0.5, 1.0, 1, 1, 5, 20, preview=look)) for look in looks]

    shown = [report.facts.get("preview") for report in found if report]
    first, second = make_preview(grey, PREVIEW_BYTES), make_preview(red, PREVIEW_BYTES)
    assert first != second
    assert shown == [None, first, first, first, second, second]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_webui_is_asked_for_pictures_only_if_the_job_wants_previews(tmp_path: Path, wanted: bool) -> None:
    with world(tmp_path) as it:
        it.webui.step_seconds = 0.02
        seen: list[Progress] = []
        job = {"prompt": "a lighthouse", "steps": 40, "width": 64, "height": 64, "preview": wanted}
        request = it.worker.generator.resolve(parse_generation(job, it.worker.limits))
        before = len(it.webui.asked)

        it.worker.generator.start(request, HeldModels(), JobContext(Deadline(20), seen.append)).discard()

    looks = [asked.query for asked in it.webui.asked[before:] if asked.path.endswith("/progress")]
    assert {"true"} <= {look["skip_current_image"] for look in looks} <= {"true", *(["false"] if wanted else [])}
    pictures = {report.facts["preview"] for report in seen if "preview" in report.facts}
    assert bool(pictures) is wanted
    assert {detect_format(str(picture)) for picture in pictures} <= {ImageFormat.JPEG}
    assert "preview" not in it.generations()[-1]
