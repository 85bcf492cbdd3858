"""What the WebUI answers, in A1111's form and in others: through the real client, from a small real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.errors import WebUILost
from a1111_worker.webui.client import WebUI
from sandbox.server import Exchange, Server
from tests.support import DATA, World, world


class OneAnswer(Server):
    """Answers every request with `body`."""

    body: bytes = b""

    def answer(self, exchange: Exchange) -> None:
        exchange.send(200, self.body, {"content-type": "application/json"})


@pytest.fixture
def server() -> Iterator[OneAnswer]:
    with OneAnswer() as one_answer:
        yield one_answer


NO_LIST = [b"null", b"7", b'"text"', b"{}"]
NO_OBJECT = [b"null", b"7", b'"text"', b"[]"]
NO_ENTRY = [b"[null]", b'["text"]', b"[7]", b"[[]]", b"[{}]"]
STATE = b'"job_no": 0, "job_count": 1, "sampling_step": 0, "sampling_steps": 2'


def progress(progress: bytes = b"0.5", eta: bytes = b"1.0", state: bytes = b"{" + STATE + b"}") -> bytes:
    return b'{"progress": %s, "eta_relative": %s, "state": %s}' % (progress, eta, state)


# the endpoint, the client's call, and bodies in another form than A1111's
FORMS: list[tuple[str, Callable[[WebUI], Any], list[bytes]]] = [
    (
        "/sd-models",
        WebUI.checkpoints,
        [
            *NO_LIST,
            *NO_ENTRY,
            b'[{"sha256": null}]',  # no title
            b'[{"title": 7, "sha256": null}]',
            b'[{"title": "x.safetensors", "sha256": 7}]',
            b'[{"title": "x.safetensors"}]',  # A1111 says null if it knows no hash
            b'[{"title": "x.safetensors", "sha256": null}, null]',  # one good entry is not enough
        ],
    ),
    (
        "/samplers",
        WebUI.samplers,
        [
            *NO_LIST,
            *NO_ENTRY,
            b'[{"name": null}]',
            b'[{"name": "x", "aliases": 7}]',
            b'[{"name": "x", "aliases": [7]}]',
        ],
    ),
    (
        "/schedulers",
        WebUI.schedulers,
        [
            *NO_LIST,
            *NO_ENTRY,
            b'[{"name": "x"}]',
            b'[{"label": "X"}]',
            b'[{"name": "x", "label": 7}]',
            b'[{"name": "x", "label": "X", "aliases": "x"}]',
        ],
    ),
    ("/upscalers", WebUI.upscalers, [*NO_LIST, *NO_ENTRY, b'[{"name": 7}]', b'[{"name": null, "model_path": "x"}]']),
    ("/latent-upscale-modes", WebUI.latent_upscale_modes, [*NO_LIST, *NO_ENTRY, b'[{"name": 7}]']),
    ("/sd-vae", WebUI.vaes, [*NO_LIST, *NO_ENTRY, b'[{"model_name": null}]', b'[{"name": "x"}]']),
    (
        "/prompt-styles",
        WebUI.styles,
        [
            *NO_LIST,
            *NO_ENTRY,
            b'[{"name": null}]',
            b'[{"name": "x", "prompt": 7}]',
            b'[{"name": "x", "prompt": ["y"]}]',
        ],
    ),
    (
        "/scripts",
        WebUI.scripts,
        [*NO_OBJECT, b"{}", b'{"img2img": []}', b'{"txt2img": null}', b'{"txt2img": "x"}', b'{"txt2img": [7]}'],
    ),
    (
        "/script-info",
        WebUI.script_axes,
        [
            *NO_LIST,
            *NO_ENTRY,
            b'[{"name": "x/y/z plot", "is_img2img": false}]',
            b'[{"name": "x/y/z plot", "is_img2img": false, "args": []}]',
            b'[{"name": "x/y/z plot", "is_img2img": false, "args": [{"choices": null}]}]',
        ],
    ),
    (
        "/options",
        WebUI.options,
        [
            *NO_OBJECT,
            b"{}",
            b'{"sd_model_checkpoint": "x"}',
            b'{"sd_checkpoint_hash": "x"}',
            b'{"sd_model_checkpoint": 7, "sd_checkpoint_hash": null}',
            b'{"sd_model_checkpoint": null, "sd_checkpoint_hash": ["x"]}',
        ],
    ),
    (
        "/cmd-flags",
        WebUI.flags,
        [*NO_OBJECT, b'{"no_hashing": "no"}', b'{"no_hashing": null}', b'{"no_hashing": 0}'],
    ),
    (
        "/progress",
        WebUI.progress,
        [
            *NO_OBJECT,
            b"{}",
            progress(progress=b'"much"'),
            progress(progress=b"true"),
            progress(progress=b"NaN"),
            progress(eta=b"1e999"),
            progress(eta=b"null"),
            progress(state=b"null"),
            progress(state=b"{}"),
            progress(state=b'{"job_no": 1e999, "job_count": 1, "sampling_step": 0, "sampling_steps": 2}'),
            progress(state=b'{"job_no": 1%s, "job_count": 1, "sampling_step": 0, "sampling_steps": 2}' % (b"0" * 400)),
        ],
    ),
]


@pytest.mark.parametrize(
    ("endpoint", "ask", "body"),
    [
        pytest.param(endpoint, ask, body, id=f"{endpoint} {body[:50].decode()}")
        for endpoint, ask, bodies in FORMS
        for body in bodies
    ],
)
def test_an_answer_in_another_form_is_a_lost_webui_and_names_its_endpoint(
    server: OneAnswer, endpoint: str, ask: Callable[[WebUI], Any], body: bytes
) -> None:
    server.body = body

    with pytest.raises(WebUILost) as lost:
        ask(WebUI(server.url, backoff=0.0))

    assert f"the WebUI's answer to {endpoint} has another form than A1111's" in lost.value.message


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_an_upscaler_whose_file_is_an_address_is_not_there(server: OneAnswer, version: str) -> None:
    recorded = json.loads((DATA / f"webui-{version}" / "answers" / "upscalers_offline.json").read_text())
    server.body = json.dumps(recorded["response"]["body"]).encode()

    found = WebUI(server.url, backoff=0.0).upscalers()

    assert {upscaler.name for upscaler in found if upscaler.is_there} == {"None", "Lanczos", "Nearest"}
    assert "LDSR" in {upscaler.name for upscaler in found}


# the path, and what the WebUI answers to it in place of its own
ANSWERS = [
    ("sd-models", [{}]),
    ("sd-models", ["x"]),
    ("sd-models", [{"title": "jib_mix_illustrious_realistic_v2.safetensors"}]),
    ("samplers", [{"aliases": []}]),
    ("schedulers", [7]),
    ("upscalers", [{}]),
    ("latent-upscale-modes", ["Latent"]),
    ("sd-vae", [{}]),
    ("prompt-styles", [{}]),
    ("scripts", {"txt2img": None}),
    ("options", {}),
    ("cmd-flags", []),
]


@pytest.mark.parametrize(("name", "body"), ANSWERS)
def test_a_job_that_meets_an_answer_in_another_form_ends_webui_lost(tmp_path: Path, name: str, body: Any) -> None:
    with world(tmp_path) as it:
        it.worker.readiness.invalidate()
        answer_with(it, f"/sdapi/v1/{name}", body)

        answer = it.ask()

    assert (answer["code"], answer["retryable"], answer["refresh_worker"]) == ("WEBUI_LOST", True, True)
    assert f"/{name} has another form" in answer["error"]


def answer_with(it: World, path: str, body: Any) -> None:
    """From now on the WebUI answers GET `path` with `body`."""

    def instead(exchange: Exchange) -> bool:
        if (exchange.asked.method, exchange.asked.path) != ("GET", path):
            return False
        exchange.send_json(200, body)
        return True

    it.webui.before.append(instead)
