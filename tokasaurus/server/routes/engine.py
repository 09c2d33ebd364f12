"""What the engine says of itself, and how to empty its prefix cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tokasaurus.config.slices import ServerConfig
from tokasaurus.protocol.commands import FlushCache
from tokasaurus.protocol.messages import Statistics
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.state import EngineState
from tokasaurus.version import __version__

__all__ = ["EngineRoutes"]


class EngineRoutes:
    """The routes.

    Args:
        config: the server's slice.
        state: of the engine.
    """

    def __init__(self, config: ServerConfig, state: EngineState) -> None:
        self._config = config
        self._state = state
        self._runner = CommandRunner(state)
        self._started_at = time.monotonic()
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        get: list[tuple[str, Callable[..., Any]]] = [
            ("/ping", self.ping),
            ("/health", self.health),
            ("/version", self.version),
            ("/metrics", self.metrics),
            ("/v1/models", self.models),
            ("/v1/models/{model_id:path}", self.model),
            ("/model_info", self.model_info),
            ("/server_info", self.server_info),
        ]
        for path, handler in get:
            router.add_api_route(path, handler, methods=["GET"], response_model=None)
            # Probes and load balancers ask for the status alone.
            router.add_api_route(
                path,
                handler,
                methods=["HEAD"],
                name=f"HEAD {path}",
                response_model=None,
                include_in_schema=False,
            )
        for path in ("/flush_cache", "/reset_prefix_cache"):
            router.add_api_route(path, self.flush_cache, methods=["POST"], response_model=None)
        return router

    # --- while the model loads, too ---------------------------------------------------------------

    async def ping(self) -> Response:
        """The server process lives; says nothing of the model."""
        return json_answer({"message": "pong"})

    async def health(self) -> Response:
        """200 when requests are served. Names the processes that make no progress, and replicas."""
        status, stalled = self._state.status, self._state.stalled
        body: dict[str, Any] = {"status": status, "running": self._state.num_running}
        if stalled:
            body["stalled"] = stalled
        if self._state.replicas:
            body["replicas"] = self._state.replicas
        return json_answer(body, 200 if status == "ok" else 503)

    async def version(self) -> Response:
        return json_answer({"version": __version__})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def server_info(self) -> Response:
        """Version, configuration and state; nothing secret."""
        config, state = self._config, self._state
        counted = state.statistics
        return json_answer(
            {
                "version": __version__,
                "status": state.status,
                "uptime_s": round(time.monotonic() - self._started_at, 3),
                "model_path": config.model_root,
                "served_model_name": config.model_name,
                "host": config.host,
                "port": config.port,
                "max_model_len": config.max_request_tokens,
                "max_seqs_per_forward": config.max_seqs_per_forward,
                "max_topk_logprobs": config.max_topk_logprobs,
                "logprobs_mode": config.logprobs_mode.name.lower(),
                "embedding_pooling": config.embedding_pooling.name.lower(),
                # One for each replica: sglang.bench_serving looks into the first.
                "internal_states": [
                    {
                        "num_running_prompts": state.num_running,
                        "backlog_eta_s": state.etas().backlog_s,
                        **({} if counted is None else _totals(counted)),
                    }
                ],
            }
        )

    # --- when requests are served -----------------------------------------------------------------

    async def models(self) -> Response:
        """The one model."""
        self._state.check()
        return json_answer({"object": "list", "data": [self._model()]})

    async def model(self, model_id: str) -> Response:
        """The one model, by any name: requests may use any."""
        self._state.check()
        return json_answer({**self._model(), "id": model_id})

    async def model_info(self) -> Response:
        """The model."""
        config = self._config
        weights = self._state.engine().generations.commands.weights
        return json_answer(
            {
                "model_path": config.model_root,
                "served_model_name": config.model_name,
                "tokenizer_path": config.tokenizer_path,
                "is_generation": True,
                "vocab_size": config.vocab_size,
                "eos_token_ids": config.eos_token_ids,
                "max_model_len": config.max_request_tokens,
                "default_sampling_params": config.sampling_defaults,
                **({} if weights.are_original else {"weight_version": weights.label()}),
            }
        )

    async def flush_cache(self) -> Response:
        """Forgets every cached page that no running request holds, and counts these pages."""
        (flushed,) = await self._runner.run(FlushCache())
        return json_answer(
            {
                "status": "ok",
                "flushed_pages": flushed.num_pages,
                "flushed_tokens": flushed.num_tokens,
            }
        )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tokasaurus",
            "root": self._config.model_root,
            "max_model_len": self._config.max_request_tokens,
        }


def _totals(counted: Statistics) -> dict[str, Any]:
    """The manager's counters, without those of single cartridges, which /v1/cartridges has."""
    fields = msgspec.structs.asdict(counted)
    del fields["cartridges"]
    return fields
