"""The ways to name a model, each reduced to ids if it holds ids.

    https://civitai.com/api/download/models/135867?type=Model&format=SafeTensor&size=pruned&fp=fp16&fileId=99264
    https://civitai.com/models/122359/detail-tweaker-xl?modelVersionId=135867      (without it: the newest version)
    https://civitai.com/model-versions/135867        https://civitai.com/api/v1/model-versions/135867
    urn:air:sdxl:lora:civitai:122359@135867+99264.safetensors       civitai:122359@135867
    {"url": …} {"version_id": 135867} {"name": "detail_tweaker_xl"}, each with "name" and "hash" beside it
    hf:OWNER/REPO/path/file.safetensors@REVISION       and the URLs of Hugging Face that hub_files.py lists
    detail_tweaker_xl        135867 (digits alone are a version id)

A CivitAI URL is never fetched as it was written: only its ids leave this module. The URL of another host is kept if its
whole origin (scheme, host and port) is allowed. The message of a refusal never repeats the URL.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, unquote

from a1111_worker import catalog
from a1111_worker.domain import HubFile, ModelKind, ModelRef
from a1111_worker.models.hub_files import HUB_HOSTS, SCHEME, parse_hub_path, parse_hub_text
from a1111_worker.origins import DEFAULT_PORTS, Origin, OriginRefused, origin_of, parse_origin

CIVITAI_HOSTS = frozenset(
    f"{www}civitai.{top}"
    for www in ("", "www.")
    for top in ("com", "red", "green")  # SFW, everything, green: the same ids on all of them
)
MAX_REFERENCE = 2_000  # characters
MAX_NAME = 200
MAX_ID = 2**53  # JSON carries every id below it exactly

_FORMS = "a URL of CivitAI or Hugging Face, an AIR (civitai:122359@135867), hf:OWNER/REPO/FILE.safetensors, or a name"
_AIR_TYPES = {
    ModelKind.LORA: frozenset({"lora", "lycoris", "locon", "dora"}),
    ModelKind.CHECKPOINT: frozenset({"checkpoint"}),
    ModelKind.EMBEDDING: frozenset({"embedding", "textualinversion"}),
    ModelKind.VAE: frozenset({"vae"}),
    ModelKind.CONTROLNET: frozenset({"controlnet"}),
}

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
_AUTHORITY = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?")
_KEY_IN_QUERY = re.compile(r"(?:^|[&;?])(?:amp;)?token=", re.IGNORECASE)
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?(?:(?P<first>[\w-]+):)?(?:(?P<second>[\w-]+):)?(?P<source>[\w-]+):(?P<model>[^:@+.]+)"
    r"(?:@(?P<version>[^:@+.]+))?(?:\+(?P<file>[^:@+.]+))?(?:\.(?P<format>\w+))?",
    re.ASCII | re.IGNORECASE,
)


class BadReference(ValueError):
    """A reference that cannot be used. `problems` are pairs: a key of the object (or ""), and a message."""

    def __init__(self, *problems: str | tuple[str, str]) -> None:
        self.problems = tuple(("", problem) if isinstance(problem, str) else problem for problem in problems)
        super().__init__("; ".join(f"{key}: {message}" if key else message for key, message in self.problems))


def parse_reference(
    value: str | Mapping[str, Any], *, kind: ModelKind, allowed_hosts: Collection[str] = ()
) -> ModelRef:
    """The model that `value` names. Raises BadReference if it names none. Unknown keys of an object are ignored.

    `allowed_hosts` are origins as MODEL_HOSTS has them (`https://cdn.example.com`, `http://127.0.0.1:8081`).
    """
    if isinstance(value, str):
        return catalog.resolve(_parse_text(value, kind, allowed_hosts))
    if isinstance(value, Mapping):
        return catalog.resolve(_parse_object(value, kind, allowed_hosts))
    raise BadReference(f"must be text or an object: {_FORMS}")


def _parse_text(text: str, kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    text = _stripped(text, MAX_REFERENCE)
    if _SCHEME.match(text):
        return _parse_url(text, kind, allowed_hosts)
    if text.lower().startswith(SCHEME):
        return ModelRef(kind=kind, hub=_hub_file(parse_hub_text, text))
    if ":" in text:
        return _parse_air(text, kind)
    if re.fullmatch(r"[0-9]+", text):
        return ModelRef(kind=kind, version_id=_parse_version_id(text))
    if "/" in text:
        raise BadReference("a URL starts with https://, and a name holds no / or \\")
    return ModelRef(kind=kind, name=parse_name(text))


def _parse_object(given: Mapping[str, Any], kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    """Every key is parsed on its own first, so that all problems are reported together."""
    parsers: dict[str, Callable[[Any], Any]] = {
        "url": lambda url: _parse_text(_url_or_air(url), kind, allowed_hosts),
        "version_id": _parse_version_id,
        "name": parse_name,
        "hash": parse_sha256,
    }
    parsed: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    if all(given.get(key) is None for key in ("url", "version_id", "name")):
        problems.append(("", 'names no model: give "url", "version_id" or "name"'))
    for key, value in given.items():
        if key in parsers and value is not None:
            try:
                parsed[key] = parsers[key](value)
            except BadReference as error:
                problems += [(key, message) for _, message in error.problems]
    of_url: ModelRef | None = parsed.get("url")
    version_id: int | None = parsed.get("version_id")
    if of_url is not None and version_id is not None:
        if (of_url.url, of_url.hub) != (None, None):
            problems.append(("version_id", "contradicts url, which is not CivitAI's: give one of them"))
        elif of_url.version_id not in (None, version_id):
            problems.append(("version_id", f"contradicts url, which names version {of_url.version_id}"))
        of_url = replace(of_url, version_id=version_id, model_id=None)
    if problems:
        order = ["", *given]
        raise BadReference(*sorted(problems, key=lambda problem: order.index(problem[0])))
    ref = of_url or ModelRef(kind=kind, version_id=version_id)
    return replace(ref, name=parsed.get("name"), sha256=parsed.get("hash"))


def _url_or_air(url: object) -> str:
    if not isinstance(url, str):
        raise BadReference("must be text")
    if ":" not in url:
        raise BadReference("must be a URL that starts with https://, an AIR, or hf:OWNER/REPO/FILE.safetensors")
    return url


def parse_name(text: object) -> str:
    """A model's name: a title or a file's stem. It is never a path, because file names on disk are made from it."""
    if not isinstance(text, str):
        raise BadReference("must be text")
    name = _stripped(text, MAX_NAME)
    if "/" in name or "\\" in name:
        raise BadReference("must be a name: no / or \\ in it")
    if not name.strip("."):
        raise BadReference("must be a name, not only dots")
    return name


def parse_sha256(text: object) -> str:
    """64 hex digits, in any case, as CivitAI shows them."""
    if not isinstance(text, str):
        raise BadReference("must be text")
    digits = text.strip().lower().removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{64}", digits):
        return digits
    if re.fullmatch(r"[0-9a-f]{10}", digits):
        raise BadReference(
            "must be a SHA256 of 64 hex digits; 10 digits are CivitAI's AutoV2, too few to verify a file"
        )
    raise BadReference("must be a SHA256: 64 hex digits")


# -- URLs -------------------------------------------------------------------------------------------------------------


def _parse_url(url: str, kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    origin, path, query = _split_url(url)
    if _KEY_IN_QUERY.search(query) or _KEY_IN_QUERY.search(unquote(query)):
        raise BadReference("must not hold a key (token=): the worker has its own, CIVITAI_API_KEY")
    if origin.host in CIVITAI_HOSTS and str(origin) == f"https://{origin.host}":
        return _parse_civitai(path, query, kind)
    if origin.host in HUB_HOSTS and str(origin) == f"https://{origin.host}":
        return ModelRef(kind=kind, hub=_hub_file(parse_hub_path, path))
    if not _is_allowed(origin, allowed_hosts):
        raise _not_allowed(str(origin))
    if path in ("", "/"):
        raise BadReference(f"names no file on {origin.host}")
    return ModelRef(kind=kind, url=f"{origin}{path}{f'?{query}' if query else ''}")


def _hub_file(parse: Callable[[str], HubFile], text: str) -> HubFile:
    try:
        return parse(text)
    except ValueError as error:
        raise BadReference(str(error)) from error


def _split_url(url: str) -> tuple[Origin, str, str]:
    """Origin, path and query of a URL, by a grammar that is stricter than `origin_of`'s and says what is wrong.

    urllib drops tabs and newlines without a word, and knows many spellings of a host.
    """
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        raise BadReference("must be a URL of plain characters: no spaces, no \\, nothing beyond ASCII")
    match = _URL.fullmatch(url)
    if match is None:
        raise BadReference("must be a URL")
    scheme, authority, path, query, fragment = match.groups(default="")
    scheme, authority = scheme.lower(), authority.lower()
    if scheme not in ("https", "http"):
        raise BadReference(f"must start with https://: {scheme[:20]}:// is not allowed")
    if "@" in authority:
        raise BadReference("must not hold a user name or a password")
    if fragment:
        raise BadReference("must not hold a part after #")
    if not _AUTHORITY.fullmatch(authority):
        raise BadReference("must name its host by letters, digits, dots and hyphens")
    try:
        return origin_of(url), path, query
    except OriginRefused as error:  # a host with a dot or a hyphen at an end, or a port that no host has
        raise _not_allowed(f"{scheme}://{authority}") from error


def _is_allowed(origin: Origin, allowed_hosts: Collection[str]) -> bool:
    """Whether one of MODEL_HOSTS is exactly this origin. Plain http needs a named port, on this machine.

    A pattern (`https://*.example.com`) allows redirects, never a job's URL.
    """
    if origin.scheme == "http" and origin.port == DEFAULT_PORTS["http"]:
        return False
    for entry in allowed_hosts:
        with contextlib.suppress(OriginRefused):
            if parse_origin(entry) == origin:
                return True
    return False


def _not_allowed(origin: str) -> BadReference:
    if origin.startswith("http:"):
        return BadReference("must start with https://: http:// is not allowed")
    return BadReference(
        f"may name CivitAI, Hugging Face or a host of the worker's MODEL_HOSTS, not {origin.removeprefix('https://')}"
    )


def _parse_civitai(path: str, query: str, kind: ModelKind) -> ModelRef:
    path = path.rstrip("/")
    fields = _query_fields(query)
    if match := re.fullmatch(r"/api/download/models/([^/]+)", path):
        version_id = _text_id(match[1], "the version")
        file_id = _optional_id(fields, "fileid", "fileId")
        return _with_variant_filter(ModelRef(kind=kind, version_id=version_id, file_id=file_id), fields)
    if match := re.fullmatch(r"(?:/api/v1)?/model-versions/([^/]+)", path):
        return ModelRef(kind=kind, version_id=_text_id(match[1], "the version"))
    if match := re.fullmatch(r"(?:/api/v1)?/models/([^/]+)(?:/.*)?", path):
        model_id = _text_id(match[1], "the model")
        version = _optional_id(fields, "modelversionid", "modelVersionId")
        return ModelRef(kind=kind, version_id=version, model_id=None if version else model_id)
    raise BadReference(
        "must be a CivitAI page of a model (/models/…), of a version (/model-versions/…) or a download "
        "(/api/download/models/…)"
    )


def _query_fields(query: str) -> dict[str, str]:
    """A query's fields, names in lower case. If two contradict each other, CivitAI takes the first, people the last."""
    fields: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if fields.setdefault(name.lower(), value) != value:
            raise BadReference("must not give a field of its query twice, with different values")
    return fields


def _with_variant_filter(ref: ModelRef, fields: Mapping[str, str]) -> ModelRef:
    """`ref` with `format`, `size` and `fp` of a download URL, in CivitAI's own spelling. `type` is only checked."""
    if fields.get("type", "Model").lower() not in ("model", "pruned model"):
        raise BadReference("must ask for type=Model")
    file_format, size, fp = fields.get("format"), fields.get("size"), fields.get("fp")
    if file_format and file_format.lower() not in ("safetensor", "safetensors"):
        raise BadReference("must ask for format=SafeTensor: nothing else is loaded, a pickle least of all")
    if size and size.lower() not in ("full", "pruned"):
        raise BadReference("must ask for size=full or size=pruned")
    if fp and not re.fullmatch(r"[A-Za-z0-9]{1,8}", fp):
        raise BadReference("must ask for an fp that CivitAI knows (fp16, fp32, bf16, …)")
    return replace(
        ref,
        format="SafeTensor" if file_format else None,
        size=size.lower() if size else None,
        fp=fp.lower() if fp else None,
    )


# -- AIR and ids ------------------------------------------------------------------------------------------------------


def _parse_air(text: str, kind: ModelKind) -> ModelRef:
    """`urn:air:{ecosystem}:{type}:{source}:{model}[@version][+file][.format]`; all before the source may be absent."""
    match = _AIR.fullmatch(text)
    if match is None:
        raise BadReference(f"must be {_FORMS}")
    first, second, source = match["first"], match["second"], match["source"].lower()
    if source != "civitai":
        raise BadReference(f"must be {_FORMS}; models of other sources are not fetched")
    given_type = second or (first if first and first.lower() in set().union(*_AIR_TYPES.values()) else None)
    if given_type and given_type.lower() not in _AIR_TYPES[kind]:
        raise BadReference(f"must name a model of the kind {kind.label}: this AIR's type is {given_type.lower()[:20]}")
    if match["format"] and match["format"].lower() not in ("safetensor", "safetensors"):
        raise BadReference("must be of the format safetensors: nothing else is loaded")
    version_id = _text_id(match["version"], "the version") if match["version"] else None
    file_id = _text_id(match["file"], "the file") if match["file"] else None
    model_id = _text_id(match["model"], "the model")
    if file_id is not None and version_id is None:
        raise BadReference("must name the version of its file (civitai:MODEL@VERSION+FILE)")
    return ModelRef(kind=kind, version_id=version_id, file_id=file_id, model_id=None if version_id else model_id)


def _optional_id(fields: Mapping[str, str], name: str, label: str) -> int | None:
    return _text_id(fields[name], label) if name in fields else None


def _text_id(text: str, label: str) -> int:
    if re.fullmatch(r"[0-9]{1,16}", text) and 0 < int(text) < MAX_ID:
        return int(text)
    raise BadReference(f"must give {label} as a number")


def _parse_version_id(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # to JSON, 135867 and 135867.0 are the same
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,16}(\.0)?", value):
        value = int(value.removesuffix(".0"))  # some clients send numbers as text
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_ID:
        raise BadReference("must be a CivitAI version id: a whole number above 0")
    return value


def _stripped(text: str, longest: int) -> str:
    """Text without blanks around it. BadReference if it is too long, blank, or holds control characters."""
    if len(text) > longest:
        raise BadReference(f"must be at most {longest:,} characters long, not {len(text):,}")
    text = text.strip(" ")
    if not text:
        raise BadReference("must not be blank")
    if _UNPRINTABLE.search(text):
        raise BadReference("must not hold control characters")
    return text
