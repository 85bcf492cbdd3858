"""The commands that use an endpoint: draw, upscale, batch, models, prefetch, health, cancel."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from a1111_client.batch import Batch, end_last_line, left_to_do, read_jobs
from a1111_client.credentials import data_folder
from a1111_client.endpoint import Endpoint
from a1111_client.errors import EndpointError
from a1111_client.pictures import contact_sheet, fetch_all, make_folder, read_base64, save, stems
from a1111_client.snapshot import Snapshot, SnapshotStore
from a1111_client.terminal import (
    FAILED,
    AsJson,
    Bars,
    EndpointId,
    Url,
    errors,
    follow,
    print_json,
    print_table,
    run,
    status_of,
    the_endpoint,
)

Out = Annotated[Path, typer.Option("--out", help="The folder for pictures.", metavar="DIR")]
_HERE = Path()


def add_to(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (draw, upscale, batch, models, prefetch, health, cancel):
        app.command()(command)


def draw(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    endpoint: EndpointId = "",
    url: Url = "",
    negative: Annotated[str, typer.Option(help="What it must not show.")] = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="NAME, CivitAI URL, AIR or version id, with :SCALE.", metavar="LORA[:SCALE]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    cfg: Annotated[float | None, typer.Option(help="How closely the prompt is followed.")] = None,
    sampler: Annotated[str, typer.Option(help='Such as "DPM++ 2M Karras".')] = "",
    seed: Annotated[int | None, typer.Option(help="The seed; without one it is random.")] = None,
    checkpoint: Annotated[str, typer.Option(help="One of the endpoint's checkpoints.")] = "",
    n: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 1,
    init: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White is drawn anew; with --init.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --init may change, 0 to 1.")] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", help="Any other field of a job.", metavar="NAME=JSON")
    ] = None,
    out: Out = _HERE,
    sheet: Annotated[bool, typer.Option("--sheet", help="Also write all pictures on one: sheet.png.")] = False,
    json_to: Annotated[
        str, typer.Option("--json", help="Write what the worker tells there, without pictures; - is standard output.")
    ] = "",
) -> None:
    """Draw pictures. Files are named by their seeds, and carry the settings. Ctrl-C cancels the job."""
    with errors(as_json=json_to == "-"):
        given: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative or None,
            "loras": [parse_lora(text) for text in lora or ()] or None,
            "steps": steps,
            "width": width,
            "height": height,
            "cfg_scale": cfg,
            "sampler_name": sampler or None,
            "seed": seed,
            "checkpoint": checkpoint or None,
            "n_iter": n if n > 1 else None,
            "denoising_strength": strength,
            **dict(_parse_field(text) for text in field or ()),
        }
        if init is not None:
            given |= {"task": "img2img", "init_images": [read_base64(init)]}
        if mask is not None:
            if init is None:
                raise EndpointError("BAD_OPTION", "--mask needs --init")
            given["mask"] = read_base64(mask)
        given = {name: value for name, value in given.items() if value is not None}
        _draw(the_endpoint(endpoint, url), given, out, sheet=sheet, json_to=json_to)


def upscale(
    files: Annotated[list[Path], typer.Argument(help="Pictures.")],
    endpoint: EndpointId = "",
    url: Url = "",
    by: Annotated[float, typer.Option(help="How many times as wide and high.")] = 2.0,
    upscaler: Annotated[str, typer.Option(help="One of the endpoint's upscalers.")] = "R-ESRGAN 4x+",
    out: Out = _HERE,
    json_to: Annotated[
        str, typer.Option("--json", help="Write what the worker tells there, without pictures; - is standard output.")
    ] = "",
) -> None:
    """Make pictures larger. The new files are named after the old ones."""
    with errors(as_json=json_to == "-"):
        # The WebUI wants a name; one that is no Unicode cannot be sent.
        pictures = [{"data": read_base64(file), "name": file.name.encode(errors="replace").decode()} for file in files]
        given = {"task": "upscale", "imageList": pictures, "upscaling_resize": by, "upscaler_1": upscaler}
        names = [f"{file.stem}-x{by:g}" for file in files]
        _draw(the_endpoint(endpoint, url), given, out, names=names, json_to=json_to)


def _draw(
    endpoint: Endpoint,
    given: Mapping[str, Any],
    out: Path,
    *,
    names: list[str] | None = None,
    sheet: bool = False,
    json_to: str = "",
) -> None:
    """Run a job and write its pictures, under these `names` or their seeds. Raises EndpointError."""
    from a1111_client.gateway.errors import ApiError
    from a1111_client.gateway.sizes import fit

    try:
        fitting = fit(dict(given))
    except ApiError as error:
        raise EndpointError("REQUEST_TOO_LARGE", str(error.body["detail"])) from None
    make_folder(out)

    async def work() -> tuple[dict[str, Any], list[bytes]]:
        async with endpoint:
            with Bars() as bars:
                async with endpoint.job(fitting) as job:
                    answer = await follow(job, bars, bars.add("draw"))
                return answer, await fetch_all(endpoint, answer)

    answer, pictures = run(work(), as_json=json_to == "-")
    files = save(out, pictures, names if names and len(names) == len(pictures) else stems(answer, len(pictures)))
    if sheet and pictures:
        files += save(out, [contact_sheet(pictures)], ["sheet"])
    told = {**{key: value for key, value in answer.items() if key != "images"}, "files": [str(file) for file in files]}
    if json_to == "-":
        print_json(told)
    else:
        for file in files:
            sys.stdout.write(f"{file}\n")
    worker = answer.get("worker")
    for warning in worker.get("warnings", ()) if isinstance(worker, dict) else ():
        sys.stderr.write(f"a1111: {warning}\n")
    if json_to not in ("", "-"):
        try:
            Path(json_to).write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise EndpointError("NOT_SAVED", f"--json {json_to}: {error.strerror}") from None


def batch(
    jobs: Annotated[Path, typer.Argument(help="A job's input as JSON in each line.", metavar="JOBS.jsonl")],
    endpoint: EndpointId = "",
    url: Url = "",
    at_once: Annotated[int, typer.Option(min=1, max=100, help="Jobs that wait or run at the same time.")] = 8,
    out: Out = _HERE,
) -> None:
    """Run many jobs. Started again, it goes on with those that have no pictures yet."""
    results = jobs.parent / f"{jobs.stem}.results.jsonl"
    with errors():
        try:
            everything = read_jobs(jobs.read_text(encoding="utf-8-sig"))
            end_last_line(results)
            left = left_to_do(everything, results.read_text(encoding="utf-8"))
        except OSError as error:
            raise EndpointError("BAD_OPTION", f"{error.filename}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise EndpointError("BAD_OPTION", f"{jobs}: is not UTF-8 ({error.reason})") from None
        make_folder(out)
    chosen = the_endpoint(endpoint, url)

    async def work() -> int:
        async with chosen:
            return await Batch(chosen, results, out, at_once).run(left, len(everything))

    failed = run(work())
    sys.stdout.write(f"{len(everything) - failed} of {len(everything)} are done; results are in {results}\n")
    if failed:
        raise typer.Exit(FAILED)


def models(
    endpoint: EndpointId = "",
    url: Url = "",
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask a worker, which may have to start.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the endpoint's checkpoints, LoRAs and samplers, as they were when it was last asked."""
    chosen = the_endpoint(endpoint, url)
    store = SnapshotStore(data_folder() / "snapshots")
    snapshot = store.load(chosen.url)
    if refresh or snapshot.is_default:
        snapshot = ask_for_lists(chosen, store, as_json=as_json)
    if as_json:
        print_json(snapshot.models)
        return
    table = Table("kind", "name", "file", "", box=None)
    for checkpoint in snapshot.checkpoints:
        table.add_row("checkpoint", checkpoint.name, checkpoint.file, "default" if checkpoint.is_default else "")
    there = {str(entry.get("file")) for entry in snapshot.cached("loras")}
    for entry in snapshot.cached("loras"):
        table.add_row("LoRA", str(entry.get("name")), str(entry.get("file")), "cached")
    for entry in snapshot.catalog:
        if str(entry.get("file")) not in there:
            table.add_row("LoRA", str(entry.get("name")), str(entry.get("file")), "catalog")
    for kind, name in (("embedding", "embeddings"), ("VAE", "vaes")):
        for entry in snapshot.cached(name):
            table.add_row(kind, str(entry.get("name") or ""), str(entry.get("file")), "cached")
    for kind, name in (("sampler", "samplers"), ("scheduler", "schedulers"), ("upscaler", "upscalers")):
        for entry in snapshot.webui(name):
            table.add_row(kind, str(entry.get("label") or entry.get("name")), "", "")
    print_table(table)


def ask_for_lists(endpoint: Endpoint, store: SnapshotStore, *, as_json: bool = False) -> Snapshot:
    """What a worker tells of its lists, kept in the store. The endpoint is closed. A failure ends the command."""
    snapshot = Snapshot(_ask(endpoint, {"task": "models"}, as_json=as_json)["models"])
    store.save(endpoint.url, snapshot)
    return snapshot


def prefetch(
    references: Annotated[list[str], typer.Argument(help="CivitAI URLs, AIRs, version ids or names.")],
    endpoint: EndpointId = "",
    url: Url = "",
    kind: Annotated[
        str, typer.Option(help="loras, embeddings, vaes, checkpoints or controlnet_models.", metavar="KIND")
    ] = "loras",
    as_json: AsJson = False,
) -> None:
    """Have models in the endpoint's cache before a job needs them."""
    given = {"task": "prefetch", kind: [_reference(text) for text in references]}
    answer = _ask(the_endpoint(endpoint, url), given, as_json=as_json)
    entries = [entry for entries in answer["prefetch"].values() for entry in entries]
    if as_json:
        print_json(answer["prefetch"])
    else:
        for entry in entries:
            done = "fetched" if entry.get("downloaded") else "was there"
            told = f"{entry['code']}: {entry.get('message')}" if "code" in entry else f"{entry.get('file')} {done}"
            sys.stdout.write(f"{entry.get('name')}: {told}\n")
    if any("code" in entry for entry in entries):
        raise typer.Exit(FAILED)


def health(
    endpoint: EndpointId = "",
    url: Url = "",
    worker: Annotated[bool, typer.Option("--worker", help="Ask a worker itself, which may have to start.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show RunPod's count of jobs and workers, or how a worker is."""
    chosen = the_endpoint(endpoint, url)
    if worker:
        found = _ask(chosen, {"task": "health"}, as_json=as_json)["health"]
    else:

        async def work() -> dict[str, Any]:
            async with chosen:
                return await chosen.health()

        found = run(work(), as_json=as_json)
    if as_json:
        print_json(found)
        return
    table = Table("", "", box=None, show_header=False)
    for name, value in found.items():
        parts = [f"{key} {_shown(part)}" for key, part in value.items()] if isinstance(value, dict) else [_shown(value)]
        table.add_row(name, ", ".join(parts))
    print_table(table)


def _shown(value: Any) -> str:
    """A number that is large enough to be bytes, in gigabytes."""
    return f"{value / 1e9:.1f} GB" if isinstance(value, int) and value >= 10_000_000 else str(value)


def cancel(
    job: Annotated[list[str], typer.Argument(help="Ids of jobs.")], endpoint: EndpointId = "", url: Url = ""
) -> None:
    """Cancel jobs by their ids."""
    with errors():
        if wrong := [job_id for job_id in job if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", job_id)]:
            raise EndpointError("BAD_OPTION", f"no id of a job: {', '.join(map(repr, wrong))}")
    chosen = the_endpoint(endpoint, url)

    async def work() -> int:
        status = 0
        async with chosen:
            for job_id in job:  # each of them costs money, also if another one cannot be cancelled
                try:
                    sys.stdout.write(f"{job_id} {await chosen.cancel(job_id)}\n")
                except EndpointError as error:
                    sys.stderr.write(f"a1111: {job_id}: {error}\n")
                    status = max(status, status_of(error))
        return status

    if status := run(work()):
        raise typer.Exit(status)


def _ask(endpoint: Endpoint, given: Mapping[str, Any], *, as_json: bool) -> dict[str, Any]:
    """The answer of a job that draws nothing."""

    async def work() -> dict[str, Any]:
        async with endpoint:
            with Bars() as bars:
                async with endpoint.job(given) as job:
                    return await follow(job, bars, bars.add(str(given["task"])))

    return run(work(), as_json=as_json)


def parse_lora(text: str) -> dict[str, Any]:
    """A LoRA as a job takes it: a name, a URL, an AIR or a version id, each with or without `:1.2`, its scale."""
    scaled = re.fullmatch(r"(.+):(-?\d+(?:\.\d+)?)", text)
    if scaled and not text.startswith("civitai:"):
        return {**_reference(scaled[1]), "scale": float(scaled[2])}
    return _reference(text)


_AIR = re.compile(r"(?:urn:air:.*|civitai:\d+)@(\d+)")


def _reference(text: str) -> dict[str, Any]:
    if text.isdigit():
        return {"version_id": int(text)}
    if air := _AIR.fullmatch(text):
        return {"version_id": int(air[1])}
    if "://" in text or text.startswith("hf:"):
        return {"url": text}
    return {"name": text}


def _parse_field(text: str) -> tuple[str, Any]:
    """A field of a job: `tiling=true`, `hr_upscaler=Latent`. What is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise EndpointError("BAD_OPTION", f"--field {text}: must be NAME=JSON")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
