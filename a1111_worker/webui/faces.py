"""Whether the WebUI can restore faces. Its API does not tell: without the files it leaves the picture as it is, answers
200, and its `info` says that it restored faces (measured on 1.9.3 and 1.10.1).
"""

from __future__ import annotations

from pathlib import Path

from a1111_worker.webui.responses import WebUIFlags

HELPERS = ("detection_Resnet50_Final.pth", "parsing_parsenet.pth")
"""facexlib's networks that find a face and its parts. A1111 keeps them in GFPGAN's folder (1.10.1,
modules/face_restoration_utils.py), for both restorers."""


RESTORERS = ("CodeFormer", "GFPGAN")  # A1111's own default first


def usable_restorers(flags: WebUIFlags) -> tuple[str, ...]:
    """The restorers whose files are all there."""
    return tuple(restorer for restorer in RESTORERS if can_restore_faces(flags, restorer))


def can_restore_faces(flags: WebUIFlags, restorer: str) -> bool:
    """Whether all files of a restorer (option `face_restoration_model`) are in the WebUI's folders, on this machine.

    A1111 would download a missing one while a job runs.
    """
    if flags.codeformer_folder is None or flags.gfpgan_folder is None:
        return False
    gfpgan = Path(flags.gfpgan_folder)
    networks = {
        "CodeFormer": Path(flags.codeformer_folder, "codeformer-v0.1.0.pth"),
        "GFPGAN": gfpgan / "GFPGANv1.4.pth",
    }
    needed = [networks[restorer], *(gfpgan / name for name in HELPERS)] if restorer in networks else []
    return bool(needed) and all(path.is_file() for path in needed)
