"""The HTTP application: the routes, the shape of errors, and the OpenAPI document.

::

    state = EngineState()
    app = create_app(config, state)                          # answers /ping and /health from now on
    generations = Generations(config, tokenizer, send)
    state.ready(Preparer(config, tokenizer), generations)    # serves
    generations.absorb(message)                              # for every message of the manager
    state.drain() ... state.die(reason)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.config.slices import ServerConfig
from tokasaurus.server.control.weights_updates import WeightsUpdates
from tokasaurus.server.document import document_answers
from tokasaurus.server.http.access import OPEN_PATHS, Access
from tokasaurus.server.http.answers import install_error_handlers
from tokasaurus.server.http.direct import DirectRoutes
from tokasaurus.server.http.passing_on import KnownClients
from tokasaurus.server.http.request_counts import CountRequests
from tokasaurus.server.http.store_place import AtStore, StorePlace
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.batches import BatchRequest, BatchRoutes
from tokasaurus.server.routes.cartridges import CartridgeRoutes
from tokasaurus.server.routes.control import CONTROL_SCHEMAS, ControlRoutes
from tokasaurus.server.routes.engine import EngineRoutes
from tokasaurus.server.routes.files import FileRoutes
from tokasaurus.server.routes.generating import Endpoints
from tokasaurus.server.routes.page import PAGE_PATHS, PageRoutes
from tokasaurus.server.routes.synchronous_batch import SynchronousBatch
from tokasaurus.server.routes.tokens import TOKEN_SCHEMAS, TokenRoutes
from tokasaurus.server.routes.watching import WatchingRoutes
from tokasaurus.server.routes.weights import WEIGHTS_PREFIX, WEIGHTS_SCHEMAS, WeightsRoutes
from tokasaurus.server.routes.weights_groups import WEIGHTS_GROUP_SCHEMAS, WeightsGroupRoutes
from tokasaurus.server.state import EngineState
from tokasaurus.version import __version__

__all__ = ["create_app", "create_outer_app", "create_store_app"]


def create_app(
    config: ServerConfig,
    state: EngineState,
    batches: BatchRunner | None = None,
    directory: Path | None = None,
    *,
    is_inner: bool = False,
    place: StorePlace | None = None,
) -> FastAPI:
    """An ASGI application that serves one engine.

    Args:
        config: the server's slice.
        state: of the engine; its owner says when the engine is ready, drains and dies.
        batches: runs batches, once its owner has started it; None leaves out files and batches.
        directory: for weights that come over HTTP; None is the system's for temporary files.
        is_inner: requests come from ``create_outer_app``, which has checked them.
        place: of the store of files and batches; None if it is always here.
    """
    # Its pages for the document would load scripts of another host.
    app = FastAPI(
        title="Tokasaurus",
        version=__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    executor = Executor(state, OPERATIONS)
    batch = SynchronousBatch(config, executor)
    endpoints = Endpoints(executor, batch)
    app.include_router(EngineRoutes(config, state).router())
    app.include_router(endpoints.router())
    app.include_router(batch.router())
    if batches is not None:
        app.include_router(FileRoutes(batches).router())
        app.include_router(BatchRoutes(batches).router())
    app.include_router(CartridgeRoutes(config, state).router())
    app.include_router(TokenRoutes(state).router())
    app.include_router(PageRoutes().router())
    app.include_router(WatchingRoutes(state, batches).router())
    updates = WeightsUpdates(directory)
    control = _control(config, state, updates)
    for router in control:
        app.include_router(router)
    app.include_router(WeightsRoutes(state, updates).router())
    install_error_handlers(app)
    # From the innermost layer to the outermost.
    if place is not None:
        app.add_middleware(AtStore, place=place)
    app.add_middleware(DirectRoutes, handlers=endpoints.handlers)
    if is_inner:
        app.add_middleware(KnownClients)
    else:
        _add_checks(app, config, control)
    app.add_middleware(CountRequests, counter=state.metrics.requests)  # refusals too
    operations = [each for operation in OPERATIONS.values() for each in operation.schemas]
    control_bodies = [*CONTROL_SCHEMAS, *WEIGHTS_SCHEMAS, *WEIGHTS_GROUP_SCHEMAS]
    document_answers(app, [*operations, BatchRequest, *TOKEN_SCHEMAS, *control_bodies])
    return app


def create_store_app(state: EngineState, batches: BatchRunner, place: StorePlace) -> FastAPI:
    """An ASGI application for requests about files and batches that another engine passes on.

    Args:
        state: of the engine.
        batches: with the store, while it is here.
        place: of the store.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.include_router(FileRoutes(batches).router())
    app.include_router(BatchRoutes(batches).router())
    install_error_handlers(app)
    app.add_middleware(AtStore, place=place, is_passed_on=True)
    app.add_middleware(KnownClients)
    app.add_middleware(CountRequests, counter=state.metrics.requests)
    return app


def create_outer_app(config: ServerConfig, state: EngineState, elsewhere: ASGIApp) -> FastAPI:
    """An ASGI application for an HTTP process: it checks requests, and answers those that generate.

    Args:
        config: the server's slice.
        state: of the engine, as this process knows it.
        elsewhere: answers all other requests.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    executor = Executor(state, OPERATIONS)
    batch = SynchronousBatch(config, executor)
    endpoints = Endpoints(executor, batch)
    app.include_router(endpoints.router())
    app.include_router(batch.router())
    app.include_router(TokenRoutes(state).router())
    app.router.default = elsewhere
    install_error_handlers(app)
    app.add_middleware(DirectRoutes, handlers=endpoints.handlers)
    _add_checks(app, config, _control(config, state, WeightsUpdates(None)))
    app.add_middleware(CountRequests, counter=state.metrics.requests)
    return app


def _control(config: ServerConfig, state: EngineState, updates: WeightsUpdates) -> list[APIRouter]:
    """The routes that need an admin key, but for those of weights over HTTP."""
    groups = WeightsGroupRoutes(config, state, updates)
    return [ControlRoutes(state, updates).router(), groups.router()]


def _add_checks(app: FastAPI, config: ServerConfig, control: Iterable[APIRouter]) -> None:
    """Adds what may refuse a request before it is read."""
    routes = itertools.chain.from_iterable(router.routes for router in control)
    control_paths = {route.path for route in routes if isinstance(route, APIRoute)}
    app.add_middleware(
        Access,
        config=config,
        is_control=lambda path: path in control_paths or path.startswith(WEIGHTS_PREFIX),
        open_paths=OPEN_PATHS | PAGE_PATHS,
    )
    if config.cors_origins:
        # Around Access, so that web pages can read refusals, and ask first without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
