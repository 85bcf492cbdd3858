"""The commands that manage what is on RunPod: `a1111 deploy`, `a1111 endpoint …`, `a1111 volume …`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from a1111_client import deploy, volume
from a1111_client.credentials import APP, key_file, runpod_key
from a1111_client.endpoint import RUNPOD, Endpoint
from a1111_client.errors import EndpointError
from a1111_client.runpod_api import RUNPOD_API, RunPodApi
from a1111_client.terminal import AsJson, errors, print_json

HEALTH_SECONDS = deploy.INIT_TIMEOUT + 300
"""For how long the first worker may start, and wait for a GPU."""

endpoints = typer.Typer(help="Show, change and delete endpoints on RunPod.", no_args_is_help=True)
volumes = typer.Typer(help="Fill network volumes of RunPod.", no_args_is_help=True)

EndpointId = Annotated[str, typer.Argument(envvar="RUNPOD_ENDPOINT_ID", help="The endpoint's id.", metavar="ID")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Gpu = Annotated[str, typer.Option(help="Pools of GPUs, in order of preference.", metavar="POOL,…")]
Workers = Annotated[str, typer.Option(help="The fewest and the most workers.", metavar="MIN:MAX")]
IdleTimeout = Annotated[
    int | None, typer.Option(min=1, max=3600, help="Seconds for which an idle worker stays; it is billed.")
]
Secret = Annotated[
    list[str] | None, typer.Option(help="A variable that a secret of RunPod fills.", metavar="NAME[=SECRET]")
]
Env = Annotated[list[str] | None, typer.Option(help="A setting of the worker.", metavar="NAME=VALUE")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command `a1111`."""
    app.command("deploy")(deploy_endpoint)
    app.add_typer(endpoints, name="endpoint")
    app.add_typer(volumes, name="volume")


def deploy_endpoint(
    image: Annotated[str, typer.Option(help="The worker's image, in a registry that RunPod can reach.")],
    name: Annotated[str, typer.Option(help="The endpoint's name.")] = "a1111",
    gpu: Gpu = "ADA_24,AMPERE_24",
    volume: Annotated[
        str, typer.Option(help="GB of a new network volume, or the id of one that is there.", metavar="GB|ID")
    ] = "",
    datacenter: Annotated[str, typer.Option(help="Where; a new volume needs one.", metavar="NAME,…")] = "",
    secret: Secret = None,
    env: Env = None,
    workers: Workers = "0:3",
    idle_timeout: IdleTimeout = None,
    yes: Yes = False,
) -> None:
    """Create an endpoint on RunPod from the worker's image: checked first, shown with its price, and asked for."""
    with errors():
        wanted = deploy.Deployment(
            image,
            name,
            _words(gpu),
            deploy.parse_volume(volume),
            _words(datacenter),
            deploy.parse_secrets(secret or ()),
            deploy.parse_variables(env or ()),
            deploy.parse_workers(workers),
            idle_timeout,
        )
        deploy.endpoint_body(wanted, None)  # complains about a setting that is no number, before RunPod is asked
        with _api() as api:
            findings = deploy.check(wanted, deploy.look_up(api, wanted))
            for warning in findings.warnings:
                _say(f"note: {warning}")
            if findings.errors:
                raise EndpointError("CANNOT_DEPLOY", "; ".join(findings.errors))
            wanted = replace(wanted, data_centers=findings.data_centers)
            for line in deploy.describe(wanted, findings):
                print(line)
            if wanted.secrets:
                print(f"these secrets must be there: {', '.join(wanted.secrets.values())}: {deploy.SECRETS_PAGE}")
            _confirm("Create it?", yes)
            created = deploy.create(api, wanted)
        endpoint_id = str(created["id"])
        print(f"created: endpoint {endpoint_id}", flush=True)
        _print_health(endpoint_id)
        for line in lines_to_use_it(endpoint_id):
            print(line)


def lines_to_use_it(endpoint_id: str) -> list[str]:
    """What a person types next."""
    return [
        "",
        f"export RUNPOD_ENDPOINT_ID={endpoint_id}",
        'a1111 draw "a lighthouse"',
        "a1111 serve                    # A1111's API on http://127.0.0.1:7860",
        f'curl {_jobs_url()}/{endpoint_id}/runsync -H "Authorization: Bearer $RUNPOD_API_KEY" \\',
        """  -H 'Content-Type: application/json' -d '{"input": {"prompt": "a lighthouse"}}'""",
    ]


@endpoints.command()
def show(
    endpoint_id: Annotated[
        str, typer.Argument(envvar="RUNPOD_ENDPOINT_ID", help="Without one: all.", metavar="[ID]")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show an endpoint, or all of them."""
    with errors(), _api() as api:
        found = [api.endpoint(endpoint_id)] if endpoint_id else api.endpoints()
    found = [deploy.shown(endpoint) for endpoint in found]
    if as_json:
        print_json(found[0] if endpoint_id else found)
        return
    for endpoint in found:
        print("\n".join(_lines_of(endpoint, with_details=bool(endpoint_id))))


@endpoints.command()
def workers(endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Show an endpoint's workers: their state, GPU, place and age."""
    with errors(), _api() as api:
        found = api.workers(endpoint_id)
    if as_json:
        print_json(found)
        return
    for worker in found["workers"]:
        minutes = (worker.get("uptimeSeconds") or 0) // 60
        parts = [worker["id"], worker["status"], worker.get("gpuTypeId"), worker.get("dataCenterId"), f"{minutes} min"]
        print("  ".join(str(part) for part in (*parts, "old release" if worker["isStale"] else "") if part))
    counts = [f"{count} {name}" for name, count in found["summary"].items() if name != "total" and count]
    print(", ".join(counts) or "no worker")


@endpoints.command()
def logs(
    endpoint_id: EndpointId,
    worker: Annotated[str, typer.Option(help="One worker's id; without it, each one's log.", metavar="ID")] = "",
    tail: Annotated[int, typer.Option(min=0, max=5000, help="How many of the last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with the lines that come.")] = False,
) -> None:
    """Show the log of an endpoint's workers."""
    with errors(), _api() as api:
        ids = [worker] if worker else [str(found["id"]) for found in api.workers(endpoint_id)["workers"]]
        if not ids:
            _say("no worker runs, and a log is kept with its worker; RunPod's console has the older ones")
        if follow and len(ids) > 1:
            raise EndpointError("BAD_OPTION", "--follow is for one worker", hint=f"--worker {' or '.join(ids)}")
        for worker_id in ids:
            with contextlib.suppress(KeyboardInterrupt):
                for line in api.logs(endpoint_id, worker_id, tail=tail, follow=follow):
                    print(
                        f"{worker_id}  {line.at}  {line.text}" if len(ids) > 1 else f"{line.at}  {line.text}",
                        flush=True,
                    )


@endpoints.command()
def update(
    endpoint_id: EndpointId,
    image: Annotated[str, typer.Option(help="Another image.")] = "",
    gpu: Gpu = "",
    secret: Secret = None,
    env: Env = None,
    workers: Workers = "",
    idle_timeout: IdleTimeout = None,
    yes: Yes = False,
) -> None:
    """Change an endpoint. Its workers are replaced, each after its job."""
    with errors(), _api() as api:
        changes = deploy.Changes(
            image,
            _words(gpu),
            deploy.parse_workers(workers) if workers else None,
            idle_timeout,
            deploy.parse_secrets(secret or ()),
            deploy.parse_variables(env or ()),
        )
        current = api.endpoint(endpoint_id)
        body = deploy.update_body(current, changes)
        if not body:
            print("nothing changes")
            return
        before, after = deploy.shown(current), deploy.shown(body)
        for name, value in after.items():
            print(f"{name}: {json.dumps(before.get(name))} → {json.dumps(value)}")
        _confirm("Change it?", yes)
        api.update_endpoint(endpoint_id, body)
    print("changed")


@endpoints.command()
def delete(endpoint_id: EndpointId, yes: Yes = False) -> None:
    """Delete an endpoint, with the jobs that wait for it. Its network volume stays."""
    with errors(), _api() as api:
        current = api.endpoint(endpoint_id)
        print("\n".join(_lines_of(current, with_details=False)))
        _confirm("Delete it?", yes)
        api.delete_endpoint(endpoint_id)
        print("deleted")
        for volume in current["networkVolumes"]:
            print(f"its volume {volume} is kept, and costs money: {deploy.VOLUMES_PAGE}")


@volumes.callback()
def _volumes() -> None:
    """A group with one command stays a group."""


@volumes.command("upload")
def upload_folder(
    folder: Annotated[Path, typer.Argument(help="A folder of models: checkpoints/, loras/, …", metavar="DIR")],
    volume_id: Annotated[str, typer.Argument(help="The volume's id.", metavar="VOLUME")],
    prefix: Annotated[str, typer.Option(help="The folder on the volume; the worker looks in models.")] = "models",
    datacenter: Annotated[str, typer.Option(help="The volume's; without it RunPod is asked.", metavar="NAME")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Read back what the volume keeps no hash of.")] = False,
    replace_files: Annotated[bool, typer.Option("--replace", help="Overwrite files that differ.")] = False,
    yes: Yes = False,
    s3_url: Annotated[str, typer.Option(help="Another address of the volume's S3 API.", metavar="URL")] = "",
) -> None:
    """Copy a folder of models to a network volume, without a worker. An interrupted upload goes on where it stopped."""
    with errors(), contextlib.ExitStack() as stack:
        files = volume.find_files(folder)
        keys = [os.environ.get(f"RUNPOD_S3_{name}", "").strip() for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
        if not all(keys):
            raise EndpointError(
                "NO_KEY",
                "there is no key for the volume: set RUNPOD_S3_ACCESS_KEY_ID and RUNPOD_S3_SECRET_ACCESS_KEY",
                hint="RunPod's console makes one: Settings, S3 API Keys",
            )
        if not datacenter:
            with _api() as api:
                datacenter = str(api.volume(volume_id)["dataCenter"])
        if not s3_url and datacenter not in deploy.S3_DATA_CENTERS:
            raise EndpointError(
                "BAD_OPTION", f"volumes in {datacenter} have no S3 API; send the models by a job instead"
            )
        url = s3_url or volume.s3_url(datacenter)
        there = volume.Volume(volume_id, url=url, region=datacenter, key=(keys[0], keys[1]))
        stack.callback(there.close)
        with _progress("looking", sum(file.size for file in files)) as tell:
            planned = volume.plan(there, files, prefix, verify=verify, tell=tell)
        for item in planned:
            if item.step is not volume.Step.SEND:
                print(f"{item.key}: {item.step.value}")
        in_the_way = [item for item in planned if item.step in volume.IN_THE_WAY]
        if in_the_way and not replace_files:
            raise EndpointError(
                "UPLOAD_CONFLICT",
                f"{len(in_the_way)} of these files are in the way, and nothing was sent",
                hint="--replace overwrites them; no worker may run meanwhile (workers 0:0)",
            )
        if in_the_way:
            _say(f"{len(in_the_way)} files are overwritten. No worker may run meanwhile: set its workers to 0:0 first.")
            _confirm("Does none run?", yes)
        sending = [item.file for item in planned if item.step not in (volume.Step.SKIP, volume.Step.KEEP)]
        with _progress("sending", sum(file.size for file in sending)) as tell:
            unproven = volume.upload(there, planned, upload_states(), verify=verify, tell=tell)
        if unproven:
            _say(f"note: the volume keeps no hashes; compared by size alone: {', '.join(unproven)}")
        print(f"{len(sending)} of {len(files)} files sent, {sum(file.size for file in sending) / 1e9:.2f} GB")


def upload_states() -> Path:
    """Where unfinished uploads are remembered."""
    return platformdirs.user_cache_path(APP) / "uploads"


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[volume.Tell]:
    """A bar on a terminal; nothing elsewhere."""
    with Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[file]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as progress:
        task = progress.add_task(what, total=total, file="")
        yield lambda file, size: progress.update(task, advance=size, file=file.name)


def _lines_of(endpoint: Mapping[str, Any], *, with_details: bool) -> list[str]:
    workers = endpoint["workers"]
    pools = (endpoint.get("gpu") or {}).get("pools") or []
    lines = [f"{endpoint['id']}  {endpoint['name']}  {workers['min']}:{workers['max']} workers  {', '.join(pools)}"]
    if with_details:
        lines.append(f"  image {endpoint.get('image')}, {endpoint.get('disk')} GB of disk")
        lines.append(f"  scaling {json.dumps(endpoint['scaling'])}, a job may take {endpoint['timeout'] // 1000} s")
        lines.append(f"  volumes {', '.join(endpoint['networkVolumes']) or 'none'}, FlashBoot {endpoint['flashboot']}")
        lines += [f"  {name}={value}" for name, value in sorted((endpoint.get("env") or {}).items())]
    return lines


def _print_health(endpoint_id: str) -> None:
    """Send a `health` job, and print what the first worker says of itself."""
    try:
        answer = asyncio.run(_first_health(endpoint_id))
    except (EndpointError, TimeoutError, asyncio.TimeoutError) as error:
        if isinstance(error, EndpointError):
            code, message = error.code, error.message
        else:
            code, message = "JOB_TIMED_OUT", f"no worker answered within {HEALTH_SECONDS} s"
        raise EndpointError(
            code,
            f"the endpoint {endpoint_id} is there, and its first job failed: {message}",
            hint=f"a1111 endpoint workers {endpoint_id}; a1111 endpoint logs {endpoint_id}; "
            f"a1111 endpoint delete {endpoint_id}",
        ) from error
    health = answer.get("health", {})
    gpu, versions = health.get("gpu") or {}, health.get("versions") or {}
    print(f"healthy: {gpu.get('name', 'no GPU')}, worker {versions.get('worker')}, WebUI {versions.get('webui')}")


async def _first_health(endpoint_id: str) -> dict[str, Any]:
    began = time.monotonic()
    async with Endpoint(f"{_jobs_url()}/{endpoint_id}", _key()) as endpoint, endpoint.job({"task": "health"}) as job:
        result = asyncio.ensure_future(job.result())
        try:
            while not result.done() and time.monotonic() - began < HEALTH_SECONDS:
                await asyncio.wait([result], timeout=15)
                if not result.done():
                    _say(f"a worker is starting, {time.monotonic() - began:.0f} s")
            return await asyncio.wait_for(result, 0.1)
        finally:
            result.cancel()


@contextlib.contextmanager
def _api() -> Iterator[RunPodApi]:
    with RunPodApi(_key(), os.environ.get("RUNPOD_API_BASE_URL") or RUNPOD_API) as api:
        yield api


def _key() -> str:
    return runpod_key(os.environ, key_file())


def _jobs_url() -> str:
    """Where endpoints take jobs. The variable is RunPod's own: its SDK reads it too."""
    return (os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or RUNPOD).rstrip("/")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _confirm(question: str, yes: bool) -> None:
    """Go on only if a person, or --yes, says so."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise EndpointError("NOT_CONFIRMED", "nobody can be asked here", hint="use --yes")
    typer.confirm(question, abort=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
