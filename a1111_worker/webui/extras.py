"""The task upscale at the WebUI: names as it spells them, and what its answer must show."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from a1111_worker.domain import PictureFacts, PictureSize, UpscaleRequest
from a1111_worker.errors import Complaint, GenerationFailed, InvalidRequest, WebUILost
from a1111_worker.images import read_size
from a1111_worker.request.upscale import NO_UPSCALER, UPSCALERS
from a1111_worker.text import quoted_list
from a1111_worker.webui.resolution import WebUILists, resolve_upscaler

RESTORERS: Mapping[str, str] = {"gfpgan_visibility": "GFPGAN", "codeformer_visibility": "CodeFormer"}


def resolve_extras(request: UpscaleRequest, lists: WebUILists) -> UpscaleRequest:
    """The request with its upscalers in the WebUI's own spelling. InvalidRequest if the files of one are not there."""
    body, complaints = dict(request.body), list[Complaint]()
    for field in UPSCALERS:
        if (name := body.pop(field, "").strip()) and name.lower() != NO_UPSCALER.lower():
            try:
                body[field] = resolve_upscaler(name, lists, path=field)
            except InvalidRequest as error:
                complaints.extend(error.complaints)
    warnings = list(request.warnings)
    for field, restorer in RESTORERS.items():
        if not body.get(field):
            continue
        if lists.face_restorers is None:
            warnings.append(f"nothing shows whether {field} did anything: that needs files in the WebUI's folders")
        elif restorer not in lists.face_restorers:
            complaints.append(Complaint(field, f"is refused: the files of {restorer} are not there"))
    if complaints:
        raise InvalidRequest(complaints)
    if request.dropped:
        dropped = quoted_list(request.dropped, most=50)
        warnings.append(f"dropped, because it cannot change the pictures: {dropped}")
    return replace(request, body=body, warnings=tuple(warnings))


def used_in_extras(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The upscalers that a resolved body names, each with its path. Without the first one A1111 runs none."""
    if body.get("upscaler_1", NO_UPSCALER) == NO_UPSCALER:
        return []
    return [(field, body[field]) for field in UPSCALERS if body.get(field, NO_UPSCALER) != NO_UPSCALER]


def read_extras(answer: Any, size: PictureSize, upscaler: str | None) -> tuple[str, str, PictureFacts]:
    """The picture of an answer in base64, its html_info, and its size.

    Raises WebUILost (no answer of extras), GenerationFailed (no PNG, another size, another upscaler).
    """
    image = answer.get("image") if isinstance(answer, dict) else None
    html_info = answer.get("html_info") if isinstance(answer, dict) else None
    if not isinstance(image, str) or not isinstance(html_info, str):
        raise WebUILost("what answers at the WebUI's address does not speak A1111's API")
    try:
        width, height = read_size(image)
        is_png = base64.b64decode(image[:12]).startswith(b"\x89PNG")
    except (ValueError, binascii.Error) as error:
        raise GenerationFailed("the WebUI answered with something that is no PNG") from error
    if not is_png:
        raise GenerationFailed("the WebUI answered with something that is no PNG")
    if (width, height) != (size.width, size.height):
        raise GenerationFailed(f"the WebUI made a picture of {width}×{height}, and {size} was asked for")
    if upscaler is not None and f"Postprocess upscaler: {upscaler}" not in html_info:
        raise GenerationFailed("the WebUI used another upscaler than the one that was asked for")
    return image, html_info, PictureFacts(width, height, None, None)
