"""image/pins.toml and image/pins.py: which files a build brings, and that it brings no other bytes."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from a1111_worker.webui.faces import HELPERS
from image.pins import PINS, Pin, PinError, buildable, choose, fetch, read_pins, write_hashes
from tests.container.test_image import DOCKERFILE
from tests.support import ROOT

REAL = read_pins(PINS.read_text(encoding="utf-8"))
FACES = {f"GFPGAN/{name}" for name in HELPERS}
DEFAULT = {
    *("RealESRGAN/RealESRGAN_x4plus.pth", "RealESRGAN/RealESRGAN_x4plus_anime_6B.pth", "GFPGAN/GFPGANv1.4.pth"),
    *FACES,
}

# build arguments, and the files that they bring
CHOICES: list[tuple[dict[str, str], set[str]]] = [
    ({}, set()),
    ({"BAKE_UPSCALERS": "0"}, set()),
    ({"BAKE_UPSCALERS": DOCKERFILE.arg("BAKE_UPSCALERS")}, DEFAULT),
    ({"BAKE_UPSCALERS": "1 codeformer"}, DEFAULT | {"Codeformer/codeformer-v0.1.0.pth"}),
    ({"BAKE_UPSCALERS": "codeformer"}, FACES | {"Codeformer/codeformer-v0.1.0.pth"}),
    ({"BAKE_UPSCALERS": "realesrgan-anime"}, {"RealESRGAN/RealESRGAN_x4plus_anime_6B.pth"}),
    ({"EXTENSIONS": "controlnet"}, set()),
]


@pytest.mark.parametrize(("arguments", "expected"), CHOICES)
def test_the_build_arguments_choose_the_files(arguments: dict[str, str], expected: set[str]) -> None:
    assert {str(pin.path) for pin in choose(REAL, arguments)} == expected


# build arguments, and what the build ends with
REFUSALS: list[tuple[dict[str, str], str]] = [
    ({"BAKE_UPSCALERS": "yes"}, "BAKE_UPSCALERS has no 'yes'; it knows 1, codeformer, gfpgan, realesrgan"),
    ({"EXTENSIONS": "deforum"}, "EXTENSIONS has no 'deforum'; it knows adetailer, controlnet"),
    ({"CONTROLNET_ANNOTATORS": "hed"}, "CONTROLNET_ANNOTATORS is for EXTENSIONS=controlnet"),
    ({"EXTENSIONS": "controlnet", "CONTROLNET_ANNOTATORS": "zoe"}, "CONTROLNET_ANNOTATORS has no 'zoe'; it knows hed"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_a_build_argument_that_means_nothing_ends_the_build(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(PinError) as error:
        choose(REAL, arguments)

    assert str(error.value).startswith(message)


def test_a_file_without_a_hash_ends_the_build_and_leaves_its_extension_out_of_a_release() -> None:
    pins = [pin_of("detector.pt", b"", argument="EXTENSIONS", words=("adetailer",), sha256=None)]

    with pytest.raises(PinError, match=r"^EXTENSIONS=adetailer: detector\.pt has no SHA-256 .* `make pins`"):
        choose(pins, {"EXTENSIONS": "adetailer"})
    assert buildable(pins, ["controlnet", "adetailer"]) == ["controlnet"]
    assert choose(pins, {"EXTENSIONS": "controlnet"}) == []


def test_every_file_has_a_whole_entry_and_lies_where_a1111_looks() -> None:
    folders = {"RealESRGAN", "GFPGAN", "Codeformer", "adetailer", "ControlNetAnnotators"}

    assert {pin.path.parts[0] for pin in REAL} == folders
    assert len({pin.path for pin in REAL}) == len(REAL)
    assert all(pin.url.startswith("https://") for pin in REAL)
    assert all(pin.sha256 for pin in REAL if pin.argument == "BAKE_UPSCALERS")


def test_what_is_not_free_for_every_use_comes_only_by_its_name() -> None:
    for pin in REAL:
        if "non-commercial" in pin.licence:
            assert "1" not in pin.words and pin.argument != "EXTENSIONS"


# pins.toml, and what is wrong with it
WRONG = [
    ('path = "a.pth"', "a.pth has no url"),
    ('path = "/a.pth"\nurl = "u"\nlicence = "MIT"\nsha256 = ""\nargument = "EXTENSIONS"\nwords = ["a"]', "its path"),
    ('path = "a/../../b"\nurl = "u"\nlicence = "MIT"\nsha256 = ""\nargument = "EXTENSIONS"\nwords = ["a"]', "its path"),
    ('path = "a"\nurl = "u"\nlicence = "MIT"\nsha256 = "12"\nargument = "EXTENSIONS"\nwords = ["a"]', "sha256"),
    ('path = "a"\nurl = "u"\nlicence = "MIT"\nsha256 = ""\nargument = "OTHER"\nwords = ["a"]', "argument"),
    ('path = "a"\nurl = "u"\nlicence = "MIT"\nsha256 = ""\nargument = "EXTENSIONS"\nwords = []', "no word"),
    ('path = "a"\nurl = "u"\nlicence = ""\nsha256 = ""\nargument = "EXTENSIONS"\nwords = ["a"]', "a has no licence"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_a_wrong_entry_ends_the_build(entry: str, message: str) -> None:
    with pytest.raises(PinError) as error:
        read_pins(f"[[file]]\n{entry}\n")

    assert message in str(error.value)


# fetching, from a real server


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which its files are served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pin_of(path: str, content: bytes, url: str = "http://127.0.0.1:9", **more: Any) -> Pin:
    fields: dict[str, Any] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "licence": "MIT",
        "argument": "BAKE_UPSCALERS",
        "words": ("1",),
        **more,
    }
    return Pin(PurePosixPath(path), url, **fields)


def test_a_file_is_fetched_once_and_then_comes_from_the_cache(tmp_path: Path, site: tuple[Path, str]) -> None:
    folder, url = site
    (folder / "a.bin").write_bytes(b"weights")
    pin = pin_of("ESRGAN/a.pth", b"weights", f"{url}/a.bin")

    fetch([pin], tmp_path / "cache", tmp_path / "one")
    (folder / "a.bin").unlink()
    fetch([pin], tmp_path / "cache", tmp_path / "two")

    assert (tmp_path / "one/ESRGAN/a.pth").read_bytes() == b"weights"
    assert (tmp_path / "two/ESRGAN/a.pth").read_bytes() == b"weights"


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, site: tuple[Path, str]) -> None:
    folder, url = site
    (folder / "a.bin").write_bytes(b"weights")
    pin = pin_of("a.pth", b"weights", f"{url}/a.bin")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / str(pin.sha256)).write_bytes(b"weight")

    fetch([pin], tmp_path / "cache", tmp_path / "out")

    assert (tmp_path / "out/a.pth").read_bytes() == b"weights"


def test_other_bytes_under_the_address_end_the_build(tmp_path: Path, site: tuple[Path, str]) -> None:
    folder, url = site
    (folder / "a.bin").write_bytes(b"something else")

    with pytest.raises(PinError, match=rf"^{url}/a\.bin has the SHA-256 [0-9a-f]{{64}}, not [0-9a-f]{{64}}$"):
        fetch([pin_of("a.pth", b"weights", f"{url}/a.bin")], tmp_path / "cache", tmp_path / "out")

    assert not (tmp_path / "out/a.pth").exists()


def test_an_address_that_cannot_be_reached_ends_the_build_with_that_line(
    tmp_path: Path, site: tuple[Path, str]
) -> None:
    _, url = site

    done = build(tmp_path, f"{url}/gone.pth", BAKE_UPSCALERS="1")

    assert done.returncode == 1
    assert done.stderr == f"pins: cannot fetch {url}/gone.pth (answered 404), which BAKE_UPSCALERS asks for\n"


def test_make_pins_writes_what_is_missing_and_leaves_the_rest_as_it_is(tmp_path: Path, site: tuple[Path, str]) -> None:
    folder, url = site
    (folder / "a.pth").write_bytes(b"weights")
    pins = write_pins(tmp_path, f"{url}/a.pth", sha256="")
    before = pins.read_text(encoding="utf-8")

    done = run(tmp_path, "write")
    again = run(tmp_path, "write")
    built = run(tmp_path, "fetch", tmp_path / "cache", tmp_path / "out", BAKE_UPSCALERS="1")

    digest = hashlib.sha256(b"weights").hexdigest()
    assert done.stdout == f"{digest} 7 a.pth\n" and again.stdout == ""
    assert pins.read_text(encoding="utf-8") == before.replace('sha256 = ""', f'sha256 = "{digest}"')
    assert built.returncode == 0 and (tmp_path / "out/a.pth").read_bytes() == b"weights"
    assert {file.name for file in (tmp_path / "image").iterdir()} <= {"pins.py", "pins.toml", "__pycache__"}


def test_hashes_that_were_found_are_kept_if_a_later_file_cannot_be_reached(tmp_path: Path) -> None:
    pins = tmp_path / "pins.toml"
    entry = '[[file]]\npath = "{}"\nurl = "u"\nsha256 = ""\nlicence = "MIT"\nargument = "EXTENSIONS"\nwords = ["a"]\n'
    pins.write_text(entry.format("one") + entry.format("two"), encoding="utf-8")

    def find(pin: Pin) -> str:
        if pin.path.name == "two":
            raise PinError("gone")
        return "a" * 64

    with pytest.raises(PinError):
        write_hashes(pins, find)

    assert [pin.sha256 for pin in read_pins(pins.read_text(encoding="utf-8"))] == ["a" * 64, None]


def test_the_workers_lock_has_what_the_program_imports() -> None:
    locked = (ROOT / "locks/worker.txt").read_text(encoding="utf-8")

    assert all(f"\n{name}==" in f"\n{locked}" for name in ("requests", "tomlkit", "urllib3"))


def write_pins(folder: Path, url: str, sha256: str) -> Path:
    (folder / "image").mkdir()
    (folder / "image/pins.py").write_bytes((ROOT / "image/pins.py").read_bytes())
    pins = folder / "image/pins.toml"
    pins.write_text(
        f'# a comment\n[[file]]\npath = "a.pth"  # another\nurl = "{url}"\nsha256 = "{sha256}"\n'
        'licence = "MIT"\nargument = "BAKE_UPSCALERS"\nwords = ["1"]\n',
        encoding="utf-8",
    )
    return pins


def build(folder: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    write_pins(folder, url, sha256="0" * 64)
    return run(folder, "fetch", folder / "cache", folder / "out", **environment)


def run(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given: Mapping[str, str] = {"PATH": os.environ["PATH"], **environment}
    program = [sys.executable, folder / "image/pins.py", *arguments]
    return subprocess.run(program, env=given, capture_output=True, text=True, timeout=60)
