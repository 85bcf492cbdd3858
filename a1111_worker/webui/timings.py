"""How long the worker waits for the WebUI, and how often it asks it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WebUITimings:
    """Every period of the policy, in seconds.

    unowned_grace        how long a refused connection is retried if nobody of ours starts a WebUI
    progress_interval    between two requests for the progress of a generation or of a switch
    preview_interval     between two previews of a generation, if its job wants them
    preview_timeout      how long the WebUI may take to render one
    interrupt_interval   between two requests to interrupt a generation; also between two checks of a switch
    interrupt_grace      how long an interrupted generation may take to answer; after that the WebUI counts as hung
    interrupt_patience   how long a job without time left waits for its interrupted generation
    recovery_pause       between two tries after a bare 404
    silence              how long the WebUI may answer nothing at all
    death                how long a killed WebUI may take to be gone
    """

    unowned_grace: float = 10.0
    progress_interval: float = 1.0
    preview_interval: float = 5.0
    preview_timeout: float = 3.0
    interrupt_interval: float = 0.25
    interrupt_grace: float = 30.0
    interrupt_patience: float = 1.0
    recovery_pause: float = 5.0
    silence: float = 30.0
    death: float = 10.0
