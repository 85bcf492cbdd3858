"""The ways somebody names a model, each reduced to ids wherever ids were given.

    https://civitai.com/api/download/models/135867?type=Model&format=SafeTensor&size=pruned&fp=fp16&fileId=99264
    https://civitai.com/models/122359/detail-tweaker-xl?modelVersionId=135867      (without it: the newest version)
    https://civitai.com/model-versions/135867        https://civitai.com/api/v1/model-versions/135867
    urn:air:sdxl:lora:civitai:122359@135867+99264.safetensors       civitai:122359@135867
    {"url": …} {"version_id": 135867} {"name": "detail_tweaker_xl"}, each with "name" and "hash" beside it
    detail_tweaker_xl

A CivitAI URL is never fetched as it was written: only its ids leave this module. Another host's URL is kept where its
whole origin (scheme, host and port) is allowed. What is refused is refused in a sentence that never repeats the URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from a1111_worker import catalog
from a1111_worker.domain import ModelKind, ModelRef

T = TypeVar("T")

CIVITAI_HOSTS = frozenset(
    f"{www}civitai.{top}"
    for www in ("", "www.")
    for top in ("com", "red", "green")  # SFW, everything, green: the same ids on all of them
)
MAX_REFERENCE = 2_000  # characters
MAX_NAME = 200
MAX_ID = 2**53  # what JSON carries exactly

_FORMS = "a CivitAI URL, an AIR (civitai:122359@135867), or a name"
_AIR_TYPES = {
    ModelKind.LORA: frozenset({"lora", "lycoris", "locon", "dora"}),
    ModelKind.CHECKPOINT: frozenset({"checkpoint"}),
}
_KIND = {ModelKind.LORA: "LoRA", ModelKind.CHECKPOINT: "checkpoint"}

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
_AUTHORITY = re.compile(r"([A-Za-z0-9.-]+)(?::([0-9]{1,5}))?")
_KEY_IN_QUERY = re.compile(r"(?:^|[&;?])(?:amp;)?token=", re.IGNORECASE)
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?(?:(?P<first>[\w-]+):)?(?:(?P<second>[\w-]+):)?(?P<source>[\w-]+):(?P<model>[^:@+.]+)"
    r"(?:@(?P<version>[^:@+.]+))?(?:\+(?P<file>[^:@+.]+))?(?:\.(?P<format>\w+))?",
    re.ASCII | re.IGNORECASE,
)


class BadReference(ValueError):
    """A reference that cannot be used: `problems` are (key of the object or "", sentence)."""

    def __init__(self, *problems: str | tuple[str, str]) -> None:
        self.problems = tuple(("", problem) if isinstance(problem, str) else problem for problem in problems)
        super().__init__("; ".join(f"{key}: {message}" if key else message for key, message in self.problems))


def parse_reference(
    value: str | Mapping[str, Any], *, kind: ModelKind, allowed_hosts: Collection[str] = ()
) -> ModelRef:
    """The model that `value` names; `BadReference` says why it is none. Keys it does not know are not looked at.

    `allowed_hosts` are origins as MODEL_HOSTS has them (`https://cdn.example.com`, `http://127.0.0.1:8081`).
    """
    if isinstance(value, str):
        return catalog.resolve(_parse_text(value, kind, allowed_hosts))
    if isinstance(value, Mapping):
        return catalog.resolve(_parse_object(value, kind, allowed_hosts))
    raise BadReference(f"must be text or an object: {_FORMS}")


def _parse_text(text: str, kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    text = _plain(text, MAX_REFERENCE)
    if _SCHEME.match(text):
        return _parse_url(text, kind, allowed_hosts)
    if ":" in text:
        return _parse_air(text, kind)
    if "/" in text:
        raise BadReference("a URL starts with https://, and a name holds no / or \\")
    return ModelRef(kind=kind, name=parse_name(text))


def _parse_object(given: Mapping[str, Any], kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    """Every key on its own first, so that all that is wrong is said at once."""
    problems: list[tuple[str, str]] = []

    def read(key: str, parse: Callable[[Any], T]) -> T | None:
        try:
            return None if given.get(key) is None else parse(given[key])
        except BadReference as error:
            problems.extend((key, message) for _, message in error.problems)
            return None

    named = read("url", lambda url: _parse_text(_address_like(url), kind, allowed_hosts))
    version_id = read("version_id", _whole_id)
    name = read("name", parse_name)
    sha256 = read("hash", parse_sha256)
    if all(given.get(key) is None for key in ("url", "version_id", "name")):
        problems.append(("", 'says no model: give "url", "version_id" or "name"'))
    if named is not None and version_id is not None:
        if named.url is not None:
            problems.append(("version_id", "contradicts url, which is not CivitAI's: give one of them"))
        elif named.version_id not in (None, version_id):
            problems.append(("version_id", f"contradicts url, which names version {named.version_id}"))
    if problems:
        order = list(given)
        raise BadReference(*sorted(problems, key=lambda problem: order.index(problem[0]) if problem[0] else -1))
    if named is None:
        return ModelRef(kind=kind, version_id=version_id, name=name, sha256=sha256)
    if version_id is not None:
        named = replace(named, version_id=version_id, model_id=None)
    return replace(named, name=name, sha256=sha256)


def _address_like(url: object) -> str:
    if not isinstance(url, str):
        raise BadReference("must be text")
    if ":" not in url:
        raise BadReference("must be a URL that starts with https://, or an AIR")
    return url


def parse_name(text: object) -> str:
    """A model's name as people write it: a title or a file's stem. Never a path; what is on disk is made from it."""
    if not isinstance(text, str):
        raise BadReference("must be text")
    name = _plain(text, MAX_NAME)
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
        raise BadReference("must be a SHA256 of 64 hex digits; 10 digits are CivitAI's AutoV2, which proves too little")
    raise BadReference("must be a SHA256: 64 hex digits")


# -- URLs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Address:
    """A URL taken apart. `origin` is lower case, without the scheme's own port."""

    origin: str
    host: str
    path: str
    query: str


def _parse_url(url: str, kind: ModelKind, allowed_hosts: Collection[str]) -> ModelRef:
    address = _address(url)
    if _KEY_IN_QUERY.search(address.query) or _KEY_IN_QUERY.search(unquote(address.query)):
        raise BadReference("must not hold a key (token=): the worker has its own, CIVITAI_API_KEY")
    if address.host in CIVITAI_HOSTS and address.origin == f"https://{address.host}":
        return _parse_civitai(address, kind)
    if address.origin not in _origins(allowed_hosts):
        if address.origin.startswith("http:"):
            raise BadReference("must start with https://: http:// is not allowed")
        raise BadReference(
            f"may name CivitAI or a host of the worker's MODEL_HOSTS, not {address.origin.removeprefix('https://')}"
        )
    if address.path in ("", "/"):
        raise BadReference(f"names no file on {address.host}")
    query = f"?{address.query}" if address.query else ""
    return ModelRef(kind=kind, url=f"{address.origin}{address.path}{query}")


def _address(url: str) -> _Address:
    """Taken apart by our own grammar: urllib drops tabs and newlines in silence, and knows many spellings of a host."""
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        raise BadReference("must be a URL of plain characters: no spaces, no \\, nothing beyond ASCII")
    match = _URL.fullmatch(url)
    if match is None:
        raise BadReference("must be a URL")
    scheme, authority, path, query, fragment = match.groups(default="")
    scheme = scheme.lower()
    if scheme not in ("https", "http"):
        raise BadReference(f"must start with https://: {scheme[:20]}:// is not allowed")
    if "@" in authority:
        raise BadReference("must not hold a user name or a password")
    if fragment:
        raise BadReference("must not hold a part after #")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None or len(parts[1]) > 253:
        raise BadReference("must name its host by letters, digits, dots and hyphens")
    host, port = parts[1].lower(), parts[2]
    if port is None or int(port) == (443 if scheme == "https" else 80):
        return _Address(f"{scheme}://{host}", host, path, query)
    return _Address(f"{scheme}://{host}:{int(port)}", host, path, query)


def _origins(allowed_hosts: Iterable[str]) -> frozenset[str]:
    """The allowed origins in the form of `_Address.origin`; plain http only to this machine and a named port."""
    origins = set()
    for host in allowed_hosts:
        try:
            address = _address(host if "://" in host else f"https://{host}")
        except BadReference:  # `https://*.example.com`: a pattern allows redirects elsewhere, never a job's URL
            continue
        if address.origin.startswith("https:") or re.fullmatch(r"http://(127\.0\.0\.1|localhost):\d+", address.origin):
            origins.add(address.origin)
    return frozenset(origins)


def _parse_civitai(address: _Address, kind: ModelKind) -> ModelRef:
    path = address.path.rstrip("/")
    wishes = _query(address.query)
    if match := re.fullmatch(r"/api/download/models/([^/]+)", path):
        version_id = _text_id(match[1], "the version")
        file_id = _optional_id(wishes, "fileid", "fileId")
        return _with_file_wishes(ModelRef(kind=kind, version_id=version_id, file_id=file_id), wishes)
    if match := re.fullmatch(r"(?:/api/v1)?/model-versions/([^/]+)", path):
        return ModelRef(kind=kind, version_id=_text_id(match[1], "the version"))
    if match := re.fullmatch(r"(?:/api/v1)?/models/([^/]+)(?:/.*)?", path):
        model_id = _text_id(match[1], "the model")
        asked_version = _optional_id(wishes, "modelversionid", "modelVersionId")
        return ModelRef(kind=kind, version_id=asked_version, model_id=None if asked_version else model_id)
    raise BadReference(
        "must be a CivitAI page of a model (/models/…), of a version (/model-versions/…) or a download "
        "(/api/download/models/…)"
    )


def _query(query: str) -> dict[str, str]:
    """The query's fields, names in lower case. CivitAI takes the first of two that contradict, people the last."""
    fields: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if fields.setdefault(name.lower(), value) != value:
            raise BadReference("must not say the same thing twice in its query")
    return fields


def _with_file_wishes(ref: ModelRef, wishes: Mapping[str, str]) -> ModelRef:
    """`type`, `format`, `size` and `fp` of a download URL, in CivitAI's own spelling."""
    if wishes.get("type", "Model").lower() not in ("model", "pruned model"):
        raise BadReference("must ask for type=Model")
    file_format, size, fp = wishes.get("format"), wishes.get("size"), wishes.get("fp")
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
    types = _AIR_TYPES[kind]
    kind_given = second or (first if first and first.lower() in set().union(*_AIR_TYPES.values()) else None)
    if kind_given and kind_given.lower() not in types:
        raise BadReference(f"must be a {_KIND[kind]}: this AIR's type is {kind_given.lower()[:20]}")
    if match["format"] and match["format"].lower() not in ("safetensor", "safetensors"):
        raise BadReference("must be of the format safetensors: nothing else is loaded")
    version_id = _text_id(match["version"], "the version") if match["version"] else None
    file_id = _text_id(match["file"], "the file") if match["file"] else None
    model_id = _text_id(match["model"], "the model")
    if file_id is not None and version_id is None:
        raise BadReference("must name the version of its file (civitai:MODEL@VERSION+FILE)")
    return ModelRef(kind=kind, version_id=version_id, file_id=file_id, model_id=None if version_id else model_id)


def _optional_id(wishes: Mapping[str, str], name: str, what: str) -> int | None:
    return _text_id(wishes[name], what) if name in wishes else None


def _text_id(text: str, what: str) -> int:
    if re.fullmatch(r"[0-9]{1,16}", text) and 0 < int(text) < MAX_ID:
        return int(text)
    raise BadReference(f"must give {what} as a number")


def _whole_id(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not tell 135867 from 135867.0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_ID:
        raise BadReference("must be a CivitAI version id: a whole number above 0")
    return value


def _plain(text: str, longest: int) -> str:
    if len(text) > longest:
        raise BadReference(f"must be at most {longest:,} characters long, not {len(text):,}")
    text = text.strip(" ")
    if not text:
        raise BadReference("must not be blank")
    if _UNPRINTABLE.search(text):
        raise BadReference("must not hold control characters")
    return text
