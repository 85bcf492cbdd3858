"""Endpoints on RunPod: what is asked for, checked, created and removed, against RunPod's own schema."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from a1111_client.deploy import (
    Changes,
    Deployment,
    Findings,
    WantedVolume,
    check,
    create,
    describe,
    endpoint_body,
    look_up,
    parse_secrets,
    parse_variables,
    parse_volume,
    parse_workers,
    shown,
    update_body,
)
from a1111_client.errors import EndpointError
from a1111_client.runpod_api import ApiTimings, RunPodApi, hourly_price
from sandbox.server import Exchange
from tests.client.runpod_platform import KEY, RunPodPlatform, center, errors_of, gpu

IMAGE = "you/a1111-worker:1"
QUICK = ApiTimings(timeout=10.0, pause=0.001, quiet=0.2)
WITH_VOLUME = Deployment(IMAGE, volume=WantedVolume(gigabytes=50), data_centers=("EU-RO-1",))


@pytest.fixture
def platform() -> Iterator[RunPodPlatform]:
    with RunPodPlatform() as it:
        yield it
        assert it.invalid == []


@pytest.fixture
def api(platform: RunPodPlatform) -> Iterator[RunPodApi]:
    with RunPodApi(KEY, platform.url, timings=QUICK) as it:
        yield it


# What a person writes


@pytest.mark.parametrize("text", ["3", "3:", ":3", "3:1", "-1:3", "0:99999", "a:b"])
def test_bad_numbers_of_workers_are_refused(text: str) -> None:
    with pytest.raises(EndpointError, match="--workers"):
        parse_workers(text)


def test_a_volume_is_new_by_its_gigabytes_or_there_by_its_id() -> None:
    assert (parse_volume(""), parse_volume("50"), parse_volume("abc123")) == (
        None,
        WantedVolume(gigabytes=50),
        WantedVolume(id="abc123"),
    )
    for text in ("9", "4097", "9" * 50):
        with pytest.raises(EndpointError, match="10 to 4096"):
            parse_volume(text)


def test_a_secret_is_named_and_never_given() -> None:
    assert parse_secrets(["CIVITAI_API_KEY", "HF_TOKEN=my_hf"]) == {
        "CIVITAI_API_KEY": "CIVITAI_API_KEY",
        "HF_TOKEN": "my_hf",
    }
    for word in ("CIVITAI_API_KEY=abc-def.ghi", "", "=x", "A B"):
        with pytest.raises(EndpointError, match="never the secret itself"):
            parse_secrets([word])


@pytest.mark.parametrize("name", ["CIVITAI_API_KEY", "HF_TOKEN", "BUCKET_SECRET_ACCESS_KEY", "my_password"])
def test_a_setting_that_looks_like_a_secret_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse_variables([f"{name}=the-value"])

    assert f"--secret {name}" in caught.value.hint
    assert "the-value" not in str(caught.value) + caught.value.hint


# The settings that belong together


def test_a_deployment_is_a_valid_request_with_its_settings_in_agreement() -> None:
    body = endpoint_body(replace(WITH_VOLUME, secrets={"CIVITAI_API_KEY": "civitai"}), "vol1")

    assert errors_of({"$ref": "#/components/schemas/CreateEndpointRequest"}, body) == []
    assert body["env"] == {
        "CIVITAI_API_KEY": "{{ RUNPOD_SECRET_civitai }}",
        "JOBS_IN_FLIGHT": "2",
        "JOB_TIMEOUT": "570",
        "RUNPOD_INIT_TIMEOUT": "900",
    }
    assert body["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 2}  # a worker holds two jobs
    assert body["workers"] == {"min": 0, "max": 3}  # RunPod takes no idleTimeout beside REQUEST_COUNT
    assert body["timeout"] == 600_000  # above JOB_TIMEOUT
    assert body["flashboot"] == "FLASHBOOT"
    assert (body["networkVolumes"], body["dataCenterIds"], body["disk"]) == (["vol1"], ["EU-RO-1"], 40)


TIED = [
    # settings, idle timeout → scaling, workers, execution timeout in ms
    ({"JOBS_IN_FLIGHT": "4"}, None, {"type": "REQUEST_COUNT", "requestCount": 4}, {"min": 0, "max": 3}, 600_000),
    ({"JOB_TIMEOUT": "1800"}, None, {"type": "REQUEST_COUNT", "requestCount": 2}, {"min": 0, "max": 3}, 1_830_000),
    ({}, 60, {"type": "QUEUE_DELAY", "queueDelay": 4}, {"min": 0, "max": 3, "idleTimeout": 60}, 600_000),
]


@pytest.mark.parametrize(("variables", "idle", "scaling", "workers", "timeout"), TIED)
def test_what_depends_on_a_setting_follows_it(
    variables: dict[str, str], idle: int | None, scaling: Any, workers: Any, timeout: int
) -> None:
    body = endpoint_body(Deployment(IMAGE, variables=variables, idle_timeout=idle), None)

    assert errors_of({"$ref": "#/components/schemas/CreateEndpointRequest"}, body) == []
    assert (body["scaling"], body["workers"], body["timeout"]) == (scaling, workers, timeout)
    assert variables.items() <= body["env"].items()
    assert body["disk"] == 60  # the models are on it


@pytest.mark.parametrize("value", ["soon", "nan", "-5", "inf", ""])
def test_a_setting_that_is_no_number_is_refused(value: str) -> None:
    wanted = Deployment(IMAGE, variables={"JOB_TIMEOUT": value})
    if value == "":
        assert endpoint_body(wanted, None)["timeout"] == 600_000  # the worker's default
        return
    with pytest.raises(EndpointError, match="JOB_TIMEOUT"):
        endpoint_body(wanted, None)


# Whether it can be


def findings_of(api: RunPodApi, wanted: Deployment) -> Findings:
    return check(wanted, look_up(api, wanted))


def test_a_deployment_that_can_be_has_its_prices(api: RunPodApi, platform: RunPodPlatform) -> None:
    findings = findings_of(api, WITH_VOLUME)
    shown_lines = "\n".join(describe(WITH_VOLUME, findings))

    assert (findings.errors, findings.warnings) == ((), ())
    assert {pool: (round(low, 2), round(high, 2)) for pool, (low, high) in findings.prices.items()} == {
        "ADA_24": (1.12, 1.12),
        "AMPERE_24": (0.68, 0.69),  # 0.00019 a second
    }
    assert "at most $3.36 an hour, if all 3 workers run; nothing while none runs" in shown_lines
    assert "the volume about $3.50 a month" in shown_lines
    assert platform.changes() == []


@pytest.mark.parametrize(
    ("price", "hourly"),
    [({"serverless": 1.12}, 1.12), ({"serverless": 0.00031}, 1.116), ({}, None), ({"serverless": 0}, None)],
)
def test_a_price_is_one_of_an_hour_or_of_a_second(price: dict[str, float], hourly: float | None) -> None:
    assert hourly_price({"price": price}) == (hourly if hourly is None else pytest.approx(hourly))


REFUSED = [
    # what is wanted → every complaint
    (Deployment(IMAGE, pools=("ADA_48",)), ["there is no pool ADA_48", "there are ADA_24, AMPERE_24"]),
    (Deployment(IMAGE, volume=WantedVolume(gigabytes=50)), ["name it with --datacenter; able are EU-RO-1, US-TX-3"]),
    (
        Deployment(IMAGE, volume=WantedVolume(gigabytes=50), data_centers=("EU-SE-1",)),
        ["EU-SE-1 has no network volumes"],
    ),
    (Deployment(IMAGE, data_centers=("EU-XX-9",)), ["there is no data center EU-XX-9"]),
    (
        Deployment(IMAGE, volume=WantedVolume(id="vol1"), data_centers=("US-TX-3",)),
        ["vol1 is in EU-RO-1, not in US-TX-3"],
    ),
    (Deployment(IMAGE, name="taken"), ["an endpoint taken is there"]),
    (
        Deployment(IMAGE, name="taken", pools=("X",), volume=WantedVolume(gigabytes=50)),
        ["an endpoint taken is there", "there is no pool X", "--datacenter"],
    ),
]


@pytest.mark.parametrize(("wanted", "complaints"), REFUSED)
def test_what_cannot_be_is_said_all_at_once_and_nothing_is_created(
    api: RunPodApi, platform: RunPodPlatform, wanted: Deployment, complaints: list[str]
) -> None:
    api.create_volume({"name": "old", "size": 50, "dataCenter": "EU-RO-1"})
    api.create_endpoint(endpoint_body(Deployment(IMAGE, name="taken"), None))
    before = platform.changes()

    errors = "; ".join(findings_of(api, wanted).errors)

    assert [complaint for complaint in complaints if complaint not in errors] == []
    assert platform.changes() == before


def test_pools_out_of_stock_are_a_warning_and_an_error_if_all_are(api: RunPodApi, platform: RunPodPlatform) -> None:
    platform.gpus[0] = gpu("NVIDIA GeForce RTX 4090", "ADA_24", 1.12, stock="NONE")
    some = findings_of(api, Deployment(IMAGE))
    platform.gpus = [gpu(found["id"], found["pool"], 1.0, stock="NONE") for found in platform.gpus]
    none = findings_of(api, Deployment(IMAGE))

    assert some.errors == () and some.warnings == ("ADA_24 is out of stock now",)
    assert "none of these pools is in stock" in none.errors[0]


def test_the_stock_of_the_volumes_data_center_counts(api: RunPodApi, platform: RunPodPlatform) -> None:
    platform.data_centers[0] = center("EU-RO-1", stock="NONE")

    findings = findings_of(api, WITH_VOLUME)

    assert "none of these pools is in stock" in findings.errors[0]
    assert findings.warnings[0] == "ADA_24 is out of stock now in EU-RO-1"


def test_a_gpu_whose_driver_is_too_old_is_not_in_stock(api: RunPodApi, platform: RunPodPlatform) -> None:
    platform.gpus = [gpu("NVIDIA GeForce RTX 4090", "ADA_24", 1.12, cuda="12.7")]

    assert "none of these pools" in findings_of(api, Deployment(IMAGE, pools=("ADA_24",))).errors[0]


def test_a_data_center_that_the_upload_cannot_reach_is_a_warning(api: RunPodApi) -> None:
    findings = findings_of(api, replace(WITH_VOLUME, data_centers=("US-TX-3",)))

    assert findings.errors == ()
    assert "`a1111 volume upload` cannot reach a volume in US-TX-3" in findings.warnings


# The acts


def test_the_volume_comes_first_and_the_endpoint_uses_it(api: RunPodApi, platform: RunPodPlatform) -> None:
    created = create(api, WITH_VOLUME)

    assert platform.changes() == [("POST", "/v2/network-volumes"), ("POST", "/v2/serverless")]
    assert platform.volumes["vol1"]["size"] == 50
    assert created["networkVolumes"] == ["vol1"]


HALF_WAY = [
    # what fails, and how
    ("/v2/serverless", 422),
    ("/v2/serverless", 500),
    ("/v2/serverless", "cut"),  # RunPod never did it
    ("/v2/serverless", "lost"),  # RunPod did it, and its answer is lost
    ("/v2/network-volumes", "lost"),
    ("/v2/network-volumes", 500),
]


@pytest.mark.parametrize(("path", "what"), HALF_WAY)
def test_a_create_that_fails_half_way_removes_what_it_made_and_nothing_else(
    api: RunPodApi, platform: RunPodPlatform, path: str, what: int | str
) -> None:
    others = api.create_volume({"name": WITH_VOLUME.name, "size": 20, "dataCenter": "US-TX-3"})["id"]
    another = api.create_endpoint(endpoint_body(Deployment(IMAGE), None))["id"]
    platform.fail("POST", path, what)

    with pytest.raises(EndpointError) as caught:
        create(api, WITH_VOLUME)

    assert list(platform.endpoints) == [another]
    assert list(platform.volumes) == [others]
    assert "nothing was left behind" in caught.value.hint


def test_ctrl_c_removes_what_was_made(api: RunPodApi, platform: RunPodPlatform) -> None:
    def interrupt(exchange: Exchange) -> bool:
        if (exchange.asked.method, exchange.asked.path) != ("POST", "/v2/serverless"):
            return False
        os.kill(os.getpid(), signal.SIGINT)
        exchange.hold(10)
        exchange.cut()
        return True

    platform.before.append(interrupt)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            create(api, WITH_VOLUME)
    finally:
        signal.signal(signal.SIGINT, previous)

    assert ("POST", "/v2/network-volumes") in platform.changes()
    assert platform.volumes == {} and platform.endpoints == {}


def test_a_volume_that_is_there_is_used_where_it_is_and_survives_a_failure(
    api: RunPodApi, platform: RunPodPlatform
) -> None:
    its_id = api.create_volume({"name": WITH_VOLUME.name, "size": 20, "dataCenter": "EU-RO-1"})["id"]
    wanted = Deployment(IMAGE, volume=WantedVolume(id=its_id))
    findings = findings_of(api, wanted)
    wanted = replace(wanted, data_centers=findings.data_centers)
    platform.fail("POST", "/v2/serverless", 500)

    with pytest.raises(EndpointError):
        create(api, wanted)
    created = create(api, wanted)

    assert findings.errors == ()
    assert (created["networkVolumes"], created["dataCenterIds"]) == ([its_id], ["EU-RO-1"])
    assert list(platform.volumes) == [its_id]


def test_what_cannot_be_removed_is_named(api: RunPodApi, platform: RunPodPlatform) -> None:
    platform.fail("POST", "/v2/serverless", 500)
    platform.fail("DELETE", "/v2/network-volumes/vol1", 500)

    with pytest.raises(EndpointError) as caught:
        create(api, WITH_VOLUME)

    assert list(platform.volumes) == ["vol1"]
    assert "perhaps the volume a1111" in caught.value.hint and "costs money" in caught.value.hint


def test_a_create_is_sent_again_only_if_runpod_says_that_it_did_nothing(
    api: RunPodApi, platform: RunPodPlatform
) -> None:
    platform.fail("POST", "/v2/serverless", 429, times=2)

    create(api, Deployment(IMAGE))

    assert platform.changes() == [("POST", "/v2/serverless")] * 3
    assert len(platform.endpoints) == 1


def test_a_question_is_asked_again(api: RunPodApi, platform: RunPodPlatform) -> None:
    for what in (429, 500, "cut"):
        platform.fail("GET", "/v2/serverless", what)

    assert api.endpoints() == []


@pytest.mark.parametrize(
    ("status", "code"), [(403, "ENDPOINT_REFUSED"), (404, "ENDPOINT_NOT_FOUND"), (400, "RUNPOD_REFUSED")]
)
def test_a_refusal_has_a_code_and_runpods_own_sentence(
    api: RunPodApi, platform: RunPodPlatform, status: int, code: str
) -> None:
    platform.fail("GET", "/v2/serverless/ep1", status)

    with pytest.raises(EndpointError) as caught:
        api.endpoint("ep1")

    assert (caught.value.code, caught.value.message) == (code, "out of order")


def test_a_name_is_never_a_path(api: RunPodApi, platform: RunPodPlatform) -> None:
    with pytest.raises(EndpointError):
        api.delete_endpoint("../network-volumes/vol1")

    assert platform.asked[-1].path == "/v2/serverless/..%2Fnetwork-volumes%2Fvol1"


# An endpoint that is there

CURRENT = {
    "name": "a1111",
    "image": "you/a1111-worker:1",
    "env": {"JOBS_IN_FLIGHT": "2", "JOB_TIMEOUT": "570"},
    "gpu": {"pools": ["ADA_24"]},
    "scaling": {"type": "REQUEST_COUNT", "requestCount": 2},
    "workers": {"min": 0, "max": 3},
    "timeout": 600_000,
}
BY_DELAY = {
    **CURRENT,
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 8},
    "workers": {"min": 0, "max": 3, "idleTimeout": 5},
}

UPDATES = [
    # what is there, what changes → what is sent
    (CURRENT, Changes(), {}),
    (CURRENT, Changes(image="you/a1111-worker:1"), {}),
    (CURRENT, Changes(image="you/a1111-worker:2"), {"image": "you/a1111-worker:2"}),
    (CURRENT, Changes(pools=("ADA_24",)), {}),
    (CURRENT, Changes(pools=("AMPERE_24",)), {"gpu": {"pools": ["AMPERE_24"]}}),
    (CURRENT, Changes(workers=(1, 5)), {"workers": {"min": 1, "max": 5}}),
    (
        CURRENT,
        Changes(variables={"JOBS_IN_FLIGHT": "3"}),
        {"env": {"JOBS_IN_FLIGHT": "3", "JOB_TIMEOUT": "570"}, "scaling": {"type": "REQUEST_COUNT", "requestCount": 3}},
    ),
    (
        CURRENT,
        Changes(variables={"JOB_TIMEOUT": "900"}),
        {"env": {"JOBS_IN_FLIGHT": "2", "JOB_TIMEOUT": "900"}, "timeout": 930_000},
    ),
    (
        CURRENT,
        Changes(idle_timeout=60),
        {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 4}, "workers": {"min": 0, "max": 3, "idleTimeout": 60}},
    ),
    (BY_DELAY, Changes(workers=(0, 5)), {"workers": {"min": 0, "max": 5, "idleTimeout": 5}}),
    (BY_DELAY, Changes(idle_timeout=60), {"workers": {"min": 0, "max": 3, "idleTimeout": 60}}),
    (
        CURRENT,
        Changes(secrets={"HF_TOKEN": "hf"}),
        {"env": {"JOBS_IN_FLIGHT": "2", "JOB_TIMEOUT": "570", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}"}},
    ),
]


@pytest.mark.parametrize(("current", "changes", "body"), UPDATES)
def test_an_update_sends_only_what_changes_and_what_must_change_along(
    current: dict[str, Any], changes: Changes, body: dict[str, Any]
) -> None:
    assert update_body(current, changes) == body
    assert errors_of({"$ref": "#/components/schemas/UpdateEndpointRequest"}, body) == []


def test_what_is_shown_of_an_endpoint_has_no_secret() -> None:
    env = {"CIVITAI_API_KEY": "raw", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}", "MAX_STEPS": "50"}

    assert shown({"id": "x", "env": env})["env"] == {
        "CIVITAI_API_KEY": "(not shown)",
        "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}",
        "MAX_STEPS": "50",
    }
    assert shown({"id": "x"}) == {"id": "x"}


def test_a_log_is_read_to_its_end_and_no_further(api: RunPodApi, platform: RunPodPlatform) -> None:
    platform.log_lines["w1"] = [f"line {number}" for number in range(5)]

    lines = list(api.logs("ep1", "w1", tail=3))

    assert [line.text for line in lines] == ["line 2", "line 3", "line 4"]
    assert lines[0].at == "2026-11-21T20:00:02Z"
    with pytest.raises(EndpointError, match="no such worker"):
        list(api.logs("ep1", "w2"))
