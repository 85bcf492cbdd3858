"""Brings the files of pins.toml into the image, each proven by its SHA-256; a file without one ends the build.

python pins.py fetch CACHE FOLDER    in the build: what BAKE_UPSCALERS, EXTENSIONS and CONTROLNET_ANNOTATORS ask for
python pins.py buildable WORDS       those extensions among WORDS whose files all have a SHA-256
python pins.py write                 `make pins`: download what has no SHA-256 yet, and write it into pins.toml
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
import tomlkit
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

PINS = Path(__file__).parent / "pins.toml"
ARGUMENTS = ("BAKE_UPSCALERS", "EXTENSIONS", "CONTROLNET_ANNOTATORS")
EXTENSIONS = ("controlnet", "adetailer")
NOTHING = "0"  # BAKE_UPSCALERS=0
TIMEOUT = 60.0  # seconds without a byte
TRIES = 3
CHUNK = 1 << 20


class PinError(Exception):
    """Why the build ends."""


@dataclass(frozen=True)
class Pin:
    """A file of pins.toml, which explains the fields. `sha256` is None if it is not known yet."""

    path: PurePosixPath
    url: str
    sha256: str | None
    licence: str
    argument: str
    words: tuple[str, ...]


def read_pins(text: str) -> list[Pin]:
    """The files of pins.toml. Raises PinError for an entry that is not what pins.toml explains."""
    return [_read_pin(entry) for entry in tomlkit.parse(text).unwrap().get("file", [])]


def choose(pins: Iterable[Pin], environ: Mapping[str, str]) -> list[Pin]:
    """The files that the build arguments ask for. PinError: an unknown word, or a file without SHA-256."""
    pins = list(pins)
    words = {name: [word for word in environ.get(name, "").split() if word != NOTHING] for name in ARGUMENTS}
    for name, given in words.items():
        known = {word for pin in pins if pin.argument == name for word in pin.words}
        known |= set(EXTENSIONS) if name == "EXTENSIONS" else set()
        for word in given:
            if word not in known:
                raise PinError(f"{name} has no {word!r}; it knows {', '.join(sorted(known))}")
    if words["CONTROLNET_ANNOTATORS"] and "controlnet" not in words["EXTENSIONS"]:
        raise PinError("CONTROLNET_ANNOTATORS is for EXTENSIONS=controlnet")
    chosen = [pin for pin in pins if not set(pin.words).isdisjoint(words[pin.argument])]
    for pin in chosen:
        if pin.sha256 is None:
            raise PinError(
                f"{pin.argument}={' '.join(words[pin.argument])}: {pin.path} has no SHA-256 in image/pins.toml; "
                f"`make pins` writes it, on a machine that reaches {pin.url}"
            )
    return chosen


def fetch(pins: Iterable[Pin], cache: Path, folder: Path) -> None:
    """Put every file into the folder. The cache keeps them for the next build, by their SHA-256."""
    for pin in pins:
        assert pin.sha256 is not None, "choose comes first"
        cached = cache / pin.sha256
        if not cached.exists() or _sha256(cached) != pin.sha256:
            found = download(pin, cached.with_suffix(".part"))
            if found != pin.sha256:
                raise PinError(f"{pin.url} has the SHA-256 {found}, not {pin.sha256}")
            cached.with_suffix(".part").replace(cached)
        target = folder / pin.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached, target)


def download(pin: Pin, part: Path) -> str:
    """Download a file, and return its SHA-256. Raises PinError if the address cannot be reached."""
    part.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with requests.Session() as session, part.open("wb") as file:
            retry = Retry(TRIES - 1, backoff_factor=1, status_forcelist=(429, 502, 503, 504))
            session.mount(pin.url, HTTPAdapter(max_retries=retry))
            with session.get(pin.url, stream=True, timeout=TIMEOUT) as answer:
                answer.raise_for_status()
                for chunk in answer.iter_content(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
    except requests.RequestException as error:
        reason = f"answered {error.response.status_code}" if error.response is not None else type(error).__name__
        raise PinError(f"cannot fetch {pin.url} ({reason}), which {pin.argument} asks for") from error
    return digest.hexdigest()


def buildable(pins: Sequence[Pin], words: Iterable[str]) -> list[str]:
    """Those of the extensions that can be built: all their files have a SHA-256."""
    unpinned = {word for pin in pins if pin.argument == "EXTENSIONS" and pin.sha256 is None for word in pin.words}
    return [word for word in words if word not in unpinned]


def write_hashes(path: Path, find: Callable[[Pin], str]) -> None:
    """Write what `find` returns for each file without SHA-256 into pins.toml, each as soon as it is known."""
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    for entry in document["file"]:
        pin = _read_pin(entry.unwrap())
        if pin.sha256 is None:
            entry["sha256"] = find(pin)
            path.write_text(tomlkit.dumps(document), encoding="utf-8")


def _read_pin(entry: Mapping[str, object]) -> Pin:
    name = entry.get("path")
    try:
        path, url, licence = (_text(entry, key) for key in ("path", "url", "licence"))
        sha256, argument = str(entry["sha256"]), _text(entry, "argument")
        words = entry["words"]
    except KeyError as error:
        raise PinError(f"pins.toml: {name} has no {error.args[0]}") from None
    is_inside = not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
    if not is_inside or not re.fullmatch("[0-9a-f]{64}|", sha256) or argument not in ARGUMENTS:
        raise PinError(f"pins.toml: {name}: its path, sha256 or argument is wrong")
    if not isinstance(words, list) or not words:
        raise PinError(f"pins.toml: {name}: no word of {argument} brings it")
    return Pin(PurePosixPath(path), url, sha256 or None, licence, argument, tuple(map(str, words)))


def _text(entry: Mapping[str, object], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise KeyError(key)
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download_and_show(pin: Pin) -> str:
    part = PINS.with_suffix(".part")
    try:
        found = download(pin, part)
        sys.stdout.write(f"{found} {part.stat().st_size} {pin.path}\n")
    finally:
        part.unlink(missing_ok=True)
    return found


def main(arguments: Sequence[str]) -> None:
    pins = read_pins(PINS.read_text(encoding="utf-8"))
    if arguments[0] == "fetch":
        fetch(choose(pins, os.environ), Path(arguments[1]), Path(arguments[2]))
    elif arguments[0] == "buildable":
        sys.stdout.write(" ".join(buildable(pins, " ".join(arguments[1:]).split())) + "\n")
    elif arguments[0] == "write":
        write_hashes(PINS, _download_and_show)
    else:
        raise PinError("fetch, buildable or write")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PinError as problem:
        sys.exit(f"pins: {problem}")
