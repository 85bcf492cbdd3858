"""The size of the final image."""

from __future__ import annotations

from typing import Any

import pytest

from a1111_worker.request.size import final_size


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (1024, 1024)),
        ({"hr_scale": 3}, (1024, 1024)),  # without enable_hr
        ({"enable_hr": True}, (2048, 2048)),  # A1111's own 2.0
        ({"enable_hr": True, "hr_scale": 1.5}, (1536, 1536)),
        ({"enable_hr": True, "width": 840, "hr_scale": 1.1}, (924, 1126)),
        ({"enable_hr": True, "hr_resize_x": 1536, "width": 832, "height": 1216}, (1536, 2244)),
        ({"enable_hr": True, "hr_resize_y": 1536, "width": 832, "height": 1216}, (1050, 1536)),
        ({"enable_hr": True, "hr_resize_x": 1920, "hr_resize_y": 1080}, (1920, 1080)),
        # the first pass has its own size, and hires starts from that
        ({"firstphase_width": 512, "firstphase_height": 768}, (512, 768)),
        ({"enable_hr": True, "firstphase_width": 512, "firstphase_height": 768}, (1024, 1536)),
    ],
)
def test_the_final_size_follows_the_arithmetic_of_a1111(body: dict[str, Any], expected: tuple[int, int]) -> None:
    size = final_size({"width": 1024, "height": 1024, **body})

    assert (size.width, size.height) == expected


def test_pixels_are_those_of_the_larger_pass_and_what_is_cut_is_counted() -> None:
    size = final_size({"width": 64, "height": 2048, "enable_hr": True, "hr_resize_x": 512, "hr_resize_y": 128})

    assert (size.first_pass, size.pixels, size.upscaled_pixels) == ((64, 2048), 64 * 2048, 512 * 16384)
