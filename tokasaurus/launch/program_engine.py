"""What a program needs of an engine, however many processes it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, TypeAlias

from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.protocol.messages import Pooling
from tokasaurus.text.cartridges import FIELD, Cartridges, Prefix
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import CHAT_TEMPERATURE, PreparedRequest, Preparer
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CartridgeLike", "Conversation", "ProgramEngine", "Prompt", "specs_of"]

Prompt: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages, each ``{"role": ..., "content": ...}``."""
CartridgeLike: TypeAlias = CartridgeSpec | Mapping[str, Any] | str | PathLike[str]
"""A cartridge as requests name it, ``{"id": ..., "source": ...}``; a text or path is a local file.
"""

_FIELDS = {"id": str, "source": str, "force_redownload": bool}


def specs_of(cartridges: Sequence[CartridgeLike] | CartridgeLike | None) -> list[CartridgeSpec]:
    """The cartridges that a program names. Raises RequestError."""
    if cartridges is None:
        return []
    if isinstance(cartridges, CartridgeSpec | Mapping | str | PathLike):
        cartridges = [cartridges]
    return [_spec(each) for each in cartridges]


def _spec(cartridge: CartridgeLike) -> CartridgeSpec:
    if isinstance(cartridge, CartridgeSpec):
        return cartridge
    fields: Mapping[str, Any] = (
        {"id": fspath(cartridge), "source": "local"}
        if isinstance(cartridge, str | PathLike)
        else cartridge
    )
    for name, value in fields.items():
        if not isinstance(value, _FIELDS.get(name, ())):
            raise RequestError(
                f"cartridges: {name}={value!r} is not one of id=TEXT, source=TEXT and"
                " force_redownload=BOOL",
                FIELD,
            )
    if not fields.get("id"):
        raise RequestError("cartridges: each needs an id", FIELD)
    return CartridgeSpec(**fields)


class ProgramEngine:
    """Prepares requests, and holds those in flight.

    Attributes:
        config: the server's slice.
        preparer: checks requests, in any thread.
        generations: the table of prompts in flight.
        cartridges: of the engine.
    """

    config: ServerConfig
    preparer: Preparer
    generations: Generations
    cartridges: Cartridges

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.preparer.tokenizer

    def prepare(
        self, prompt: Prompt, params: SamplingParams, prefix: Prefix | None = None
    ) -> PreparedRequest:
        """Checks a prompt, in any thread. Raises RequestError if it cannot run.

        Args:
            prompt: behind a prefix, a text is tokenized without BOS, since the prefix has it.
            params: how to continue it.
            prefix: the cartridges before it.
        """
        if prefix is None:
            return self.preparer.prepare(self._ids(prompt), params)
        ids: Sequence[int]
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        else:
            ids = prompt
        return self.preparer.behind(prefix).prepare(ids, params)

    def prepare_chat(
        self,
        conversation: Conversation,
        params: SamplingParams,
        template_arguments: Mapping[str, Any] | None = None,
        prefix: Prefix | None = None,
    ) -> PreparedRequest:
        """Writes a conversation with the chat template and checks it, in any thread.

        Raises:
            RequestError: it cannot run, or the template refuses it.
        """
        preparer = self.preparer if prefix is None else self.preparer.behind(prefix)
        ids = self.tokenizer.render_chat(
            conversation, template_arguments, behind_cartridge=prefix is not None
        )
        return preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)

    def prepare_embedding(self, prompt: Prompt, pooling: Pooling) -> PreparedRequest:
        """The same as ``prepare``, for a prompt that is made into a vector."""
        return self.preparer.prepare_pooling(self._ids(prompt), pooling)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
