"""A client of the sandbox's WebUI, the recorded answers of real ones, and how the two are compared."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests
from PIL import Image

from sandbox.webui import SandboxWebUI
from tests.support import DATA, wait_until

VERSIONS = ("1.9.3", "1.10.1")

TINY = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": 1}


def recordings(folder: str, names: str = "*") -> list[Any]:
    """The rows `(version, path)` of a table: each version's recordings in a folder, those with these names."""
    return [
        pytest.param(version, path, id=f"{version}-{path.stem}")
        for version in VERSIONS
        for path in sorted((DATA / f"webui-{version}" / folder).glob(f"{names}.json"))
    ]


def post(webui: SandboxWebUI, path: str, body: Any = None) -> requests.Response:
    return requests.post(f"{webui.url}/sdapi/v1/{path}", json=body, headers={"accept-encoding": "identity"}, timeout=30)


def get(webui: SandboxWebUI, path: str) -> Any:
    return requests.get(f"{webui.url}/sdapi/v1/{path}", headers={"accept-encoding": "identity"}, timeout=30).json()


def switch(webui: SandboxWebUI, name: Any) -> requests.Response:
    """Switch to a checkpoint. If nothing is loaded yet, 1.9.3 would lose that: it loads one first."""
    if webui.version == "1.9.3" and webui.process.model.loaded is None and not webui.process.model.is_broken:
        post(webui, "reload-checkpoint")
    return post(webui, "options", {"sd_model_checkpoint": name})


def txt2img(webui: SandboxWebUI, **fields: Any) -> Any:
    """A tiny job; its answer with `info` decoded."""
    answer = post(webui, "txt2img", {**TINY, **fields})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    body["info"] = json.loads(body["info"])
    return body


def image(webui: SandboxWebUI, **fields: Any) -> str:
    """A hash of the pixels of a tiny job's picture."""
    return pixels(txt2img(webui, **fields)["images"][0])


def open_image(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def pixels(encoded: str) -> str:
    return hashlib.sha256(open_image(encoded).convert("RGB").tobytes()).hexdigest()


def in_background(webui: SandboxWebUI, path: str, body: Any) -> Future[Any]:
    """Send a request in the background."""
    threads = ThreadPoolExecutor(max_workers=1)
    answer = threads.submit(lambda: post(webui, path, body).json())
    threads.shutdown(wait=False)
    return answer


def started(webui: SandboxWebUI, path: str = "txt2img", **fields: Any) -> Callable[[], Any]:
    """Start a job in the background. Call the result for its answer, with `info` decoded if it has one."""
    answer = in_background(webui, path, {**TINY, **fields} if path.endswith("2img") else fields)
    wait_until(lambda: get(webui, "progress")["state"]["job"] or answer.done(), "the job in /progress")

    def result() -> Any:
        body = answer.result()
        return {**body, "info": json.loads(body["info"])} if "info" in body else body

    return result


def sampling(webui: SandboxWebUI, path: str = "txt2img", **fields: Any) -> Callable[[], Any]:
    """The same, after its first step: an interrupt from now on leaves an unfinished picture."""
    answer = started(webui, path, **fields)
    wait_until(lambda: get(webui, "progress")["state"]["sampling_step"], "the first step")
    return answer


# --- Comparison ---------------------------------------------------------------------------------------------------


def without_variable_parts(info: Any, random_seed: bool = False) -> Any:
    """`info` without what differs each time: times, random seeds, hashes of other files."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "LORA", json.dumps(info))
    text = re.sub(r"\b(?=\d*[a-f])[0-9a-f]{10}\b|(?<=hash\": \")\d{10}\b", "HASH", text)
    text = re.sub(r'("job_timestamp": )"\d+"', r"\1MOMENT", text)
    text = re.sub(r'("(all_)?subseeds?": )(\[[\d, ]+\]|\d+)', r"\1RANDOM", text)
    if random_seed:
        text = re.sub(r'("(all_)?seeds?": )(\[[\d, ]+\]|\d+)|Seed: \d+', "RANDOM", text)
    return text


def typed(value: Any) -> Any:
    """The types at every level: 7 and 7.0 are equal numbers, but not the same JSON."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each) for each in value]
    return type(value).__name__


def assert_same_shape(ours: Any, theirs: Any) -> None:
    """The same keys in the same order, and compatible types. Of a list only the first element is compared."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and "ss_network_dim" not in theirs:
        assert list(ours) == list(theirs)
        for key in theirs:
            if key != "metadata":
                assert_same_shape(ours[key], theirs[key])
    elif isinstance(theirs, list) and isinstance(ours, list):
        if ours and theirs:
            assert_same_shape(ours[0], theirs[0])
    elif ours is not None and theirs is not None:
        numbers = (int, float)
        assert type(ours) is type(theirs) or (isinstance(ours, numbers) and isinstance(theirs, numbers))
