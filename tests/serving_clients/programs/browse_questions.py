"""Use the folder of all questions in Chromium, opened as a file. Arguments: index.html, Chromium, folder.

Prints, as JSON, what the page shows after each step; screenshots and a PDF are put into the folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

index, chromium, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"


def read_list(page: Page) -> dict[str, Any]:
    rows = page.locator("#rows tr")
    return {
        "count": page.locator("#count").inner_text(),
        "page": page.locator("#page").inner_text(),
        "rows": rows.count(),
        "first": rows.first.locator("td").all_inner_texts() if rows.count() else [],
    }


def set_filter(page: Page, name: str, value: str) -> dict[str, Any]:
    """Set one control after clearing all, wait until the list has followed, and return the list."""
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("() => !location.hash.includes('=') || location.hash.startsWith('#open')")
    control = page.locator(f"#{name}")
    start = time.monotonic()
    if name in ("search", "gap"):
        control.fill(value)
    else:
        control.select_option(value)
    page.wait_for_function("([name]) => location.hash.includes(name + '=')", arg=[name])
    return read_list(page) | {"seconds": time.monotonic() - start}


def wait_for_detail(page: Page) -> str:
    page.wait_for_function("() => document.querySelector('#detail svg') && !document.querySelector('[aria-busy]')")
    return page.locator("#detail").inner_text()


def use_keys(page: Page) -> dict[str, Any]:
    """Next, next, previous; the next page; search; close."""
    found: dict[str, Any] = {}
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(300)
    page.locator("body").click(position={"x": 5, "y": 5})
    opened = []
    for key in ("j", "j", "k"):
        page.keyboard.press(key)
        wait_for_detail(page)
        opened.append(page.locator("tr[aria-current=true]").get_attribute("data-row"))
    found["opened"] = opened
    page.keyboard.press("n")
    found["next page"] = page.locator("#page").inner_text()
    page.keyboard.press("p")
    found["previous page"] = page.locator("#page").inner_text()
    page.keyboard.press("Escape")
    found["closed"] = page.locator("#detail").is_hidden()
    page.keyboard.press("/")
    found["focus"] = page.evaluate("() => document.activeElement.id")
    return found


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_context(viewport={"width": 1300, "height": 900}).new_page()
    complaints: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(index.as_uri())
    page.locator("#rows tr").first.wait_for()
    found: dict[str, Any] = {"start": read_list(page)}
    for name, value in json.loads(sys.argv[4]):
        found[f"{name} {value}"] = set_filter(page, name, value)
    found["keys"] = use_keys(page)

    set_filter(page, "source", "benchmark")
    page.locator("#rows button").first.click()
    found["detail"] = wait_for_detail(page)
    found["boxes"] = page.locator("#detail rect").count()
    found["film"] = page.evaluate(
        "() => new Promise((done) => { const one = new Image(); one.onload = () => done(one.naturalWidth); "
        "one.src = document.querySelector('#detail image').getAttribute('href'); })"
    )
    page.screenshot(path=str(folder / "light.png"))
    found["light"] = page.evaluate(BACKGROUND)
    address = page.url
    page.emulate_media(color_scheme="dark")
    found["dark"] = page.evaluate(BACKGROUND)
    page.screenshot(path=str(folder / "dark.png"))
    page.emulate_media(media="print", color_scheme="dark")
    found["print"] = {
        "background": page.evaluate(BACKGROUND),
        "controls": page.locator("#controls").is_visible(),
        "detail": page.locator("#detail").is_visible(),
        "rows": page.locator("#rows tr").count(),
    }
    page.pdf(path=str(folder / "page.pdf"))
    page.emulate_media(media="screen", color_scheme="light")
    other = page.context.new_page()
    other.goto(address)
    found["again"] = {"detail": wait_for_detail(other), "count": other.locator("#count").inner_text()}
    other.set_viewport_size({"width": 390, "height": 844})
    other.screenshot(path=str(folder / "phone.png"))
    found["fits a phone"] = other.evaluate(
        "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    found["injected"] = page.evaluate("() => window.injected === undefined && !document.querySelector('main img')")
    found |= {"complaints": complaints, "schemes": sorted({address.partition(":")[0] for address in requested})}
    print(json.dumps(found))
    browser.close()
