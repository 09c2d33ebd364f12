"""Receipts of answers: what an answer followed from, so that another engine can repeat it.

A receipt is written from what the text core has: prepared requests, their outputs, the identity of
the workers, and the files that the weights came from. Its form is that of ``tokasaurus.receipts``.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from tokasaurus.config.resolve import BUNDLED_MODEL_NAME
from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.protocol.arrays import Float32Array
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.messages import SAMPLING_NUMBERS, LogprobsMode
from tokasaurus.receipts.form import sealed, void
from tokasaurus.receipts.once import Once
from tokasaurus.receipts.weights import (
    NoDigest,
    StampedFile,
    WeightsDigest,
    stamped,
    weights_digest,
)
from tokasaurus.safetensors_file import FileStamp
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.samples import SampleOutput, TokenLogprobs, joined_runs
from tokasaurus.text.tokenizer import Tokenizer
from tokasaurus.version import __version__

if TYPE_CHECKING:
    from tokasaurus.text.generation import Generation
    from tokasaurus.text.preparation import PreparedRequest

__all__ = ["FIELD", "Receipts", "Record"]

FIELD = "receipt"

_NUM_VERSIONS = 8
"""Versions of weights whose digests are kept, for answers that ended before the latest updates."""

_WITHOUT_EFFECT = frozenset({"priority", "first_k", FIELD})
"""Fields of ``SamplingParams`` on which no token depends."""


class Record:
    """The whole output of each sample of a prompt, from the pieces that were taken."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[SampleOutput]] = {}

    def add(self, outputs: Sequence[SampleOutput]) -> None:
        for output in outputs:
            self._pieces.setdefault(output.index, []).append(output)

    def outputs(self) -> list[SampleOutput]:
        """By index."""
        return [_joined(pieces) for _, pieces in sorted(self._pieces.items())]


class Receipts:
    """Writes the receipts of one engine. Its methods may be called from any thread.

    Args:
        config: the server's slice.
        tokenizer: of the model.
    """

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = Once(tokenizer.digests, "tokenizer digest")
        self._worker: WorkerIdentity | None = None
        self._refusal = "it is not ready"
        self._lock = threading.Lock()
        self._weights: dict[int, Once[WeightsDigest]] = {}  # by version
        self._is_wanted = False  # a request has asked for a receipt

    def adopt(self, workers: Sequence[WorkerIdentity]) -> None:
        """Takes what the workers are. Receipts can be given from now on, if results allow it.

        Called again when workers have been started again.
        """
        if not workers:
            self._refusal = "its workers do not say what they compute with"
            return
        first, *others = workers
        unstable = next((each for each in workers if not each.is_deterministic), None)
        if unstable is not None:
            self._worker, self._refusal = None, unstable.determinism_reason
        elif any(_as_replica(each) != _as_replica(first) for each in others):
            self._worker = None
            self._refusal = "its replicas do not compute with the same kernels and libraries"
        else:
            self._worker = first
        files = [
            StampedFile(file.path, FileStamp(file.num_bytes, file.modified_ns))
            for file in first.weight_files
        ]
        with self._lock:
            if not self._weights:
                self._weights[0] = _digest_later(files)

    def check(self, params: SamplingParams) -> None:
        """Checks that a request's answer can have a receipt, and prepares for it.

        Raises:
            RequestError: results depend on what else runs, or on when.
        """
        if self._worker is None:
            raise RequestError(
                f"{FIELD} needs deterministic results, and this engine does not promise them:"
                f" {self._refusal}; start it with deterministic=T",
                FIELD,
            )
        if params.first_k is not None and params.first_k < params.n:
            raise RequestError(
                f"{FIELD} cannot be combined with first_k={params.first_k}: which samples end"
                " first depends on what else runs",
                FIELD,
            )
        with self._lock:
            self._is_wanted = True
            newest = self._weights[max(self._weights)]
        newest.begin()
        self._tokenizer.begin()

    def note_update(self, version: int, files: Sequence[str]) -> None:
        """The engine is about to read the weights of this version from these files.

        Without files, they have come from a trainer, and have no digest.
        """
        self.note_stamped(version, stamped(files))

    def note_stamped(self, version: int, files: Sequence[StampedFile]) -> None:
        """The same, with the files as they were when the update began."""
        weights = _digest_later(files) if files else Once(_no_digest, "weights digest")
        with self._lock:
            self._weights[version] = weights
            for old in sorted(self._weights)[:-_NUM_VERSIONS]:
                del self._weights[old]
            is_wanted = self._is_wanted
        if is_wanted:
            weights.begin()  # at once, since the files may go after the update

    def write(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The receipt of an answer whose generations have finished and been taken.

        It waits for digests that are not known yet.
        """
        if self._worker is None:  # a replica that was started again is not what it was
            return void(self._refusal)
        outputs = [generation.recorded() for generation in generations]
        everything = [output for each in outputs for output in each]
        if any(output.finish_reason == "abort" for output in everything):
            return void("a command ended the request before its end")
        versions = sorted({run[0] for each in everything for run in each.weights_versions})
        if len(versions) != 1:
            return void(
                "weights of several versions drew its tokens:"
                f" {', '.join(map(str, versions))}; send the request again"
            )
        try:
            return sealed(self._sections(generations, outputs, versions[0]))
        except NoDigest as error:
            return void(f"the weights of version {versions[0]} have no digest: {error}")

    @property
    def _is_bundled(self) -> bool:
        """Whether the model is the bundled one, whose path differs from machine to machine."""
        return self._config.model_name == BUNDLED_MODEL_NAME

    def _sections(
        self,
        generations: Sequence[Generation],
        outputs: Sequence[Sequence[SampleOutput]],
        version: int,
    ) -> dict[str, Any]:
        worker = self._worker
        assert worker is not None
        with self._lock:
            weights = self._weights.get(version)
        if weights is None:
            raise NoDigest("nothing is known of where they came from")
        found = weights.result()
        return {
            "model": {
                "weights": {"digest": found.digest, "parts": dict(found.parts)},
                "tokenizer": self._tokenizer.result(),
                "config": worker.model,
                "eos_token_ids": list(self._config.eos_token_ids),
            },
            "engine": {"tokasaurus": __version__, "kernels": worker.kernels},
            "configuration": worker.configuration,
            "request": [_request(generation.request) for generation in generations],
            "answer": [
                _answer(generation, each)
                for generation, each in zip(generations, outputs, strict=True)
            ],
            "environment": {
                **worker.environment,
                "model": None if self._is_bundled else self._config.model_root,
                "weights_version": version,
            },
        }


def _no_digest() -> WeightsDigest:
    raise NoDigest("they came from a trainer's group, and no file has them")


def _digest_later(files: Sequence[StampedFile]) -> Once[WeightsDigest]:
    return Once(partial(weights_digest, files), "weights digest")


def _as_replica(worker: WorkerIdentity) -> tuple[Any, ...]:
    """What replicas must have in common."""
    return (
        worker.model,
        worker.configuration,
        worker.kernels,
        worker.environment,
        worker.weight_files,
    )


def _request(prepared: PreparedRequest) -> dict[str, Any]:
    """A request with a value for everything: ``SamplingParams`` of it give the same request."""
    params, sampling = prepared.params, prepared.sampling
    fields = {
        field.name: _plain(getattr(params, field.name))
        for field in dataclasses.fields(params)
        if field.name not in _WITHOUT_EFFECT
    }
    form = params.structured_outputs
    return {
        "prompt_ids": prepared.prompt_ids.tolist(),
        **fields,
        **{name: getattr(sampling, name) for name in SAMPLING_NUMBERS},
        "max_tokens": prepared.max_tokens,
        # Texts: a double cannot hold a seed, and the order of a schema's fields counts.
        "seed": str(prepared.seed),
        "structured_outputs": None if form is None else json.dumps(form, ensure_ascii=False),
        "logprobs_mode": sampling.logprobs_mode.name.lower(),
        **({} if prepared.prefix is None else {"cartridges": [*prepared.prefix.digests]}),
    }


def _plain(value: Any) -> Any:
    """A parameter as JSON."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, LogprobsMode):
        return value.name.lower()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value]


def _answer(generation: Generation, outputs: Sequence[SampleOutput]) -> dict[str, Any]:
    choices = []
    for output in outputs:
        choice: dict[str, Any] = {
            "index": output.index,
            "token_ids": output.token_ids,
            "text": output.text,
            "finish_reason": output.finish_reason,
        }
        if output.logprobs is not None:
            choice["logprobs"] = _logprobs(output.logprobs)
        choices.append(choice)
    answer: dict[str, Any] = {"choices": choices}
    if generation.prompt_logprobs is not None:
        answer["prompt_logprobs"] = _logprobs(generation.prompt_logprobs)
    return answer


def _logprobs(values: TokenLogprobs) -> dict[str, Any]:
    """The bits of logprobs, eight hexadecimal digits each, in the order of positions."""
    return {
        "chosen": _bits(values.logprobs),
        "top_ids": values.top_ids.tolist(),
        "top": _bits(values.top_logprobs),
    }


def _bits(values: Float32Array) -> str:
    return values.astype(np.dtype(">f4")).tobytes().hex()


def _joined(pieces: Sequence[SampleOutput]) -> SampleOutput:
    """All pieces of a sample as one."""
    if len(pieces) == 1:
        return pieces[0]
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        runs = joined_runs(runs, piece.weights_versions)
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return SampleOutput(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [token_id for piece in pieces for token_id in piece.token_ids],
        TokenLogprobs.join(logprobs) if logprobs else None,
        pieces[-1].finish_reason,
        runs,
    )
