"""The page at / on which a person tries the model in a browser.

It loads nothing from elsewhere: its content security policy allows only its own script and style sheet, and images that
it made itself. With API keys, the browser asks for one (any user name, the key as password).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from clincot.serving.api_errors import ApiError

PAGE_CHALLENGE = 'Basic realm="ClinCoT", charset="UTF-8"'
_PAGE_PATHS = re.compile(r"/page/[a-z_.]+")
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_page_request(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser asks for the page or a part of it; probes and clients ask / for its status.

    headers: with names in lower case.
    """
    return bool(_PAGE_PATHS.fullmatch(path)) or (path == "/" and "text/html" in headers.get("accept", ""))


def build_page_router() -> APIRouter:
    """Build the routes of the page. They have to be added before the SDK's route /, whose reply they keep."""
    router = APIRouter()
    status = {"type": "object", "required": ["status"], "properties": {"status": {"const": "alive"}}}
    content = {"application/json": {"schema": status}, "text/html": {"schema": {"type": "string"}}}
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "Returns the page to browsers, and the status to others.", "content": content}
    }

    @router.get("/", responses=described)
    async def page_or_status(request: Request) -> Response:
        if not is_page_request("/", request.headers):
            return JSONResponse({"status": "alive"}, headers={"Vary": "Accept"})
        return _read_part("try_model.html", {"Vary": "Accept"})

    @router.get("/page/{name}", include_in_schema=False)
    async def page_part(name: str) -> Response:
        return _read_part(name)

    return router


def _read_part(name: str, headers: Mapping[str, str] | None = None) -> Response:
    file = files("clincot.serving").joinpath("static", name)
    kind = name.rpartition(".")[2]
    if kind not in _MEDIA_TYPES or not _PAGE_PATHS.fullmatch(f"/page/{name}") or not file.is_file():
        raise ApiError(404, "not_found", "the route does not exist")
    content = file.read_text("utf-8")
    return Response(content, media_type=_MEDIA_TYPES[kind], headers={**_HEADERS, **(headers or {})})
