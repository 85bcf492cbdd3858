"""`a1111 deploy`: an endpoint on RunPod from an image. What is wanted, whether it can be, what it costs; then the acts.

    wanted = Deployment("you/a1111-worker", pools=("ADA_24",))
    findings = check(wanted, look_up(api, wanted))     # nothing is created
    endpoint = create(api, wanted)                     # all of it, or nothing

The rules are those of RunPod's pages "Endpoint settings", "Network volumes" and "REST API v2" (August 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from a1111_client.errors import EndpointError
from a1111_client.runpod_api import RunPodApi, hourly_price, stock_of

SECRETS_PAGE = "https://console.runpod.io/user/secrets"
VOLUMES_PAGE = "https://console.runpod.io/user/storage"
VOLUME_PRICE = 0.07
"""Dollars for a GB of a standard volume and a month (RunPod's pages, August 2026)."""

MIN_CUDA = "12.8"
"""What the image's torch needs of the driver."""

MIN_VOLUME, MAX_VOLUME = 10, 4096
JOB_TIMEOUT, JOBS_IN_FLIGHT, INIT_TIMEOUT = 570.0, 2, 900

S3_DATA_CENTERS = frozenset(
    (
        *("EU-CZ-1", "EU-RO-1", "EUR-IS-1", "EUR-NO-1", "US-CA-2", "US-GA-2", "US-IL-1", "US-KS-2"),
        *("US-MD-1", "US-MO-1", "US-MO-2", "US-NC-1", "US-NC-2", "US-NE-1", "US-WA-1"),
    )
)
"""Where a volume can be filled without a worker (RunPod's page "S3-compatible API", August 2026)."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LOOKS_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")
_SECRET_VALUE = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")


@dataclass(frozen=True)
class WantedVolume:
    """A network volume: one that is there (`id`), or a new one of `gigabytes`."""

    id: str = ""
    gigabytes: int = 0


@dataclass(frozen=True)
class Deployment:
    """What is wanted. `secrets` are the names of RunPod's secrets by the variables that they fill."""

    image: str
    name: str = "a1111"
    pools: tuple[str, ...] = ("ADA_24", "AMPERE_24")
    volume: WantedVolume | None = None
    data_centers: tuple[str, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    workers: tuple[int, int] = (0, 3)
    idle_timeout: int | None = None  # seconds; None: RunPod's own

    @property
    def disk(self) -> int:
        """GB of the container's own disk. Without a volume the models are on it."""
        return 40 if self.volume else 60


# Reading what a person wrote


def parse_workers(text: str) -> tuple[int, int]:
    """`0:3` → the fewest and the most workers. Raises EndpointError."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise _bad("--workers takes the fewest and the most, such as 0:3")
    return int(match[1]), int(match[2])


def parse_volume(text: str) -> WantedVolume | None:
    """`50` → a new volume of 50 GB; anything else is the id of one that is there. Raises EndpointError."""
    if not text:
        return None
    if not text.isdigit():
        return WantedVolume(id=text)
    if not MIN_VOLUME <= int(text[:9]) <= MAX_VOLUME:
        raise _bad(f"--volume takes {MIN_VOLUME} to {MAX_VOLUME} GB, or the id of a volume")
    return WantedVolume(gigabytes=int(text))


def parse_secrets(words: Sequence[str]) -> dict[str, str]:
    """`NAME` or `NAME=SECRET`: the variable, and RunPod's name of the secret that fills it. Raises EndpointError."""
    secrets = {}
    for word in words:
        name, _, secret = word.partition("=")
        secret = secret or name
        if not (_NAME.fullmatch(name) and _NAME.fullmatch(secret)):
            raise _bad("--secret takes NAME, or NAME=NAME_OF_THE_SECRET, never the secret itself")
        secrets[name] = secret
    return secrets


def parse_variables(words: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` of settings that are no secrets. Raises EndpointError."""
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and _NAME.fullmatch(name)):
            raise _bad("--env takes NAME=VALUE")
        if _LOOKS_SECRET.search(name.upper()):
            raise EndpointError(
                "BAD_OPTION",
                f"{name} looks like a secret, and RunPod shows variables to everybody in the account",
                hint=f"make a secret of it on {SECRETS_PAGE}, and name it with --secret {name}",
            )
        variables[name] = value
    return variables


def _bad(message: str) -> EndpointError:
    return EndpointError("BAD_OPTION", message)


# The settings that belong together


def environment_of(secrets: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a worker. Secrets are references, which RunPod fills in."""
    return {**variables, **{name: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for name, secret in secrets.items()}}


def tied_settings(variables: Mapping[str, str], workers: tuple[int, int], idle_timeout: int | None) -> dict[str, Any]:
    """What must fit the worker's own settings: scaling, workers, and RunPod's execution timeout in milliseconds.

    A worker holds JOBS_IN_FLIGHT jobs, so RunPod counts that many for one worker. It takes no idle timeout beside that
    count; with one, it scales by the delay in the queue.
    """
    fewest, most = workers
    if idle_timeout is None:
        in_flight = int(_number(variables, "JOBS_IN_FLIGHT", JOBS_IN_FLIGHT))
        scaling: dict[str, Any] = {"type": "REQUEST_COUNT", "requestCount": max(1, in_flight)}
        counts = {"min": fewest, "max": most}
    else:
        scaling = {"type": "QUEUE_DELAY", "queueDelay": 4}
        counts = {"min": fewest, "max": most, "idleTimeout": idle_timeout}
    # The worker answers JOB_TIMEOUT itself, before RunPod ends the job without an answer.
    timeout = int((_number(variables, "JOB_TIMEOUT", JOB_TIMEOUT) + 30) * 1000)
    return {"scaling": scaling, "workers": counts, "timeout": timeout}


def endpoint_body(wanted: Deployment, volume_id: str | None) -> dict[str, Any]:
    """What RunPod's create takes."""
    variables = {
        "JOBS_IN_FLIGHT": str(JOBS_IN_FLIGHT),
        "JOB_TIMEOUT": f"{JOB_TIMEOUT:g}",
        "RUNPOD_INIT_TIMEOUT": str(INIT_TIMEOUT),  # the first start downloads the checkpoint
        **wanted.variables,
    }
    body: dict[str, Any] = {
        "name": wanted.name,
        "type": "QUEUE",
        "image": wanted.image,
        "disk": wanted.disk,
        "env": environment_of(wanted.secrets, variables),
        "gpu": {"pools": list(wanted.pools), "count": 1, "minCudaVersion": MIN_CUDA},
        "flashboot": "FLASHBOOT",
        **tied_settings(variables, wanted.workers, wanted.idle_timeout),
    }
    if wanted.data_centers:
        body["dataCenterIds"] = list(wanted.data_centers)
    if volume_id:
        body["networkVolumes"] = [volume_id]
    return body


def _number(variables: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(variables.get(name) or default)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise _bad(f"--env {name} takes a number")
    return value


# Whether it can be, and what it costs


@dataclass(frozen=True)
class Stock:
    """What RunPod has, as it says itself."""

    gpus: Sequence[Mapping[str, Any]]
    data_centers: Sequence[Mapping[str, Any]]
    endpoints: Sequence[Mapping[str, Any]]
    volume: Mapping[str, Any] | None = None  # the one that is there, if one is named


@dataclass(frozen=True)
class Findings:
    """`errors` stop the deployment, `warnings` do not. `prices` are dollars an hour of one worker, by pool."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    prices: Mapping[str, tuple[float, float]]
    data_centers: tuple[str, ...]

    def most_an_hour(self, workers: int) -> float | None:
        """What that many workers cost at most; None if a price is unknown."""
        return max((dearest for _, dearest in self.prices.values()), default=0.0) * workers if self.prices else None


def look_up(api: RunPodApi, wanted: Deployment) -> Stock:
    """Ask RunPod what `check` needs. Creates nothing."""
    volume = api.volume(wanted.volume.id) if wanted.volume and wanted.volume.id else None
    return Stock(api.gpus(MIN_CUDA), api.data_centers(), api.endpoints(), volume)


def check(wanted: Deployment, stock: Stock) -> Findings:
    """Everything that stands against it, all at once."""
    errors: list[str] = []
    warnings: list[str] = []
    centers = wanted.data_centers
    if stock.volume:
        its_center = str(stock.volume["dataCenter"])
        if centers and centers != (its_center,):
            errors.append(f"the volume {stock.volume['id']} is in {its_center}, not in {', '.join(centers)}")
        centers = (its_center,)
    known = {str(center["id"]): center for center in stock.data_centers}
    if unknown := [name for name in centers if name not in known]:
        errors.append(f"there is no data center {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if wanted.volume and not stock.volume:
        errors += _check_new_volume(centers, known)
    if wanted.volume and len(centers) == 1 and centers[0] not in S3_DATA_CENTERS:
        warnings.append(f"`a1111 volume upload` cannot reach a volume in {centers[0]}")
    if any(endpoint["name"] == wanted.name for endpoint in stock.endpoints):
        errors.append(f"an endpoint {wanted.name} is there: choose another --name, or use `a1111 endpoint update`")
    prices = {}
    in_stock = []
    pools = {str(gpu["pool"]) for gpu in stock.gpus if gpu.get("pool")}
    for pool in wanted.pools:
        gpus = [gpu for gpu in stock.gpus if gpu.get("pool") == pool]
        if not gpus:
            errors.append(f"there is no pool {pool} with CUDA {MIN_CUDA}; there are {', '.join(sorted(pools))}")
            continue
        found = [price for gpu in gpus if (price := hourly_price(gpu)) is not None]
        if found:
            prices[pool] = (min(found), max(found))
        if any(_is_in_stock(gpu, [known[name] for name in centers if name in known]) for gpu in gpus):
            in_stock.append(pool)
        else:
            warnings.append(f"{pool} is out of stock now{f' in {centers[0]}' if len(centers) == 1 else ''}")
    if prices and not in_stock:
        errors.append("none of these pools is in stock: choose others with --gpu, or another --datacenter")
    return Findings(tuple(errors), tuple(warnings), prices, centers)


def _check_new_volume(centers: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    able = [name for name, center in known.items() if "STANDARD" in center["networkVolumeTypes"]]
    if len(centers) != 1:
        return [f"a new volume is in one data center: name it with --datacenter; able are {', '.join(sorted(able))}"]
    if centers[0] in known and centers[0] not in able:
        return [f"{centers[0]} has no network volumes; {', '.join(sorted(able))} have"]
    return []


def _is_in_stock(gpu: Mapping[str, Any], centers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is such a GPU with a driver that is new enough, in one of the data centers if any is named."""
    versions = gpu.get("cudaVersions")
    if versions and not any(found["available"] and _is_at_least(found["version"], MIN_CUDA) for found in versions):
        return False
    if not centers:
        return bool(gpu.get("availability", "NONE") != "NONE")
    return any(stock_of(center.get("gpuAvailability", ()), str(gpu["id"])) != "NONE" for center in centers)


def _is_at_least(version: str, least: str) -> bool:
    return tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))


def describe(wanted: Deployment, findings: Findings) -> list[str]:
    """What will be created, and what it costs, for a person to read."""
    body = endpoint_body(wanted, None)
    fewest, most = wanted.workers
    lines = [f"endpoint {wanted.name}: {wanted.image}, {wanted.disk} GB of disk, CUDA {MIN_CUDA} or newer, FlashBoot"]
    lines.append(f"  GPUs, in this order: {', '.join(wanted.pools)}; {fewest} to {most} workers")
    lines.append(f"  scaling: {_scaling(body)}; a job may take {body['timeout'] // 1000} s")
    lines += [f"  {name}={value}" for name, value in sorted(body["env"].items())]
    if wanted.volume and wanted.volume.id:
        lines.append(f"  volume {wanted.volume.id} in {', '.join(findings.data_centers)}")
    elif wanted.volume:
        lines.append(f"volume {wanted.name}: {wanted.volume.gigabytes} GB in {', '.join(findings.data_centers)}")
    lines.append(f"cost: {_cost(wanted, findings)}")
    return lines


def _scaling(body: Mapping[str, Any]) -> str:
    scaling = body["scaling"]
    if scaling["type"] == "REQUEST_COUNT":
        return f"one worker for {scaling['requestCount']} jobs"
    return f"after {scaling['queueDelay']} s in the queue; an idle worker stays {body['workers']['idleTimeout']} s"


def _cost(wanted: Deployment, findings: Findings) -> str:
    fewest, most = wanted.workers
    dearest = findings.most_an_hour(most)
    least = min((cheapest for cheapest, _ in findings.prices.values()), default=0.0) * fewest
    parts = []
    if dearest is None:
        parts.append("RunPod names no price for these GPUs")
    else:
        parts.append(f"at most ${dearest:.2f} an hour, if all {most} workers run")
        parts.append(f"at least ${least:.2f} an hour" if fewest else "nothing while none runs")
    if wanted.volume and wanted.volume.gigabytes:
        parts.append(f"the volume about ${wanted.volume.gigabytes * VOLUME_PRICE:.2f} a month, used or not")
    return "; ".join(parts)


# The acts


def create(api: RunPodApi, wanted: Deployment) -> dict[str, Any]:
    """Create the volume, if a new one is wanted, and the endpoint. If that fails, remove what was made.

    Raises EndpointError. Its hint names what could not be removed.
    """
    before = _ids_of(api)
    volume_id = wanted.volume.id if wanted.volume else None
    try:
        if wanted.volume and not wanted.volume.id:
            (center,) = wanted.data_centers
            body = {"name": wanted.name, "size": wanted.volume.gigabytes, "dataCenter": center, "type": "STANDARD"}
            volume_id = str(api.create_volume(body)["id"])
        return api.create_endpoint(endpoint_body(wanted, volume_id))
    except BaseException as error:  # Ctrl-C too
        left = _remove(api, wanted.name, before)
        if isinstance(error, EndpointError):
            told = f"not removed: {'; '.join(left)}" if left else "nothing was left behind"
            raise EndpointError(
                error.code, error.message, hint="; ".join(filter(None, (error.hint, told))), retryable=error.retryable
            ) from error
        raise


def _ids_of(api: RunPodApi) -> set[str]:
    """What the account has."""
    return {str(found["id"]) for found in (*api.endpoints(), *api.volumes())}


def _remove(api: RunPodApi, name: str, before: set[str]) -> list[str]:
    """Remove what was made under this name; what could not be removed, and where a person can.

    RunPod is asked what is there: a request whose answer was lost may have made something.
    """
    left = []
    try:
        for endpoint in api.endpoints():
            if endpoint["name"] == name and endpoint["id"] not in before:
                api.delete_endpoint(str(endpoint["id"]))
    except EndpointError as error:
        left.append(f"perhaps the endpoint {name} ({error.message}): look with `a1111 endpoint show`")
    try:
        for volume in api.volumes():
            if volume["name"] == name and volume["id"] not in before:
                api.delete_volume(str(volume["id"]))
    except EndpointError as error:
        left.append(f"perhaps the volume {name} ({error.message}), which costs money: {VOLUMES_PAGE}")
    return left


# An endpoint that is there


@dataclass(frozen=True)
class Changes:
    """What to change. None, or an empty value: it stays as it is."""

    image: str = ""
    pools: tuple[str, ...] = ()
    workers: tuple[int, int] | None = None
    idle_timeout: int | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


def update_body(current: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """What RunPod's update takes: only what changes, with what must change along. Empty: nothing would change.

    Variables are sent whole, because RunPod replaces them as a whole.
    """
    wanted: dict[str, Any] = {}
    if changes.image:
        wanted["image"] = changes.image
    if changes.pools:
        wanted["gpu"] = {"pools": list(changes.pools)}
    environment = {**(current.get("env") or {}), **environment_of(changes.secrets, changes.variables)}
    if changes.secrets or changes.variables:
        wanted["env"] = environment
    if changes.workers or changes.idle_timeout is not None or changes.variables:
        workers = changes.workers or (int(current["workers"]["min"]), int(current["workers"]["max"]))
        idle = changes.idle_timeout
        if idle is None and current["scaling"]["type"] == "QUEUE_DELAY":
            idle = current["workers"].get("idleTimeout") or 10
        tied = tied_settings(environment, workers, idle)
        if "JOB_TIMEOUT" not in changes.variables:
            del tied["timeout"]
        if tied["scaling"]["type"] == current["scaling"]["type"] == "QUEUE_DELAY":
            del tied["scaling"]  # its delay may be the owner's own
        wanted |= tied
    return {name: value for name, value in wanted.items() if not _is_part_of(value, current.get(name))}


def _is_part_of(value: Any, whole: Any) -> bool:
    if isinstance(value, dict) and isinstance(whole, dict):
        return all(_is_part_of(item, whole.get(name)) for name, item in value.items())
    return bool(value == whole)


def shown(endpoint: Mapping[str, Any]) -> dict[str, Any]:
    """An endpoint without the values that look like secrets. References to RunPod's secrets are none."""
    environment = {
        name: "(not shown)" if _LOOKS_SECRET.search(name.upper()) and not _SECRET_VALUE.fullmatch(value) else value
        for name, value in (endpoint.get("env") or {}).items()
    }
    return {**endpoint, **({"env": environment} if "env" in endpoint else {})}
