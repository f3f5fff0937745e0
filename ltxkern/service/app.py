"""The routes of the service, its page and its OpenAPI document."""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import sqlite3
from base64 import b64encode
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import ltxkern
from ltxkern.service import guard, worker
from ltxkern.service.fields import LONGEST, RefusedError
from ltxkern.service.jobs import Sent, Service
from ltxkern.service.metrics import prometheus
from ltxkern.service.store import DONE, ENDED

logger = logging.getLogger(__name__)

_LONGEST_KEY = 200


def page() -> HTMLResponse:
    """The page, which may load nothing but what it says itself and what this server answers."""
    text = importlib.resources.files("ltxkern.service").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        inline = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = f"'sha256-{b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    return HTMLResponse(text, headers=headers)


async def _read(request: Request) -> tuple[bytes, Sent]:
    """The JSON of a request, and its files."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await request.body(), ()
    if kind != "multipart/form-data":
        raise RefusedError(415, f"content-type must be application/json or multipart/form-data, got {kind!r}")
    most = LONGEST["images"]
    form = await request.form(max_files=most, max_fields=1, max_part_size=guard.JSON_BYTES)
    body, sent = form.get("request"), form.getlist("images")
    unknown = sorted(set(form) - {"request", "images"})
    files = [(one.filename or "", one.file) for one in sent if isinstance(one, UploadFile)]
    if not isinstance(body, str) or unknown or len(files) != len(sent):
        raise RefusedError(
            422,
            "the parts must be one text `request`, which is JSON, and files `images`"
            + "".join(f", got {unknown}" if unknown else ""),
        )
    return body.encode(), files


def make_app(service: Service) -> FastAPI:
    """The application; `Guard` goes around it."""
    app = FastAPI(title="ltxkern", version=ltxkern.__version__, docs_url=None, redoc_url=None, lifespan=service.life)

    def refused(_: Request, error: Exception) -> Response:
        refusal = error if isinstance(error, RefusedError) else _as_refusal(error)
        return JSONResponse({"error": str(refusal)}, refusal.status, headers=refusal.headers)

    for kind in (RefusedError, HTTPException, RequestValidationError, ClientDisconnect, sqlite3.Error, OSError):
        app.add_exception_handler(kind, refused)

    @app.get("/", include_in_schema=False)
    def show_page() -> Response:
        return page()

    @app.get("/health", responses={503: {"description": "No worker is ready"}})
    def health() -> JSONResponse:
        """Whether a worker is ready, and how many videos wait."""
        ready = service.supervisor.ready.is_set()
        shown = {"status": "ready" if ready else "starting", "waiting": service.store.waiting()}
        return JSONResponse(shown | {"version": ltxkern.__version__}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> PlainTextResponse:
        """Counters for Prometheus."""
        text = prometheus(service.store, service.supervisor, request.app.state.guard.served)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.post("/v1/videos", status_code=202, responses=_also(200, "The video that this key asked for before"))
    async def submit(
        request: Request, idempotency_key: Annotated[str | None, Header(max_length=_LONGEST_KEY)] = None
    ) -> JSONResponse:
        """Ask for a video. The same Idempotency-Key with the same request gives the same video, with status 200."""
        body, sent = await _read(request)
        job, added = await run_in_threadpool(service.submit, body, sent, idempotency_key)
        shown = await run_in_threadpool(service.view, job)
        return JSONResponse(shown, 202 if added else 200, headers={"location": f"/v1/videos/{job.id}"})

    @app.get("/v1/videos", responses=_ERRORS)
    def videos(
        limit: Annotated[int, Query(ge=1, le=200)] = 50, before: Annotated[str | None, Query(max_length=64)] = None
    ) -> dict[str, Any]:
        """The latest videos, newest first; those before one of them by its id."""
        jobs = service.store.page(limit, None if before is None else service.find(before).sequence)
        return {"videos": [service.view(job) for job in jobs]}

    @app.get("/v1/videos/{video}", responses=_ERRORS)
    def video(video: str) -> dict[str, Any]:
        """One video: its state, progress and error."""
        return service.view(service.find(video))

    @app.delete("/v1/videos/{video}", responses=_also(202, "Its worker stops after the step at work"))
    def delete(video: str) -> JSONResponse:
        """Cancel a video that waits or runs (202 until its worker has stopped); forget one that has ended, with its files."""
        job = service.delete(video)
        return JSONResponse(service.view(job), 200 if job.status in ENDED else 202)

    @app.head("/v1/videos/{video}/content", include_in_schema=False)
    @app.get("/v1/videos/{video}/content", responses=_ERRORS, response_class=FileResponse)
    def content(video: str) -> FileResponse:
        """The mp4."""
        job = service.find(video)
        if job.status != DONE:
            raise RefusedError(409, f"the video is {job.status}" + (f": {job.error}" if job.error else ""))
        file = service.supervisor.folder_of(job.id) / worker.RESULT
        return FileResponse(file, media_type="video/mp4", filename=f"{job.id}.mp4", content_disposition_type="inline")

    @app.get("/v1/videos/{video}/preview", responses=_also(204, "No picture yet"), response_class=FileResponse)
    def preview(video: str) -> Response:
        """The latest picture of a video at work; 204 where there is none yet."""
        place = service.supervisor.folder_of(service.find(video).id) / worker.PREVIEWS
        files = sorted(place.glob("stage-*.png"))
        if not files:
            return Response(status_code=204)
        return FileResponse(files[-1], media_type="image/png", headers={"cache-control": "no-store"})

    @app.get("/v1/videos/{video}/events", responses=_ERRORS, response_class=StreamingResponse)
    def events(video: str) -> StreamingResponse:
        """Server-sent events of type `video`, each with the whole job; the stream ends when it does."""
        name = service.find(video).id
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(service.events(name), media_type="text/event-stream", headers=headers)

    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    return app


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused; `error` says why",
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
            }
        },
    }
}


def _also(status: int, text: str) -> dict[int | str, dict[str, Any]]:
    return {**_ERRORS, status: {"description": text}}


def _as_refusal(error: Exception) -> RefusedError:
    if isinstance(error, HTTPException):
        return RefusedError(error.status_code, str(error.detail), **dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        problems = [f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()]
        return RefusedError(422, "; ".join(problems))
    if isinstance(error, ClientDisconnect):
        return RefusedError(400, "the client left before its request was whole")
    logger.error("a request was not served: %s", error)
    return RefusedError(503, "the server cannot read or write its files now: try again later", retry_after="30")


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, with the body that is read by hand."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema = service.model.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = made.setdefault("components", {}).setdefault("schemas", {})
        parts |= schema.pop("$defs", {}) | {"VideoRequest": schema}
        body = {"$ref": "#/components/schemas/VideoRequest"}
        files = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": LONGEST["images"]}
        form = {"type": "object", "properties": {"request": body, "images": files}, "required": ["request"]}
        content = {"application/json": {"schema": body}, "multipart/form-data": {"schema": form}}
        made["paths"]["/v1/videos"]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = made
    return app.openapi_schema
