"""The pictures that an img2img begins with: decoded as A1111 does, resized, masked, and painted over.

The steps are those of `decode_base64_to_image` (modules/api/api.py) and `StableDiffusionProcessingImg2Img.init`.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from sandbox import draw
from sandbox.webui_errors import HTTPException, WebUIError

_BOMB_PIXELS = 2 * 89_478_485  # Pillow 9.5 refuses more

HIRES_OFF: Mapping[str, Any] = {  # the fields of txt2img that img2img does not have
    "enable_hr": False,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "hr_checkpoint_name": None,
}

Box = tuple[int, int, int, int]


def decode(text: Any) -> Image.Image:
    """`decode_base64_to_image`. The pixels are not decoded yet: a file that is cut off fails later."""
    if not isinstance(text, str):
        raise WebUIError("AttributeError", f"{type(text).__name__!r} object has no attribute 'startswith'")
    if text.startswith(("http://", "https://")):
        raise HTTPException(500, "Request to local resource not allowed")  # no host is public to the sandbox
    try:
        if text.startswith("data:image/"):
            text = text.split(";")[1].split(",")[1]
    except IndexError as error:
        raise WebUIError("IndexError", str(error)) from None
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text)))
        if image.width * image.height > _BOMB_PIXELS:
            raise ValueError("a decompression bomb")
        return image
    except Exception:
        raise HTTPException(500, "Invalid encoded image") from None


def decode_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job with its pictures decoded. A mask that is "" stays text, on which A1111 fails later."""
    images = [decode(text) for text in fields["init_images"]]
    mask = decode(fields["mask"]) if fields["mask"] else fields["mask"]
    return {**HIRES_OFF, **fields, "init_images": images, "mask": mask}


@dataclass
class InitPictures:
    """What `init` has made of a job's pictures. `params` are keys of extra_generation_params.

    `images` are what is painted over: in the size of the job, or whole ones of their own size if only the masked area
    is painted. `mask` has their size; white is painted. `batch_size` may be smaller than the job's.
    """

    images: Sequence[Image.Image]
    mask: Image.Image | None
    params: Mapping[str, Any]
    batch_size: int

    def paint(self, text: str, index: int, strength: float) -> Image.Image:
        """The picture that comes of the one at `index` of a batch. `text` decides what is drawn over it."""
        image = self.images[index % len(self.images)].copy()
        box = (0, 0, *image.size) if self.mask is None else self.mask.getbbox()
        if box is None:
            return image
        x, y, right, bottom = box
        scene = draw.picture(text, right - x, bottom - y)
        painted = image.copy()
        painted.paste(draw.signed(Image.blend(image.crop(box), scene, max(0.0, min(strength, 1.0)))), (x, y))
        return painted if self.mask is None else Image.composite(painted, image, self.mask)


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def read_init(fields: Mapping[str, Any]) -> InitPictures:
    """`init`, with its failures. `fields` have their pictures decoded, and a batch size."""
    params: dict[str, Any] = {"Denoising strength": fields["denoising_strength"]}
    size = fields["width"] // 8 * 8, fields["height"] // 8 * 8
    if min(size) <= 0:
        raise WebUIError("ValueError", "height and width must be > 0")
    mask = None if fields["mask"] is None else _read_mask(fields, params)
    crop: Box | None = None
    if mask is not None and fields["inpaint_full_res"]:
        crop = mask.getbbox()
        if crop is None:  # nothing is masked: an img2img of the whole picture
            mask = None
        else:
            params |= {"Inpaint area": "Only masked", "Masked area padding": fields["inpaint_full_res_padding"]}
    elif mask is not None:
        mask = _resized(mask, size, fields["resize_mode"])
    if mask is not None and fields["latent_mask"] is not None:
        raise WebUIError("AttributeError", "'str' object has no attribute 'convert'")
    if mask is not None:
        content = {0: "fill", 2: "latent noise", 3: "latent nothing"}.get(fields["inpainting_fill"])
        params |= {} if content is None else {"Masked content": content}
    originals = [_flattened(image) for image in fields["init_images"]]
    _check_number(originals, fields["batch_size"], fields["resize_mode"] == 3 and crop is None)
    images = originals if crop else [_resized(image, size, fields["resize_mode"]) for image in originals]
    if crop and mask is not None and mask.size != images[0].size:  # its pixels are taken for those of the picture
        placed = Image.new("L", images[0].size)
        placed.paste(mask, (0, 0))
        mask = placed
    return InitPictures(images, mask, params, fields["batch_size"] if len(images) == 1 else len(images))


def sampling_steps(steps: int, strength: float) -> int:
    """How many steps are done, by `setup_img2img_steps`."""
    done = int(min(strength, 0.999) * steps) + 1
    if done <= 0:
        raise WebUIError("IndexError", f"index {done} is out of bounds for dimension 0 with size {steps}")
    return done


def _read_mask(fields: Mapping[str, Any], params: dict[str, Any]) -> Image.Image:
    """`create_binary_mask`, inverted and blurred as the job wants it."""
    given = fields["mask"]
    if isinstance(given, str):
        raise WebUIError("AttributeError", "'str' object has no attribute 'mode'")
    _load(given)
    if given.mode == "RGBA" and given.getextrema()[-1] != (255, 255):
        mask: Image.Image = given.getchannel("A")
        if fields["mask_round"]:
            mask = mask.point([255 * (value > 128) for value in range(256)])
    else:
        mask = given.convert("L")
    if fields["inpainting_mask_invert"]:
        mask = ImageOps.invert(mask)
        params["Mask mode"] = "Inpaint not masked"
    blur = fields["mask_blur"]
    x, y = (fields["mask_blur_x"], fields["mask_blur_y"]) if blur is None else (blur, blur)
    if x > 0 or y > 0:
        mask = mask.filter(ImageFilter.GaussianBlur((max(x, 0), max(y, 0))))
        params["Mask blur"] = x if x == y else None
    return mask


def _check_number(images: Sequence[Image.Image], batch_size: int, keeps_sizes: bool) -> None:
    if not images:
        message = "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: [0]"
        raise WebUIError("RuntimeError", message)
    if len(images) > 1 and len(images) > batch_size:
        raise WebUIError("RuntimeError", f"bad number of images passed: {len(images)}; expecting {batch_size} or less")
    if keeps_sizes and len({image.size for image in images}) > 1:
        message = "setting an array element with a sequence. The requested array has an inhomogeneous shape after 2 "
        raise WebUIError(
            "ValueError",
            f"{message}dimensions. The detected shape was ({len(images)}, 3) + inhomogeneous part.",
        )


def _flattened(image: Image.Image) -> Image.Image:
    """`fix_image` and `flatten`: RGBA is laid on white. The transparency of grey and of one palette entry is lost."""
    _load(image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * 1.0).convert("L")  # clipped at 255
    if image.mode == "LA":
        image = image.getchannel("L")
    image.info.pop("transparency", None)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "#ffffff")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except OSError as error:
        text = "image file is truncated" if "truncated" in str(error) else str(error)
        raise WebUIError("OSError", text) from None


def _resized(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """`resize_image`: 1 crops, 2 fits it and smears its edges (here: leaves them black), all else stretches."""
    if mode == 1:
        return ImageOps.fit(image, size)
    if mode == 2:
        return ImageOps.pad(image, size)
    return image.resize(size, Image.Resampling.LANCZOS)
