"""What an engine says of itself, and how to empty its prefix cache."""

from __future__ import annotations

import asyncio
import time

import msgspec
from fastapi import APIRouter, Response

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import TokasaurusError
from tokasaurus.protocol.messages import CacheFlushed
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
        self._started_at = time.monotonic()

    def router(self) -> APIRouter:
        router = APIRouter()
        for path in ("/flush_cache", "/reset_prefix_cache"):
            for method in ("GET", "POST"):  # tools of SGLang use either
                router.add_api_route(
                    path,
                    self.flush_cache,
                    methods=[method],
                    name=f"{method} {path}",
                    response_model=None,
                )
        router.add_api_route("/model_info", self.model_info, methods=["GET"], response_model=None)
        router.add_api_route("/server_info", self.server_info, methods=["GET"], response_model=None)
        return router

    async def flush_cache(self) -> Response:
        """Forgets every cached page that no running request holds; says how many these were."""
        done: asyncio.Future[CacheFlushed] = asyncio.get_running_loop().create_future()

        def settle(result: CacheFlushed | TokasaurusError) -> None:
            if done.done():  # the client went away
                return
            if isinstance(result, CacheFlushed):
                done.set_result(result)
            else:
                done.set_exception(result)

        self._state.generations().flush_cache(settle)
        flushed = await done
        return json_answer(
            {
                "status": "ok",
                "flushed_pages": flushed.num_pages,
                "flushed_tokens": flushed.num_tokens,
            }
        )

    async def model_info(self) -> Response:
        """The model."""
        config = self._config
        self._state.check()
        return json_answer(
            {
                "model_path": config.model_root,
                "served_model_name": config.model_name,
                "tokenizer_path": config.tokenizer_path,
                "is_generation": True,
                "vocab_size": config.vocab_size,
                "eos_token_ids": config.eos_token_ids,
                "max_model_len": config.max_request_tokens,
                "default_sampling_params": {
                    name: getattr(config, name)
                    for name in ("temperature", "top_p", "top_k", "min_p")
                    if getattr(config, name) is not None
                },
            }
        )

    async def server_info(self) -> Response:
        """Version, configuration and state; nothing secret. Answered while the model loads, too."""
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
                        **({} if counted is None else msgspec.structs.asdict(counted)),
                    }
                ],
            }
        )
