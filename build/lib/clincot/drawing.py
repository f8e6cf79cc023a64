"""Drawing primitives: annotated images with boxes and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from clincot.geometry import Box, box_to_pixels
from clincot.images import render_view

FILM_SIDE_PX = 480  # longer side of a drawn image
CROP_SIDE_PX = 220  # longer side of a drawn crop

# Distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, WHITE = (98, 195, 255), (255, 162, 58), (61, 220, 151), (255, 255, 255)

_TEXT_COLOR, _BACKGROUND_COLOR, _MUTED_COLOR = (28, 33, 39), (251, 251, 249), (89, 98, 109)
_PAD, _LINE_PX, _CAPTION_PX, _TEXT_PX = 14, 3, 17, 14

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class BoxAnnotation:
    """A box to draw on an image."""

    box: Box
    colour: Rgb
    dashed: bool = False


@dataclass(frozen=True)
class ImagePanel:
    """One image with its boxes, a caption, lines of text and, optionally, the crop that a model saw."""

    film: Image.Image
    boxes: tuple[BoxAnnotation, ...]
    caption: str
    lines: tuple[str, ...] = ()
    crop: Image.Image | None = None
    colour: Rgb = _MUTED_COLOR


def render_panels(panels: Sequence[ImagePanel], title: str) -> Image.Image:
    """Draw panels side by side under a title. Uses Pillow's built-in font, so every machine draws the same pixels."""
    images = [_render_panel(panel) for panel in panels]
    width = sum(image.width for image in images) + _PAD * (len(images) + 1)
    lines = _wrap_text(title, width - 2 * _PAD, _CAPTION_PX)
    top = _PAD + len(lines) * _compute_line_height(_CAPTION_PX) + _PAD // 2
    canvas = Image.new("RGB", (width, top + max(image.height for image in images) + _PAD), _BACKGROUND_COLOR)
    _draw_text(canvas, lines, (_PAD, _PAD), _CAPTION_PX, _TEXT_COLOR)
    left = _PAD
    for image in images:
        canvas.paste(image, (left, top))
        left += image.width + _PAD
    return canvas


def _render_panel(panel: ImagePanel) -> Image.Image:
    """Draw one panel from top to bottom: caption, image, and the crop with its text to the right."""
    film = _draw_boxes(render_view(panel.film, None, FILM_SIDE_PX), panel.boxes)
    width = max(film.width, FILM_SIDE_PX)
    caption = _wrap_text(panel.caption, width, _CAPTION_PX)
    head = 6 + len(caption) * _compute_line_height(_CAPTION_PX) + 6
    crop = None if panel.crop is None else render_view(panel.crop, None, CROP_SIDE_PX)
    text_left = 0 if crop is None else crop.width + _PAD
    lines: list[str] = []
    for line in panel.lines:
        lines += _wrap_text(line, width - text_left, _TEXT_PX)
    foot = max(0 if crop is None else crop.height, len(lines) * _compute_line_height(_TEXT_PX))
    canvas = Image.new("RGB", (width, head + film.height + _PAD + foot), _BACKGROUND_COLOR)
    ImageDraw.Draw(canvas).rectangle((0, 0, width - 1, 3), fill=panel.colour)
    _draw_text(canvas, caption, (0, 8), _CAPTION_PX, _TEXT_COLOR)
    canvas.paste(film, (0, head))
    if crop is not None:
        canvas.paste(crop, (0, head + film.height + _PAD))
    _draw_text(canvas, lines, (text_left, head + film.height + _PAD), _TEXT_PX, _MUTED_COLOR)
    return canvas


def _draw_boxes(film: Image.Image, boxes: Sequence[BoxAnnotation]) -> Image.Image:
    draw = ImageDraw.Draw(film)
    for annotation in boxes:
        x0, y0, x1, y1 = box_to_pixels(annotation.box, width=film.width, height=film.height)
        if not annotation.dashed:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=annotation.colour, width=_LINE_PX)
            continue
        for start in range(x0, x1, 12):
            end = min(start + 7, x1 - 1)
            draw.line((start, y0 + 1, end, y0 + 1), fill=annotation.colour, width=_LINE_PX)
            draw.line((start, y1 - 2, end, y1 - 2), fill=annotation.colour, width=_LINE_PX)
        for start in range(y0, y1, 12):
            end = min(start + 7, y1 - 1)
            draw.line((x0 + 1, start, x0 + 1, end), fill=annotation.colour, width=_LINE_PX)
            draw.line((x1 - 2, start, x1 - 2, end), fill=annotation.colour, width=_LINE_PX)
    return film


def _wrap_text(text: str, width: int, size: int) -> list[str]:
    """Break text between words into lines of at most `width` pixels. A longer word gets a line of its own."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_text(image: Image.Image, lines: Sequence[str], at: tuple[int, int], size: int, colour: Rgb) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _compute_line_height(size)), line, fill=colour, font=font)


def _compute_line_height(size: int) -> int:
    return round(size * 1.4)
