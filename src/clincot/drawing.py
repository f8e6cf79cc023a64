"""Drawing primitives: annotated images with boxes and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from clincot.geometry import Box, box_to_pixels
from clincot.images import render_view

FILM_SIDE_PX = 480  # the longer side of a film in a picture


CROP_SIDE_PX = 220


# told apart by every kind of colour vision
BLUE, ORANGE, GREEN, WHITE = (98, 195, 255), (255, 162, 58), (61, 220, 151), (255, 255, 255)


_TEXT_COLOR, _BACKGROUND_COLOR, _MUTED_COLOR = (28, 33, 39), (251, 251, 249), (89, 98, 109)


_PAD, _LINE_PX, _CAPTION_PX, _TEXT_PX = 14, 3, 17, 14


Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class BoxAnnotation:
    """A box to draw on a film."""

    box: Box
    colour: Rgb
    dashed: bool = False


@dataclass(frozen=True)
class ImagePanel:
    """One film with its boxes, the crop that a model saw of it (if any), a caption and lines of text."""

    film: Image.Image
    boxes: tuple[BoxAnnotation, ...]
    caption: str
    lines: tuple[str, ...] = ()
    crop: Image.Image | None = None
    colour: Rgb = _MUTED_COLOR


def render_panels(panels: Sequence[ImagePanel], title: str) -> Image.Image:
    """The panels side by side under a title, on light paper. Pillow's own font: the same picture everywhere."""
    drawn = [_render_panel(panel) for panel in panels]
    width = sum(image.width for image in drawn) + _PAD * (len(drawn) + 1)
    lines = _wrap_text(title, width - 2 * _PAD, _CAPTION_PX)
    top = _PAD + len(lines) * _compute_line_height(_CAPTION_PX) + _PAD // 2
    whole = Image.new("RGB", (width, top + max(image.height for image in drawn) + _PAD), _BACKGROUND_COLOR)
    _draw_text(whole, lines, (_PAD, _PAD), _CAPTION_PX, _TEXT_COLOR)
    left = _PAD
    for image in drawn:
        whole.paste(image, (left, top))
        left += image.width + _PAD
    return whole


def _render_panel(panel: ImagePanel) -> Image.Image:
    """A panel on paper: caption, film, then the crop with the lines beside it."""
    film = _draw_boxes(render_view(panel.film, None, FILM_SIDE_PX), panel.boxes)
    width = max(film.width, FILM_SIDE_PX)
    caption = _wrap_text(panel.caption, width, _CAPTION_PX)
    head = 6 + len(caption) * _compute_line_height(_CAPTION_PX) + 6
    crop = None if panel.crop is None else render_view(panel.crop, None, CROP_SIDE_PX)
    text_left = 0 if crop is None else crop.width + _PAD
    lines = [part for line in panel.lines for part in _wrap_text(line, width - text_left, _TEXT_PX)]
    foot = max(0 if crop is None else crop.height, len(lines) * _compute_line_height(_TEXT_PX))
    whole = Image.new("RGB", (width, head + film.height + _PAD + foot), _BACKGROUND_COLOR)
    ImageDraw.Draw(whole).rectangle((0, 0, width - 1, 3), fill=panel.colour)
    _draw_text(whole, caption, (0, 8), _CAPTION_PX, _TEXT_COLOR)
    whole.paste(film, (0, head))
    if crop is not None:
        whole.paste(crop, (0, head + film.height + _PAD))
    _draw_text(whole, lines, (text_left, head + film.height + _PAD), _TEXT_PX, _MUTED_COLOR)
    return whole


def _draw_boxes(film: Image.Image, boxes: Sequence[BoxAnnotation]) -> Image.Image:
    draw = ImageDraw.Draw(film)
    for marked in boxes:
        x0, y0, x1, y1 = box_to_pixels(marked.box, width=film.width, height=film.height)
        if not marked.dashed:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=marked.colour, width=_LINE_PX)
            continue
        for start in range(x0, x1, 12):
            end = min(start + 7, x1 - 1)
            draw.line((start, y0 + 1, end, y0 + 1), fill=marked.colour, width=_LINE_PX)
            draw.line((start, y1 - 2, end, y1 - 2), fill=marked.colour, width=_LINE_PX)
        for start in range(y0, y1, 12):
            end = min(start + 7, y1 - 1)
            draw.line((x0 + 1, start, x0 + 1, end), fill=marked.colour, width=_LINE_PX)
            draw.line((x1 - 2, start, x1 - 2, end), fill=marked.colour, width=_LINE_PX)
    return film


def _wrap_text(text: str, width: int, size: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a longer word has a line of its own."""
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
