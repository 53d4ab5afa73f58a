"""Text on copies of images: score badges and the comparison grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

DARK, LIGHT = (24, 24, 27), (250, 250, 250)


def to_pil(image_HWC: Tensor) -> Image.Image:
    """Returns one image of 1, 3 or 4 channels in [0, 1] as 8-bit RGB; alpha is dropped."""
    pixels = image_HWC.detach().float().cpu().clamp(0, 1)[..., :3].mul(255).round().byte().numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    return Image.fromarray(pixels)


def to_tensor(image: Image.Image) -> Tensor:
    """Returns an 8-bit RGB image as (H, W, 3) in [0, 1]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3) / 255.0


def with_badges(images_BHWC: Tensor, texts: Sequence[str]) -> Tensor:
    """Returns copies (B, H', W', 3) with a strip of text under each image.

    Images below 128 pixels are enlarged by a whole factor, so that the text can be read.
    """
    pairs = zip(images_BHWC, texts, strict=True)
    return torch.stack([to_tensor(_badged(to_pil(image), text)) for image, text in pairs])


def grid(rows: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Returns one image (1, H, W, 3) of rows (B, h, w, 3) of images of one size; short rows are filled up with white."""
    columns = max(len(row) for row in rows)
    lines: list[Tensor] = []
    for row_BHWC in rows:
        framed = F.pad(row_BHWC, (0, 0, gap, gap, gap, gap, 0, 0), value=1.0)
        full = F.pad(framed, (0, 0, 0, 0, 0, 0, 0, columns - len(row_BHWC)), value=1.0)
        lines.append(torch.cat(list(full), dim=1))
    return torch.cat(lines, dim=0)[None]


def _badged(image: Image.Image, text: str) -> Image.Image:
    scale = max(1, -(-128 // min(image.size)))
    if scale > 1 and max(image.size) * scale <= 2048:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    strip = max(14, min(image.size) // 12)
    canvas = Image.new("RGB", (image.width, image.height + strip), DARK)
    canvas.paste(image)
    font = ImageFont.load_default(strip * 0.75)
    middle = (image.width / 2, image.height + strip / 2)
    ImageDraw.Draw(canvas).text(middle, text, fill=LIGHT, font=font, anchor="mm")
    return canvas
