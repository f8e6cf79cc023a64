"""Judge the tasks of a Label Studio project in Chromium, as a reader would.

Arguments: URL, Chromium, user, password, project, JSON of the choices for each task, folder for screenshots.
Prints, as JSON, what the page showed of each task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

url, chromium, user, password, project = sys.argv[1:6]
choices, folder = json.loads(sys.argv[6]), Path(sys.argv[7])
PICTURE = """() => {
  const image = document.querySelector("img[alt='LS'], img[src^='blob:']");
  return image && image.naturalWidth ? [image.naturalWidth, image.naturalHeight] : null;
}"""


def judge_task(page: Page, number: str, answers: list[str]) -> dict[str, object]:
    """Open a task, choose the answers, submit, and return what was on the page before."""
    page.goto(f"{url}/projects/{project}/data?task={number}")
    page.get_by_text(answers[0]).wait_for(timeout=120_000)
    page.wait_for_function(PICTURE, timeout=60_000)
    page.screenshot(path=str(folder / f"task-{number}.png"))
    shown = {"text": page.locator("body").inner_text(), "picture": page.evaluate(PICTURE)}
    for answer in answers:
        page.get_by_text(answer).click()
    with page.expect_response(
        lambda reply: "/annotations" in reply.url and reply.request.method == "POST", timeout=60_000
    ) as reply:
        page.get_by_role("button", name="Submit").first.click()
    return shown | {"status": reply.value.status}


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
    page.goto(f"{url}/user/login/", timeout=120_000)
    page.locator("input[name=email]").fill(user)
    page.locator("input[name=password]").fill(password)
    page.locator("[type=submit]").click()
    page.wait_for_url(lambda address: "/user/login" not in address, timeout=120_000)
    print(json.dumps({number: judge_task(page, number, answers) for number, answers in choices.items()}))
    browser.close()
