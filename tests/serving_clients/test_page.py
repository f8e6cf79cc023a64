"""The page at /: in Chromium, on a desk and on a phone, and what other clients get at /."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from clincot.serving.auth import ApiKeys
from tests.serving.conftest import KEY
from tests.serving.test_api_errors import blank, dicom
from tests.serving_clients.conftest import SETTINGS, Addresses, CountingParrot, find_chromium, run_program
from tests.support.model_servers import serving_here

DESK, PHONE = ("1100", "900"), ("390", "844")
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def browse(server: Addresses, image: Path, folder: Path, size: tuple[str, str], *further: str) -> Any:
    """What the page shows; further: ROLE=FILE of each image besides the first."""
    return run_program("browse_page.py", server.http, find_chromium(), str(image), str(folder), *size, *further)


@pytest.fixture(scope="module")
def dicom_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dicom") / "film.dcm"
    path.write_bytes(dicom())
    return path


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_a_person_asks_a_question(
    server: Addresses, films: Path, dicom_file: Path, tmp_path: Path, size: tuple[str, str], kind: str
) -> None:
    """Dropped on a desk, chosen on a phone. The parrot's answer has the likelihood exp(-0.75) = 47.2 % everywhere."""
    image = films / "images" / "0.png" if kind == "png" else dicom_file
    found = browse(server, image, tmp_path, size)
    assert found["without image"] == "Choose an image first."
    assert found["model"] == "policy"
    assert found["status"] == ""
    assert found["answer"].startswith("3 turns: Is pneumothorax seen?")
    assert found["confidence"] == "47.2\u00a0%"
    assert found["hypotheses"] == ["pneumothorax", "normal"]
    assert len(found["regions"]) == len(found["boxes"]) == 3
    assert all("probability 47.2\u00a0%" in region for region in found["regions"])
    assert found["boxes"][-1] == [0, 0, 100, 100]  # the whole image is the last region
    assert (found["winners"], found["picked"]) == (1, 1)
    assert found["drawn on the picture"]
    assert found["fits"]
    origins = {httpx.URL(address).host for address in found["requested"] if address.startswith("http")}
    assert origins == {"127.0.0.1"}
    assert not found["offers further images"]
    assert found["complaints"] == []  # no error, and nothing that the content security policy blocked
    assert (tmp_path / "answer.png").stat().st_size > 5000


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_further_images_are_added(films: Path, keys: ApiKeys, tmp_path: Path, size: tuple[str, str]) -> None:
    """A prior, and an image whose role is left open; the policy sees them after the image, in this order."""
    parrot = CountingParrot()
    parrot.go.set()
    first, prior, other = (films / "images" / f"{number}.png" for number in range(3))
    with serving_here(parrot, SETTINGS.model_copy(update={"max_images": 3}), keys=keys) as url:
        found = browse(Addresses(url, ""), first, tmp_path, size, f"prior={prior}", f"={other}")
        assert found["offers further images"]
        assert found["compared"] == "Seen beside the image: prior, image 3."
        assert found["answer"].startswith("3 turns: The first image is the one to look at")
        assert "in this order: prior, image 3." in found["answer"]
        assert (found["status"], found["complaints"], found["fits"]) == ("", [], True)
        many = [f"prior={films / 'images' / f'{number}.png'}" for number in (1, 2, 3)]
        refused = browse(Addresses(url, ""), first, tmp_path, size, *many)
        assert "expected at most 3 images of a question (max_images), got 4" in refused["status"]


def test_the_page_shows_that_the_model_abstains(unsure_server: Addresses, films: Path, tmp_path: Path) -> None:
    found = browse(unsure_server, films / "images" / "0.png", tmp_path, DESK)
    assert found["answer"] == "No answer"
    assert found["reason"] == "The model abstains: its confidence in an answer is too low."


def test_the_page_shows_why_an_image_is_refused(server: Addresses, tmp_path: Path) -> None:
    (tmp_path / "black.png").write_bytes(blank("PNG", 0))
    found = browse(server, tmp_path / "black.png", tmp_path, DESK)
    assert "nothing can be seen on it" in found["status"]
    assert (found["answer"], found["boxes"]) == ("", [])


def test_the_page_is_behind_the_keys_and_probes_are_not(server: Addresses) -> None:
    """A browser is asked for the key as a password; the SDK's status at / stays as it is for all others."""
    for path in ("/", "/page/try_model.js", "/page/try_model.css"):
        refused = httpx.get(server.http + path, headers=BROWSER)
        assert (refused.status_code, refused.headers["WWW-Authenticate"][:6]) == (401, "Basic "), path
        assert httpx.get(server.http + path, headers=BROWSER, auth=("any", "sk-wrong")).status_code == 401
        reply = httpx.get(server.http + path, headers=BROWSER, auth=("any", KEY))
        assert reply.status_code == 200
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert httpx.get(server.http).json() == {"status": "alive"}
    assert httpx.get(f"{server.http}/openai/v1/models", auth=("any", KEY)).status_code == 200
    for name in ("..%2fserver.py", "page_routes.py", "none.js", "../server.py"):
        assert httpx.get(f"{server.http}/page/{name}", auth=("any", KEY)).status_code in (401, 404), name
    odd = base64.b64encode(b"\xff").decode()
    for authorization in ("Basic", "Basic ???", f"Basic {odd}", f"Basic {base64.b64encode(KEY.encode()).decode()}"):
        assert httpx.get(f"{server.http}/v1/models", headers={"Authorization": authorization}).status_code == 401


def test_the_page_can_be_turned_off() -> None:
    parrot = CountingParrot()
    parrot.go.set()
    with serving_here(parrot, SETTINGS.model_copy(update={"page": False})) as url:
        assert httpx.get(url, headers=BROWSER).json() == {"status": "alive"}
        assert httpx.get(f"{url}/page/try_model.js").status_code == 404
