"""Use the page at / in Chromium, as a person would.

Arguments: key, URL, Chromium, image, folder, width, height, and ROLE=FILE of each further image. Prints what the page
shows; screenshots are put into the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

key, url, chromium, image, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5])
viewport = {"width": int(sys.argv[6]), "height": int(sys.argv[7])}
further = [argument.partition("=")[::2] for argument in sys.argv[8:]]
DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, cancelable: true}));
}"""
FITS = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def read_page(page: Page) -> dict[str, object]:
    """The texts and boxes that a person sees after an answer."""
    rects = page.locator("#boxes rect").all()
    boxes = [[float(rect.get_attribute(name) or "nan") for name in ("x", "y", "width", "height")] for rect in rects]
    picture, drawn = page.locator("#image").bounding_box(), page.locator("#boxes").bounding_box()
    return {
        "model": page.locator("#model").inner_text(),
        "status": page.locator("#status").inner_text() if page.locator("#status").is_visible() else "",
        "answer": page.locator("#text").inner_text() if page.locator("#text").is_visible() else "",
        "reason": page.locator("#reason").inner_text() if page.locator("#reason").is_visible() else "",
        "compared": page.locator("#compared").inner_text() if page.locator("#compared").is_visible() else "",
        "offers further images": page.locator("#others").is_visible(),
        "confidence": page.locator("#percent").inner_text(),
        "hypotheses": page.locator("#hypotheses li").all_inner_texts(),
        "regions": page.locator("#regions li").all_inner_texts(),
        "boxes": boxes,
        "winners": page.locator("#boxes rect.winner").count(),
        "drawn on the picture": picture == drawn and picture is not None and picture["width"] > 50,
        "fits": page.evaluate(FITS),
    }


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    credentials = {"username": "any", "password": key}
    phone = viewport["width"] < 600
    context = browser.new_context(http_credentials=credentials, viewport=viewport, has_touch=phone, is_mobile=phone)
    page = context.new_page()
    requested: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.locator("#model:not(:empty)").wait_for()
    page.locator("#question").fill("Is pneumothorax seen?")
    page.locator("#ask").click()
    without_image = page.locator("#status").inner_text()
    if phone:
        page.locator("#file").set_input_files(image)
    else:
        import base64

        page.evaluate(DROP, [image.name, base64.b64encode(image.read_bytes()).decode()])
    if further:
        chosen = [file for _, file in further]
        page.locator("#add").set_input_files([*chosen, image])
        page.locator("#further li").last.locator("button").click()  # the image itself, by mistake
        for number, (role, _) in enumerate(further):
            page.locator("#further input").nth(number).fill(role)
    page.locator("#ask").click()
    page.locator("#ask:enabled").wait_for(timeout=200_000)
    page.evaluate("() => document.getElementById('image').decode().catch(() => null)")
    found = read_page(page)
    page.screenshot(path=folder / "answer.png", full_page=True)
    found["picked"] = 0
    if found["regions"]:
        page.locator("#regions li").first.focus()
        found["picked"] = page.locator("#boxes.picked rect.picked").count()
    found |= {"without image": without_image, "requested": requested, "complaints": complaints}
    browser.close()
print(json.dumps(found))
