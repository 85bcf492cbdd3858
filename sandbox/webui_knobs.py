"""What a test may change while the sandbox's WebUI runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False, repr=False, kw_only=True)
class WebUIKnobs:
    """Keywords of `SandboxWebUI`. They are its attributes too, and may be set at any time."""

    step_seconds: float = 0.0  # duration of a sampling step (0: a job takes no time)
    encode_seconds: float = 0.0  # between a job's begin and its first step: /progress still shows the job before
    upscale_steps: int = 1  # of a model upscaler in Extras; each takes step_seconds
    switch_seconds: float = 0.0  # duration of loading a checkpoint
    hash_seconds: float = 0.0  # duration of hashing a checkpoint for the first time
    image_bytes: int | None = None  # each PNG is brought to this size by incompressible bytes
    nan_check: bool = True  # False is `--disable-nan-check`: black pictures instead of NansException
    styles: Sequence[Mapping[str, str]] = ()  # the answer of /prompt-styles: [{"name", "prompt", "negative_prompt"}]
    journal: Path | None = None  # gets a line per generation: its begin and end on the monotonic clock
    extensions: Collection[str] = ()  # which are installed when a process starts: "controlnet", "adetailer"
    gzip: bool = True  # compress answers above 1000 bytes if the client accepts that, as A1111 does

    nan_models: set[str] = field(default_factory=set, init=False)  # names of models with NaN weights
    # Names of models with tensors that do not fit (in addition to files that show this themselves).
    misshapen_models: set[str] = field(default_factory=set, init=False)
