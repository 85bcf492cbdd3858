"""The pages agree with the code: lists are complete, links have a target, examples are accepted."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator

import handler
from a1111_worker import __version__, context, domain, errors
from a1111_worker.catalog import LORAS
from a1111_worker.config import SETTINGS, Config
from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.answer import Delivered, build_answer
from a1111_worker.domain import AppliedLora, Generation, Model, ModelKind, OutputOptions, PictureFacts, Stage, Task
from a1111_worker.job.shutdown import job_seconds
from a1111_worker.models.civitai_responses import POLICY
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.request.extensions import adetailer_keys, controlnet_keys
from a1111_worker.request.fields import (
    CHECKPOINT_OPTION,
    INERT_OPTIONS,
    MAX_LORAS,
    OUTPUT,
    OVERRIDABLE_OPTIONS,
    Field,
    FieldClass,
    Limits,
)
from a1111_worker.request.img2img import img2img_fields
from a1111_worker.request.json_schema import job_schema
from a1111_worker.request.parse import FORMS, parse_request
from a1111_worker.request.txt2img import txt2img_fields
from a1111_worker.request.upscale import upscale_fields
from a1111_worker.request.values import ValueType
from a1111_worker.webui.timings import WebUITimings
from image.pins import PINS, read_pins
from tests.support import ROOT
from tests.test_architecture import HTTP, MODULES, PACKAGES

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
ATLAS = DOCS / "project-atlas.md"
API = DOCS / "subsystems" / "api-gateway.md"
CONTAINER = DOCS / "subsystems" / "container-management.md"
RESOURCES = DOCS / "subsystems" / "resource-management.md"
HANDLER = DOCS / "modules" / "handler-module.md"
START_SH = DOCS / "modules" / "startup-script.md"
FLOW = DOCS / "workflows" / "request-flow.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


JOB = Draft202012Validator(job_schema())

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# -- reading a page


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next heading of the same or a higher rank."""
    text = page.read_text(encoding="utf-8")
    # Inside a fenced block, `# …` is a comment and not a heading.
    plain = re.sub(r"^```.*?^```$", lambda code: code[0].replace("#", " "), text, flags=re.MULTILINE | re.DOTALL)
    found = re.search(rf"^(#+) {re.escape(heading)}\n", plain, re.MULTILINE)
    assert found, f"{name_of(page)} has no heading {heading!r}"
    end = re.compile(rf"^#{{1,{len(found[1])}}} ", re.MULTILINE).search(plain, found.end())
    return text[found.end() : end.start() if end else len(text)]


def table(page: Path, heading: str, first_column: str) -> dict[str, tuple[str, ...]]:
    """The table under a heading whose first column has this name. Returns each row's other cells by its first cell.

    The first cell is returned without its backticks.
    """
    lines = iter(section(page, heading).splitlines())
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            next(lines)
            break
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
        rows[first.strip("`")] = tuple(others)
    assert rows, f"{name_of(page)} has no table {first_column!r} under {heading!r}"
    return rows


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def outside_of_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", outside_of_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- lists


def test_every_setting_is_described_with_its_default() -> None:
    rows = table(CONTAINER, "Settings", "name")

    assert {name: cells[0] for name, cells in rows.items()} == {
        setting.name: f"`{setting.default}`" if _is_literal(setting.default) else setting.default
        for setting in SETTINGS
    }
    assert all(cells[1] for cells in rows.values())


def _is_literal(default: str) -> bool:
    return " " not in default and default != "none"


def test_the_readme_shows_six_settings_with_the_same_defaults() -> None:
    rows = table(README, "Settings", "name")
    defaults = {name: cells[0].replace("`", "") for name, cells in table(CONTAINER, "Settings", "name").items()}

    assert len(rows) == 6
    assert {name: cells[0].replace("`", "") for name, cells in rows.items()} == {name: defaults[name] for name in rows}


def error_classes() -> dict[str, type[errors.WorkerError]]:
    """Every class that has a code of its own, by its code."""
    return {
        error.code: error
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.WorkerError) and "code" in vars(error) and error is not errors.WorkerError
    }


def test_every_error_code_is_described_with_what_it_means_for_the_caller() -> None:
    rows = table(API, "Errors", "code")

    assert set(rows) == set(error_classes())
    for code, (when, retryable, refresh) in rows.items():
        assert when
        assert retryable == ("yes" if error_classes()[code].retryable else "no"), code
        assert refresh.split(";")[0] == ("yes" if error_classes()[code].refresh_worker else "no"), code


def test_every_key_of_a_failed_jobs_answer_is_described() -> None:
    answer = errors.InvalidRequest("it is wrong", hint="correct it").answer()

    assert list(table(API, "Errors", "key")) == list(answer)


def test_the_readme_says_what_to_do_about_every_error_code() -> None:
    rows = table(README, "Troubleshooting", "code")

    assert set(rows) == set(error_classes())
    assert all(cells[0] for cells in rows.values())


HEADINGS = {
    FieldClass.OURS: "Fields that the worker interprets",
    FieldClass.CHECKED: "Fields checked against the WebUI's live lists",
    FieldClass.PASSED: "Fields checked for type and range, then passed on unchanged",
}


@pytest.mark.parametrize("kind", HEADINGS, ids=lambda kind: kind.value)
def test_every_field_of_a_job_is_described_with_its_type_and_range(kind: FieldClass) -> None:
    rows = {name: cells[:2] for name, cells in table(API, HEADINGS[kind], "field").items()}

    table_of_task = txt2img_fields(Limits()).items()
    fields = {name: field.value for name, field in table_of_task if field.kind is kind and name != "task"}
    assert rows == {name: (value.type, value.expected) for name, value in fields.items()}


def test_every_field_of_img2img_that_txt2img_does_not_have_is_described() -> None:
    rows = {name: cells[:2] for name, cells in table(API, "img2img", "field").items()}

    shared = txt2img_fields(Limits())
    more = {name: field for name, field in img2img_fields(Limits()).items() if name not in shared or name in rows}
    assert rows == {
        name: ("refused", field.reason)
        if field.kind is FieldClass.REFUSED
        else (field.value.type, field.value.expected)
        for name, field in more.items()
    }


def test_every_field_of_upscale_is_described() -> None:
    rows = {name: cells[:2] for name, cells in table(API, "upscale", "field").items()}

    fields = {name: field.value for name, field in upscale_fields(Limits()).items() if name != "task"}
    assert rows == {name: (value.type, value.expected) for name, value in fields.items()}


def test_every_task_is_described() -> None:
    rows = table(API, "Tasks", "task")

    assert set(rows) == {task.value for task in Task} == {task.value for task in FORMS}
    for task, (example, *_) in rows.items():
        given = json.loads(example.strip("`"))
        assert given.get("task", "txt2img") == task
        parse_request(given, Limits())
        JOB.validate({"input": given})


@pytest.mark.parametrize(("heading", "task"), [("PNG info", Task.PNG_INFO), ("Prefetch", Task.PREFETCH)])
def test_every_field_of_a_query_is_described_with_its_type_and_range(heading: str, task: Task) -> None:
    rows = {name: cells[:2] for name, cells in table(API, heading, "field").items()}

    fields = {name: field.value for name, field in FORMS[task].fields(Limits()).items() if name != "task"}
    assert rows == {name: (value.type, value.expected) for name, value in fields.items()}


def test_every_refused_field_is_described_with_the_reason() -> None:
    rows = table(API, "Fields that are refused", "field")

    assert rows == {
        name: (field.reason, ", ".join(_dropped_if(field)))
        for name, field in txt2img_fields(Limits()).items()
        if field.kind is FieldClass.REFUSED
    }


def _dropped_if(field: Field) -> Iterator[str]:
    yield from (f"`{json.dumps(value)}`" for value in field.ignored_values)
    if field.only_with:
        yield f"or without `{field.only_with}`"


@pytest.mark.parametrize(("example", "cells"), table(API, "Tasks", "bad `input`").items(), ids=str)
def test_every_bad_input_that_is_shown_gets_the_complaint_that_is_shown(example: str, cells: tuple[str, ...]) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        parse_request(json.loads(example), Limits())

    (complaint,) = refused.value.complaints
    shown, is_cut, _ = cells[0].removeprefix("`").partition("` …")
    assert str(complaint).startswith(shown) if is_cut else str(complaint) == shown.removesuffix("`")


def test_every_dropped_field_is_described_with_the_reason() -> None:
    rows = table(API, "Fields that are dropped", "field")

    described = {name: cells for names, cells in rows.items() for name in re.findall(r"\w+", names)}
    assert described == {
        name: (field.value.expected, field.reason)
        for name, field in txt2img_fields(Limits()).items()
        if field.kind is FieldClass.DROPPED
    }


def test_every_option_that_is_dropped_is_described() -> None:
    text = section(API, "Settings a job may override")

    assert [name for name in (*INERT_OPTIONS, CHECKPOINT_OPTION) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(("column", "keys"), [("key", controlnet_keys), ("key of ADetailer", adetailer_keys)])
def test_every_key_of_a_unit_is_described_with_its_type_and_range(
    column: str, keys: Callable[[Limits], Mapping[str, ValueType]]
) -> None:
    rows = table(API, "ControlNet and ADetailer", column)

    assert {name: cells[:2] for name, cells in rows.items()} == {
        name: (value.type, value.expected) for name, value in keys(Limits()).items()
    }


def test_every_setting_a_job_may_override_is_described() -> None:
    rows = table(API, "Settings a job may override", "setting")

    assert rows == {
        name: (f"`{json.dumps(setting.default)}`", setting.value.expected)
        for name, setting in OVERRIDABLE_OPTIONS.items()
    }


def test_every_output_option_is_described_with_its_default() -> None:
    rows = table(API, "Output options", "key")
    defaults = {name: getattr(OutputOptions(), name) for name in OUTPUT if name != "quality"}

    assert {name: cells[0] for name, cells in rows.items()} == {name: value.expected for name, value in OUTPUT.items()}
    for name, default in defaults.items():
        assert rows[name][1] == f"`{json.dumps(default)}`".replace('"', "")


def test_the_catalog_is_described_as_it_is() -> None:
    rows = table(API, "LoRAs", "name")

    assert rows == {lora.stem: (lora.title, str(lora.version_id), str(lora.scale)) for lora in LORAS}
    assert f"at most {MAX_LORAS}" in section(API, "LoRAs")


def test_every_field_of_the_worker_block_is_described() -> None:
    model = Model(ModelKind.LORA, "a", "a.safetensors", Path("a"), "0" * 64, 1)
    loras, pictures = (AppliedLora("a", 1.0, model, loaded=True),), (PictureFacts(1, 1, 1, 1),)
    generation = Generation({"images": []}, model, loras, (1,), "", pictures=pictures)
    answer = build_answer(generation, Delivered(), JobContext(Deadline()).times.seconds())

    described = " ".join(table(API, "The answer", "field"))

    for name, value in answer["worker"].items():
        assert re.search(rf"(^|[ `]){name}\b", described), name
        inner = value[0] if isinstance(value, list) and value else value
        for key in inner if isinstance(inner, dict) and name != "timings" else ():
            assert re.search(rf"\b{name}\S*\.{key}\b|`\.{key}\b", described), f"{name}.{key}"
    assert all(f"`{stage.value}`" in section(API, "The answer") for stage in Stage)


def test_the_time_of_a_job_with_a_short_policy_is_as_described() -> None:
    patience = WebUITimings().interrupt_patience

    for policy, (described, *_) in table(FLOW, "Time", "policy.executionTimeout").items():
        job = {"policy": {"executionTimeout": int(policy)}}
        seconds = job_seconds(job, Config.from_env({}).job_timeout, interrupt_patience=patience)
        assert described.startswith(f"{seconds:g} s"), policy


def test_every_stage_is_described_with_what_status_shows() -> None:
    assert set(table(FLOW, "Progress", "stage")) == {stage.value for stage in Stage}
    assert {"parse", "pictures", "names", *(stage.value for stage in Stage)} == set(table(FLOW, "Stages", "stage"))


def test_every_answer_of_civitai_is_described_with_what_it_ends_as() -> None:
    rows = table(RESOURCES, "CivitAI's answers", "answer")

    assert {answer: cells[0] for answer, cells in rows.items()} == {
        refusal.value: f"`{rule.error.code}`" for refusal, rule in POLICY.items()
    }
    assert {answer for answer, cells in rows.items() if cells[1]} == {
        refusal.value for refusal, rule in POLICY.items() if rule.try_other_origins or rule.retries
    }


def test_the_sidecar_that_is_shown_has_the_keys_that_are_written() -> None:
    (shown,) = blocks(RESOURCES, "json")
    record = ModelRecord(ModelKind.LORA, "a", "a.safetensors", "0" * 64, 1)

    written = json.loads(record.to_json())

    assert set(json.loads(shown)) == set(written)
    keys = re.findall(r"`(\w+)`", "".join(f"`{row}`" for row in table(RESOURCES, "What is known about a model", "key")))
    assert set(keys) == set(written)


def test_every_setting_that_start_sh_reads_is_described() -> None:
    script = (ROOT / "start.sh").read_text(encoding="utf-8")
    read = dict(re.findall(r'^ +(?:export )?([A-Z_]+)="\$\{\1:?-([^}$(]*)', script, re.MULTILINE))

    shared = {setting.name for setting in SETTINGS}
    own = table(START_SH, "Settings", "name")
    named = {name: default for row, cells in own.items() for name, default in _pairs(row, cells[0])}

    assert named == {name: default for name, default in read.items() if name not in shared}


def _pairs(names: str, defaults: str) -> Iterator[tuple[str, str]]:
    return zip(re.findall(r"[A-Z_]+", names), re.findall(r"[\w/.-]+", defaults), strict=True)


def test_every_function_of_start_sh_that_is_described_exists() -> None:
    script = (ROOT / "start.sh").read_text(encoding="utf-8")

    steps = table(START_SH, "start.sh: what it does, and in which order", "step")

    defined = re.findall(r"^(\w+)\(\) \{", script, re.MULTILINE)
    assert {cells[0].strip("`") for cells in steps.values()} <= set(defined)


def image_arguments() -> dict[str, str]:
    given = re.findall(r"^ARG (\w+)=(.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(given)


def test_every_argument_of_the_image_is_described_with_its_default() -> None:
    rows = {name: cells[0] for name, cells in table(CONTAINER, "Image arguments", "argument").items()}

    assert set(rows) == set(image_arguments())
    for name, default in image_arguments().items():
        # Only the Dockerfile contains addresses and commits.
        if "://" in default or re.fullmatch(r"[0-9a-f]{40}", default):
            assert rows[name] and default not in rows[name]
        else:
            assert rows[name] == (f"`{default}`" if default else "empty"), name


# -- the tree


def test_every_file_that_the_build_brings_is_described_with_its_licence() -> None:
    assert table(CONTAINER, "Upscalers and faces", "file") == {
        str(pin.path): (f"`{pin.argument}`: {' or '.join(f'`{word}`' for word in pin.words)}", pin.licence)
        for pin in read_pins(PINS.read_text(encoding="utf-8"))
    }


def test_every_package_is_described() -> None:
    rows = table(ATLAS, "The packages", "package")

    assert list(rows) == ["root modules", *PACKAGES[1:]]
    assert all(cells[0] for cells in rows.values())


def test_the_atlas_shows_the_order_of_packages_that_the_imports_are_checked_against() -> None:
    (drawn,) = re.findall(r"^root modules ← .*$", ATLAS.read_text(encoding="utf-8"), re.MULTILINE)

    assert drawn.split(" ← ") == ["root modules", *PACKAGES[1:], "model_manager.py", "handler.py"]


def test_the_atlas_names_every_module_that_speaks_http() -> None:
    (rule,) = re.findall(r"^- Only ([^.]*) speak HTTP\.$", ATLAS.read_text(encoding="utf-8"), re.MULTILINE)

    assert set(re.findall(r"`([^`]+)`", rule)) == {module.replace(".", "/") for module in HTTP}


def test_every_noun_is_described() -> None:
    described = re.findall(r"\w+", " ".join(table(ATLAS, "The nouns", "noun")))

    assert sorted(described) == sorted(
        name
        for module in (domain, context)
        for name, noun in inspect.getmembers(module, inspect.isclass)
        if noun.__module__ == module.__name__ and not name.startswith("_")
    )


def test_run_job_makes_every_call_that_is_described() -> None:
    source = inspect.getsource(handler.run_job) + inspect.getsource(handler.generate)

    described = table(HANDLER, "handler.py: what it does, and in which order", "call")

    assert [call for call in described if call not in source] == []


# -- commands, files, links


@every_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    named = set(re.findall(r"(?:`|^|\$ )make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))

    assert named <= targets


@every_page
def test_every_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_of_code(page)):
        if urlsplit(link).scheme:
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_every_file_that_is_named_by_its_path_is_there(page: Path) -> None:
    named = re.findall(
        r"`((?:a1111_worker|tests|sandbox|benchmarks|docs|image|\.runpod|\.ci)/[\w./-]*)`", page.read_text()
    )

    assert [name for name in named if not (ROOT / name).exists()] == []


@every_page
def test_every_module_that_is_named_is_there(page: Path) -> None:
    packages = "|".join(PACKAGES[1:])
    named = re.findall(rf"`((?:{packages})/\w+)`", page.read_text(encoding="utf-8"))

    assert [name for name in named if name.replace("/", ".") not in MODULES] == []


@every_page
def test_every_fenced_block_is_closed_and_every_diagram_is_complete(page: Path) -> None:
    fences = re.findall(r"^\s*(```\S*)", page.read_text(encoding="utf-8"), re.MULTILINE)

    assert [fence == "```" for fence in fences] == [number % 2 == 1 for number in range(len(fences))]
    for diagram in blocks(page, "mermaid"):
        first = diagram.split()[0]
        assert first in ("flowchart", "sequenceDiagram", "stateDiagram-v2")
        ends = sum(line.strip() == "end" for line in diagram.splitlines())
        begins = re.findall(r"^\s*(?:subgraph|loop|opt|alt|par|rect|critical)\b", diagram, re.MULTILINE)
        assert ends == len(begins), diagram


def test_the_index_lists_every_page() -> None:
    index = DOCS / "README.md"

    linked = {
        (DOCS / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.md)\)", index.read_text(encoding="utf-8"))
    }

    assert linked == {page for page in DOCS.rglob("*.md") if page != index}


FOREIGN = (
    r"/work\b",  # the folder in which the pages were written
    r"/tmp/(?!webui-models|webui-data|webui\.state|worker\.state\.json)",
    r"\bfact sheet|\bissue \d|\bsession\b",
    r"pypi\.org|download\.pytorch\.org|ghcr\.io|docker\.io|registry\.npmjs",  # only the Dockerfile names these
    r"\bTODO\b|\bFIXME\b|\bXXX\b",
)


@every_page
def test_no_page_names_the_place_in_which_it_was_written(page: Path) -> None:
    found = [match for pattern in FOREIGN for match in re.findall(pattern, page.read_text(encoding="utf-8"))]

    assert found == []


# -- examples


def jobs() -> Iterator[tuple[str, dict[str, object]]]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "json")):
            if block.lstrip().startswith('{"input"') or block.lstrip().startswith('{\n  "input"'):
                yield f"{name_of(page)}-{number}", json.loads(block)


@pytest.mark.parametrize("job", [pytest.param(job, id=name) for name, job in jobs()])
def test_every_example_of_a_job_is_accepted(job: dict[str, object]) -> None:
    parse_request(job["input"], Limits())  # it raises what is wrong
    JOB.validate(job)


def test_the_answers_that_are_shown_are_valid() -> None:
    shown = json.loads(blocks(README, "json")[1])
    (error,) = [block for block in blocks(API, "json") if block.startswith('{"error"')]

    for answer, name in ((shown, "generation_answer"), (json.loads(error), "error_answer")):
        Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": job_schema()["$defs"]}).validate(answer)


def test_the_readmes_example_is_what_the_demo_runs() -> None:
    shown = json.loads(blocks(README, "json")[0])

    assert shown == json.loads((ROOT / "test_input.json").read_text(encoding="utf-8"))


def test_the_readmes_answer_has_the_worker_block_of_a_real_answer() -> None:
    shown = json.loads(blocks(README, "json")[1])["worker"]
    model = Model(ModelKind.LORA, "a", "a.safetensors", Path("a"), "0" * 64, 1)
    loras, pictures = (AppliedLora("a", 1.0, model, loaded=True),), (PictureFacts(1, 1, 1, 1),)
    generation = Generation({"images": []}, model, loras, (1,), "", pictures=pictures)

    real = build_answer(generation, Delivered(), JobContext(Deadline()).times.seconds())["worker"]

    assert {name: _shape(value) for name, value in shown.items()} == {n: _shape(value) for n, value in real.items()}


def _shape(value: object) -> object:
    if isinstance(value, dict):
        return list(value)
    if isinstance(value, list):
        return [_shape(item) for item in value if isinstance(item, dict)]
    return type(value).__name__


def test_the_changelog_begins_with_the_version_that_the_worker_has() -> None:
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)

    assert released[0] == __version__
