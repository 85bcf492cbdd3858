"""OpenAI's Images API, used by the openai package itself."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from a1111_client.gateway.guard import parse_access
from a1111_client.gateway.openai import Pictures
from sandbox.runpod import CANCELLED
from tests.client.scripted import PNG, Desk, Taken, desk, picture_answer
from tests.support import wait_until


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Desk]:
    access = parse_access(host="127.0.0.1", api_auth="me:secret")
    with desk(tmp_path, access=access) as made:
        yield made


def client_of(made: Desk, key: str = "secret") -> openai.OpenAI:
    """A client of the package, closed with the desk."""
    return made.closed_with_it(openai.OpenAI(base_url=f"{made.url}/v1", api_key=key))


def test_pictures_are_made_with_the_workers_defaults_and_a1111s_fields_as_extras(fresh: Desk) -> None:
    answer = client_of(fresh).images.generate(
        prompt="a lighthouse",
        model="gpt-image-1",
        n=2,
        size="512x768",
        response_format="b64_json",
        extra_body={"seed": 42, "negative_prompt": "fog", "steps": "30", "loras": [{"name": "fog_1"}], "nobody": 1},
    )

    assert [image.b64_json for image in answer.data or ()] == [PNG, PNG]
    assert fresh.worker.inputs == [
        {
            "prompt": "a lighthouse",
            "negative_prompt": "fog",
            "seed": 42,
            "steps": 30,
            "cfg_scale": 7.0,
            "width": 512,
            "height": 768,
            "n_iter": 2,
            "sampler_name": "DPM++ 2M Karras",
            "loras": [{"name": "fog_1"}],
        }
    ]


def test_a_link_leads_to_the_picture_and_a_guess_does_not(fresh: Desk) -> None:
    answer = client_of(fresh).images.generate(prompt="a lighthouse", response_format="url")

    assert answer.data
    (image,) = answer.data
    assert image.url and image.b64_json is None
    picture = httpx.get(image.url, trust_env=False)
    assert (picture.content, picture.headers["content-type"]) == (base64.b64decode(PNG), "image/png")
    assert httpx.get(image.url[:-8] + "aaaa.png", trust_env=False).status_code == 404


def test_pictures_behind_links_are_kept_for_a_while_and_within_a_limit() -> None:
    for_a_moment, small = Pictures(seconds=0.0), Pictures(limit=10)

    gone = for_a_moment.keep(b"x", "png")
    names = [small.keep(b"123456", "png") for _ in range(3)]

    assert for_a_moment.find(gone) is None
    assert [small.find(name) for name in names] == [None, None, b"123456"]


def png(mode: str, colour: Any, hole: tuple[int, int, int, int] | None = None) -> bytes:
    image, file = Image.new(mode, (640, 320), colour), io.BytesIO()
    if hole:
        image.paste((0, 0, 0, 0), hole)
    image.save(file, "png")
    return file.getvalue()


def test_an_edit_is_img2img_and_the_transparent_part_of_the_mask_is_repainted(fresh: Desk) -> None:
    picture = png("RGB", "red")
    mask = png("RGBA", (0, 0, 0, 255), hole=(0, 0, 320, 320))

    answer = client_of(fresh).images.edit(
        image=("a.png", picture), mask=("m.png", mask), prompt="a door", extra_body={"denoising_strength": "0.5"}
    )

    assert answer.data and answer.data[0].b64_json == PNG
    (given,) = fresh.worker.inputs
    assert base64.b64decode(given["init_images"][0]) == picture
    assert given.items() >= {("task", "img2img"), ("width", 640), ("height", 320), ("denoising_strength", 0.5)}
    shape = Image.open(io.BytesIO(base64.b64decode(given["mask"])))
    assert (shape.getpixel((100, 100)), shape.getpixel((600, 100))) == (255, 0)


def test_previews_and_the_picture_are_streamed(fresh: Desk) -> None:
    seen = threading.Event()

    def work(taken: Taken) -> Any:
        taken.report(stage="generate", percent=50, preview="cHJldmlldw==")
        taken.wait_for(seen)
        return picture_answer(taken.given)

    fresh.worker.work = work
    stream = client_of(fresh).images.generate(prompt="a lighthouse", stream=True, partial_images=2)
    events = []
    for event in stream:
        events.append((event.type, event.b64_json))
        seen.set()

    assert events == [("image_generation.partial_image", "cHJldmlldw=="), ("image_generation.completed", PNG)]
    assert fresh.worker.inputs[0]["preview"] is True


def test_a_stream_that_is_left_cancels_its_job(tmp_path: Path) -> None:
    with desk(tmp_path, asleep=True) as made:
        with client_of(made).images.generate(prompt="x", stream=True) as stream:
            wait_until(lambda: made.queue.jobs, "a job")
            stream.response.close()

        (job,) = made.queue.jobs.values()
        wait_until(lambda: job.status == CANCELLED, "the cancellation")


def test_the_models_are_the_checkpoints(fresh: Desk) -> None:
    client = client_of(fresh)

    assert [model.id for model in client.models.list()] == ["house", "garden"]
    assert client.models.retrieve("garden").id == "garden"
    client.images.generate(prompt="x", model="garden")
    client.images.generate(prompt="x", model="house")
    assert [given.get("checkpoint") for given in fresh.worker.inputs] == ["Garden", None]


def test_a_failed_job_is_an_error_with_our_code_and_is_not_sent_again(fresh: Desk) -> None:
    fresh.worker.work = lambda taken: {"error": "x", "code": "OUT_OF_MEMORY", "message": "no room", "hint": "be small"}

    with pytest.raises(openai.InternalServerError) as caught:
        client_of(fresh).images.generate(prompt="a lighthouse")

    assert (caught.value.code, "no room (be small)" in str(caught.value)) == ("OUT_OF_MEMORY", True)
    assert len(fresh.queue.jobs) == 1


def test_a_failure_in_a_stream_is_an_error_of_the_stream(fresh: Desk) -> None:
    fresh.worker.work = lambda taken: {"error": "x", "code": "MODEL_NOT_FOUND", "message": "no such LoRA"}

    with pytest.raises(openai.APIError, match="no such LoRA"):
        list(client_of(fresh).images.generate(prompt="a lighthouse", stream=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": " "}, "prompt"),
    ({"prompt": "x", "n": 11}, "n"),
    ({"prompt": "x", "size": "big"}, "size"),
    ({"prompt": "x", "response_format": "tiff"}, "response_format"),
    ({"prompt": "x", "output_format": "gif"}, "output_format"),
    ({"prompt": "x", "extra_body": {"steps": "many"}}, "steps"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_what_cannot_be_meant_is_refused_and_costs_nothing(fresh: Desk, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(fresh).images.generate(**body)

    assert caught.value.param == param
    assert fresh.queue.jobs == {}


def test_an_unknown_model_is_not_found(fresh: Desk) -> None:
    with pytest.raises(openai.NotFoundError, match="there is house, garden"):
        client_of(fresh).images.generate(prompt="x", model="cellar")


@pytest.mark.parametrize("key", ["wrong", "me:secret"])
def test_a_wrong_key_is_refused(fresh: Desk, key: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(fresh, key).images.generate(prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client_of(fresh, key).models.list()
