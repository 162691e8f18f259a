"""The HTTP application: routes, keys, error envelopes, the page."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from serve.access import check_key
from serve.api import GenerationResponse, ModelList, ModelObject, default_eta, default_guidance
from serve.calls import Calls
from serve.catalog import Catalog, LoRAInfo
from serve.errors import ApiError, ErrorEnvelope, error_type
from serve.generation import Generation
from serve.links import SUFFIXES, Links
from serve.metrics import IngressMetrics
from serve.middleware import HearsOut, Unforeseen
from serve.safety import Guard
from serve.schema import request_schema
from serve.settings import NO_LORA, Settings
from serve.status import Health, Status

logger = logging.getLogger("ray.serve")
PAGE = Path(__file__).parent / "page"
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page asks nobody but this server for anything."""
EVENT = {
    "type": "object",
    "description": "One server-sent event; `data` is the JSON of OpenAI's event of that name, or of an error.",
    "properties": {
        "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "No API key, or a wrong one.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The model or the safety checker failed.",
    503: "The replica was lost; the same request can be sent again.",
    504: "Not done in time.",
}


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorEnvelope, "description": ERRORS[code]} for code in codes}


def make_app(
    settings: Settings,
    catalog: Catalog,
    keys: Sequence[bytes],
    calls: Calls,
    guard: Guard,
    links: Links,
    metrics: IngressMetrics,
    status: Status,
) -> FastAPI:
    """The application; `keys` are digests, none lets everyone in."""
    app = FastAPI(title="hypersd_ray", version="1", description=__doc__, docs_url=None, redoc_url=None)
    _handle_errors(app)
    app.add_middleware(Unforeseen)  # before CORS, which then stands around it
    if settings.ingress.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.ingress.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends several x-stainless-... headers
            expose_headers=["Retry-After", "X-Request-ID", "X-Should-Retry"],
        )
    app.add_middleware(HearsOut)  # the outermost

    async def key(request: Request) -> None:
        try:
            check_key(request.headers.get("authorization"), keys)
        except ApiError as error:
            code = error.body.code or ""
            if request.method == "POST":  # the others are no requests for images
                metrics.requests.inc(1, {"status": str(error.status), "code": code})
            logger.info(
                "%s %s %s", request.url.path[:128], error.status, code, extra={"status": error.status, "code": code}
            )
            raise

    generation = Generation(settings, catalog, calls, guard, links, metrics)
    guarded = [Depends(key)]
    _add_images(app, generation, links, guarded)
    _add_models(app, models_of(settings, catalog), guarded)

    @app.get(
        "/health",
        responses={503: {"model": Health, "description": "No replica of the model, or of the checker, is ready."}},
    )
    async def health() -> Health:
        """Whether a request would be worked on."""
        now = await status.health()
        return now if now.status == "ok" else JSONResponse(now.model_dump(), 503)  # type: ignore[return-value]

    if settings.ingress.page:
        _add_page(app)
    _describe(app, settings, catalog, bool(keys))
    return app


def _add_images(app: FastAPI, generation: Generation, links: Links, guarded: list[Any]) -> None:
    @app.post(
        "/v1/images/generations",
        dependencies=guarded,
        response_model=GenerationResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "The images."},
            **_errors(400, 401, 404, 413, 415, 429, 500, 503, 504),
        },
    )
    async def generate(request: Request) -> Response:
        """Draw images of a prompt."""
        return await generation.answer(request)

    @app.get(
        "/images/{name}",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in SUFFIXES.values()}}, **_errors(404)},
    )
    async def image(name: str) -> Response:
        """An image of an answer with response_format=url, as long as it is kept."""
        data = await asyncio.to_thread(links.get, name)
        if data is None:
            raise ApiError(404, "there is no such image, or its time is over", "name", "not_found")
        headers = {"Cache-Control": f"private, max-age={links.seconds}", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=SUFFIXES[name.rpartition(".")[2]], headers=headers)


def models_of(settings: Settings, catalog: Catalog) -> list[ModelObject]:
    """The base with its default LoRA, every LoRA on it, and the bare base."""
    common: dict[str, Any] = {
        "created": catalog.created, "sizes": list(catalog.sizes), "controls": list(catalog.controlnets),
        "max_images": settings.limits.images, "max_steps": settings.limits.steps,
        "default_steps": settings.model.default_steps, "examples": list(catalog.examples),
        "max_guidance": settings.limits.guidance, "max_lora_scale": settings.limits.lora_scale,
    }  # fmt: skip

    def defaults(lora: LoRAInfo | None) -> dict[str, Any]:
        return {
            "scheduler": catalog.sampler(NO_LORA if lora is None else lora.name),
            "default_eta": default_eta(lora, settings), "default_guidance": default_guidance(lora, settings),
        }  # fmt: skip

    plain = catalog.lora(catalog.choose(settings.model.default_steps))
    chosen = catalog.lora(catalog.choose(settings.model.default_steps, guided=True))
    keeps = chosen is None or chosen.keeps_guidance
    models = [
        ModelObject(id=name, keeps_guidance=keeps, **common, **defaults(plain))
        for name in (catalog.id, *catalog.aliases)
    ]
    for lora in catalog.loras:
        models.append(
            ModelObject(
                id=f"{catalog.id}:{lora.name}", lora=lora.name, steps=list(lora.steps),
                keeps_guidance=lora.keeps_guidance,
                only_steps=len(lora.timesteps) or None,
                **common,
                **defaults(lora),
            )
        )  # fmt: skip
    return [
        *models,
        ModelObject(id=f"{catalog.id}:{NO_LORA}", lora=NO_LORA, keeps_guidance=True, **common, **defaults(None)),
    ]


def _add_models(app: FastAPI, models: list[ModelObject], guarded: list[Any]) -> None:
    @app.get("/v1/models", dependencies=guarded, responses=_errors(401))
    async def list_models() -> ModelList:
        """What is served."""
        return ModelList(data=models)

    @app.get("/v1/models/{model}", dependencies=guarded, responses=_errors(401, 404))
    async def one_model(model: str) -> ModelObject:
        """One model."""
        for one in models:
            if one.id == model:
                return one
        raise ApiError(404, f"model: {model[:128]!r} is not served here", "model", "model_not_found")


def _add_page(app: FastAPI) -> None:
    """The files of the page, read once."""
    for path in sorted(PAGE.iterdir()):
        _add_file(app, path)


def _add_file(app: FastAPI, path: Path) -> None:
    data, kind = path.read_bytes(), MEDIA[path.suffix]
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    route = {"index.html": "/", "docs.html": "/docs"}.get(path.name, f"/page/{path.name}")

    @app.get(route, include_in_schema=False)
    async def file(request: Request) -> Response:
        if route == "/" and not request.url.path.endswith("/"):  # the page's own addresses begin at its folder
            return RedirectResponse(f"{request.url.path}/")
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)


def _handle_errors(app: FastAPI) -> None:
    """Everything that is not a success leaves in the envelope."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.envelope(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path[:128]}: {error.detail}"
        body = {"message": detail, "type": error_type(error.status_code), "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code, error.headers)


def _describe(app: FastAPI, settings: Settings, catalog: Catalog, needs_key: bool) -> None:
    """The OpenAPI document, with this server's limits in it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            post = schema["paths"]["/v1/images/generations"]["post"]
            body = {"schema": {"$ref": "#/components/schemas/GenerationRequest"}}
            post["requestBody"] = {"required": True, "content": {"application/json": body}}
            schema["components"]["schemas"]["GenerationRequest"] = request_schema(settings, catalog)
            if needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
