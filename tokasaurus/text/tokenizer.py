"""The model's tokenizer: text to ids, chat messages to ids, ids to bytes.

It wraps a tokenizer of transformers, which knows the special tokens and the chat template. Where
there is a ``tokenizer.json``, its pipeline turns text to ids, unchanged. Several threads may call
every method at once. The texts that models generate *continue* something, so decoding never strips
their first space.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import ModelError, RequestError, RequestTooLong
from tokasaurus.grammars import Vocabulary
from tokasaurus.host_memory import return_freed_memory
from tokasaurus.receipts.form import digest
from tokasaurus.text.chat_templates import WITHOUT_DATES, ChatTemplate, writes_dates
from tokasaurus.text.fewest_tokens import FewestTokens
from tokasaurus.text.token_bytes import bytes_from_decoder, decoder_steps

__all__ = ["Tokenizer"]

# Arguments of ``apply_chat_template`` about its result, not about the text of a conversation.
_RESERVED_ARGUMENTS = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# A template may write an argument again with each message, so the product is limited, too.
_MAX_ARGUMENT_CHARS = 1 << 16
_MAX_WRITTEN_CHARS = 1 << 26
_LONG_S = 0.25  # of processor time
# To tokenize a longer text takes so much memory that what is freed is given back at once.
_MANY_CHARACTERS = 1 << 20
_FILE = "tokenizer.json"
# Names of other files that AutoTokenizer makes a tokenizer of, beside *.model and *.tiktoken.
_VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json", "spiece.model")


class _Templates(threading.local):
    """The chat templates that this thread has compiled."""

    def __init__(self) -> None:
        self.compiled = lru_cache(maxsize=8)(ChatTemplate)


_templates = _Templates()


class Tokenizer:
    """One model's tokenizer.

    Args:
        wrapped: a transformers tokenizer.
        vocab_size: of the model. The tokenizer may have fewer tokens, because of padding, or more.
        eos_token_ids: ids that end a text without being part of it.
        pipeline: a ``tokenizers.Tokenizer`` that turns text to ids in place of the wrapped one's.
        trusts_templates: requests may bring their own chat template, a program that may take long.
        max_tokens: of a request. Texts that must have more are refused instead of tokenized; None
            is no limit.

    Attributes:
        visible: for each id, the bytes that it adds to a text; none for special tokens.
        spelled: the same, with special tokens by their names.
        special_ids: the special tokens by their names.
        special_token_ids: the same, ids only.
        chats_take_long: the chat template has taken long for a short text, so that even short
            conversations must not be rendered in an event loop.
    """

    def __init__(
        self,
        wrapped: Any,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        *,
        pipeline: Any = None,
        trusts_templates: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self._wrapped = wrapped
        self._max_tokens = max_tokens
        self._special_tokens = dict(wrapped.special_tokens_map)
        self._writes_chats = _writes_chats(wrapped)
        self.chats_take_long = False
        self._trusts_templates = trusts_templates
        self._vocab_size = vocab_size
        self._backend: Any = pipeline or getattr(wrapped, "backend_tokenizer", None)
        steps = None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            steps = decoder_steps(self._backend)
        self._fewest_tokens = None if self._backend is None else FewestTokens(self._backend)
        tokens: list[str | None] = [None] * max(vocab_size, len(wrapped))
        for token, token_id in wrapped.get_vocab().items():
            if token_id < len(tokens):
                tokens[token_id] = token
        hidden = {*wrapped.all_special_ids, *eos_token_ids}
        hidden |= {i for i, token in wrapped.added_tokens_decoder.items() if token.special}
        self.special_ids = {
            token: i for i in sorted(hidden) if i < len(tokens) and (token := tokens[i]) is not None
        }
        self.special_token_ids = frozenset(self.special_ids.values())
        self.spelled = self._spell(tokens, hidden, steps)
        self.visible = [b"" if i in hidden else data for i, data in enumerate(self.spelled)]
        self._strips_first_space = steps is None or any(
            step["type"] in ("Strip", "Metaspace") for step in steps
        )

    @classmethod
    def load(cls, config: ServerConfig) -> Tokenizer:
        """Loads the tokenizer that a configuration names. Takes a while: keep it off event loops.

        Raises:
            ModelError: the tokenizer is missing or broken.
        """
        path = config.tokenizer_path
        try:
            wrapped, pipeline = _load(Path(path), config.trust_remote_code)
            return cls(
                wrapped,
                config.vocab_size,
                config.eos_token_ids,
                pipeline=pipeline,
                trusts_templates=config.trust_request_chat_template,
                max_tokens=config.max_request_tokens,
            )
        except ModelError:
            raise
        except Exception as error:  # the libraries raise bare Exception
            raise ModelError(f"cannot load a tokenizer from {path}: {error}") from error

    # --- text to ids ------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects around it.

        A prompt that already begins with the text of the BOS token gets no second BOS token.

        Raises:
            RequestTooLong: the prompt must have more tokens than a request may have.
        """
        self._check_length(text, "prompt")
        if not add_special_tokens:
            return self._encode(text, add_special_tokens=False)
        ids = self._encode(text, add_special_tokens=True)
        bos_id = self._wrapped.bos_token_id
        if bos_id is not None and ids[:2] == [bos_id, bos_id]:
            del ids[0]
        return ids

    def encode_fragment(self, text: str) -> list[int]:
        """Ids of a piece of a text, without special tokens around it."""
        return self._encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        overrides: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        behind_cartridge: bool = False,
    ) -> list[int]:
        """Ids of a conversation, written by the model's chat template.

        The model writes the next message, or goes on with the last one if it is the assistant's.

        Args:
            messages: with at least ``role`` and ``content`` each.
            overrides: further arguments for ``apply_chat_template``.
            tools: that the model may call.
            behind_cartridge: what a cartridge begins with is left out: the BOS token, and the
                block with dates that templates of Llama 3 write.

        Raises:
            RequestError: the template refuses the messages, there is no template, or the request
                brings its own and is not trusted to.
        """
        overrides = overrides or {}
        self._check(overrides, len(messages) + len(tools))
        is_own = not tools and "chat_template" not in overrides
        if behind_cartridge and is_own and writes_dates(self._own_templates.get("default", "")):
            overrides = {**overrides, "chat_template": WITHOUT_DATES}
        if self._wrapped.chat_template is None and overrides.get("chat_template") is None:
            raise RequestError(
                "messages cannot be rendered: this model has no chat template; use /v1/completions,"
                " or start the engine with tokenizer=DIR of one that has",
                "messages",
            )
        continues = bool(messages) and messages[-1]["role"] == "assistant"
        arguments: dict[str, Any] = {
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
        }
        if not arguments.keys().isdisjoint(overrides):
            arguments = {}
        if tools:
            arguments["tools"] = list(tools)
        try:
            text = self._write_chat(messages, {**arguments, **overrides})
        except Exception as error:  # a template may raise anything
            raise RequestError(
                f"messages cannot be rendered by the chat template: {error}", "messages"
            ) from error
        self._check_length(text, "messages")
        ids = self._encode(text, add_special_tokens=False)
        if behind_cartridge and ids and ids[0] == self._wrapped.bos_token_id:
            del ids[0]
        return ids

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, continues: bool = False) -> str:
        """The text of a conversation, up to where the model writes.

        Args:
            messages: with at least ``role`` and ``content`` each.
            continues: it goes on with the last message, instead of writing the next one.

        Raises:
            Exception: what the template raises, or that there is none.
        """
        end = "continue_final_message" if continues else "add_generation_prompt"
        return self._write_chat(messages, {end: True})

    @property
    def bos_text(self) -> str:
        """What the BOS token is written as; "" if there is none."""
        return str(self._wrapped.bos_token or "")

    def _write_chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
    ) -> str:
        """The text of a conversation. Raises what the template raises."""
        if self._writes_chats:
            said = [dict(message) for message in messages]
            return str(self._wrapped.apply_chat_template(said, tokenize=False, **arguments))
        variables = {**self._special_tokens, **arguments}
        template = self._wrapped.get_chat_template(
            variables.pop("chat_template", None), variables.get("tools")
        )
        begun, text = time.thread_time(), ""
        try:
            text = _templates.compiled(template).render(messages, **variables)
        finally:
            if len(text) < _MANY_CHARACTERS and time.thread_time() - begun > _LONG_S:
                self.chats_take_long = True
        return text

    def chat_template(self, overrides: Mapping[str, Any], *, with_tools: bool = False) -> str:
        """The chat template that ``render_chat`` uses; "" if there is none.

        Args:
            overrides: as for ``render_chat``.
            with_tools: the conversation has tools.

        Raises:
            RequestError: the request brings its own template and is not trusted to.
        """
        self._check_template(overrides)
        given, own = overrides.get("chat_template"), self._own_templates
        if isinstance(given, str):
            return own.get(given, given)
        return own.get("tool_use" if with_tools else "default", own.get("default", ""))

    @property
    def _own_templates(self) -> Mapping[str, str]:
        """The model's chat templates by name; some models have several."""
        own = self._wrapped.chat_template
        return own if isinstance(own, dict) else {} if own is None else {"default": own}

    def _check(self, overrides: Mapping[str, Any], num_repeats: int) -> None:
        """Raises RequestError for arguments that a template must not get.

        Args:
            overrides: the arguments.
            num_repeats: how often a template may write one argument.
        """
        self._check_template(overrides)
        reserved = _RESERVED_ARGUMENTS.intersection(overrides)
        if reserved:
            raise RequestError(
                f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}",
                "chat_template_kwargs",
            )
        size = len(str(overrides)) if overrides else 0
        limit = min(_MAX_ARGUMENT_CHARS, _MAX_WRITTEN_CHARS // max(1, num_repeats))
        if overrides and size > limit:
            raise RequestError(
                f"chat_template_kwargs may have at most {limit} characters beside {num_repeats}"
                f" messages and tools, not {size}",
                "chat_template_kwargs",
            )

    def _check_template(self, overrides: Mapping[str, Any]) -> None:
        given = overrides.get("chat_template")
        if given is None or self._trusts_templates:
            return
        own = self._wrapped.chat_template
        is_name_of_own = isinstance(given, str) and isinstance(own, dict) and given in own
        if not is_name_of_own:
            raise RequestError(
                "chat_template_kwargs: a chat_template is a program, and a request's own might"
                " take seconds and a gigabyte; leave it out to use the model's, or start the engine"
                " with trust_request_chat_template=T",
                "chat_template_kwargs",
            )

    def _check_length(self, text: str, field: str) -> None:
        limit = self._max_tokens
        if limit is None or self._fewest_tokens is None:
            return
        num_tokens = self._fewest_tokens.exceed(text, limit)
        if num_tokens is not None:
            have = "messages have" if field == "messages" else f"{field} has"
            raise RequestTooLong.for_context(
                f"{have} at least {num_tokens} tokens",
                limit,
                "for prompt and completion together",
                field,
            )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Past the wrapper if possible: it sets the backend's truncation at each call, which two
        # threads must not do at once.
        if self._backend is not None:
            if len(text) < _MANY_CHARACTERS:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
                return list(encoding.ids)
            # Half of the time and memory, since it counts no offsets. But it starts threads.
            (encoding,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            token_ids = list(encoding.ids)
            del encoding
            return_freed_memory()
            return token_ids
        return list(self._wrapped.encode(text, add_special_tokens=add_special_tokens))

    def info(self) -> dict[str, Any]:
        """The tokenizer's class, size, special tokens and chat template; None for missing ones."""
        wrapped = self._wrapped
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(wrapped).__name__,
            "vocab_size": len(wrapped),
            **{name: getattr(wrapped, name, None) for name in names},
            "special_tokens": list(self.special_ids),
            "chat_template": wrapped.chat_template,
        }

    def digests(self) -> Mapping[str, str]:
        """Of what turns text to ids and back, and of the chat templates. Takes a while."""
        pipeline: Any = type(self._wrapped).__name__
        if self._backend is not None:
            pipeline = json.loads(self._backend.to_str())
            for name in ("version", "truncation", "padding"):
                pipeline.pop(name, None)
        tables = {
            "pipeline": pipeline,
            "special": self.special_ids,
            "spelled": [data.hex() for data in self.spelled],
        }
        return {"digest": digest(tables), "chat_template": digest(self._own_templates)}

    def vocabulary(self, eos_token_ids: Sequence[int]) -> Vocabulary:
        """The vocabulary for grammars: only tokens that the model can draw.

        Args:
            eos_token_ids: of the model, at least one.
        """
        return Vocabulary(
            tokens=self.spelled[: self._vocab_size],
            special_token_ids=frozenset(i for i in self.special_token_ids if i < self._vocab_size),
            eos_token_ids=tuple(eos_token_ids),
            encode=partial(self._encode, add_special_tokens=False),
        )

    # --- ids to text ------------------------------------------------------------------------------

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids that continue another text, without special tokens.

        Bytes that are not UTF-8 become replacement characters.
        """
        return b"".join(map(self.visible.__getitem__, token_ids)).decode(errors="replace")

    def decode_prompt(self, token_ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids that begin a text, without the space that some tokenizers put before it.

        Args:
            token_ids: of the whole text.
            special: write special tokens by their names.
        """
        table = self.spelled if special else self.visible
        text = b"".join(map(table.__getitem__, token_ids)).decode(errors="replace")
        return text[1:] if self._strips_first_space and text.startswith(" ") else text

    def token_text(self, token_id: int) -> str:
        """One token's spelling; its bytes, written out, if they are not UTF-8 by themselves."""
        data = self.spelled[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spell(
        self, tokens: list[str | None], hidden: set[int], steps: list[dict[str, Any]] | None
    ) -> list[bytes]:
        anchor = self._encode("a", add_special_tokens=False)[-1:] if steps is None else []

        def spell(token_id: int, token: str) -> bytes:
            if token_id in hidden:
                return token.encode()
            if steps is not None:
                return bytes_from_decoder(steps, token)
            return self._text_after(anchor, token_id)

        return [b"" if token is None else spell(i, token) for i, token in enumerate(tokens)]

    def _text_after(self, anchor: list[int], token_id: int) -> bytes:
        alone, both = (
            self._wrapped.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (anchor, [*anchor, token_id])
        )
        return str(both[len(alone) :]).encode()


def _writes_chats(wrapped: Any) -> bool:
    """Whether a tokenizer's class has code of its own for conversations, trusted with the rest."""
    from transformers import PreTrainedTokenizerBase

    own, common = type(wrapped).apply_chat_template, PreTrainedTokenizerBase.apply_chat_template
    return own is not common


def _load(directory: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Loads a directory's tokenizer.

    Returns:
        The wrapper, which knows the special tokens and the chat template, and the pipeline of
        ``tokenizer.json``, which turns text to ids; None if the wrapper has the only one.
    """
    file = directory / _FILE
    own_code = trust_remote_code and "AutoTokenizer" in _auto_map(directory)
    if file.is_file() and not own_code:
        # The generic class. AutoTokenizer chooses a class by the name in tokenizer_config.json or
        # by the type of the model. Such a class builds a pipeline of its own from the vocabulary.
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast.from_pretrained(directory)
        return wrapped, _pipeline(file, wrapped)
    if not own_code and not any(map(_is_vocabulary, directory.iterdir())):
        raise ModelError(
            f"{directory} has no {_FILE} and no other file with a vocabulary; copy the tokenizer's "
            "files there, or name a directory or repository that has them with tokenizer=..."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code), None


def _pipeline(file: Path, wrapped: Any) -> Any:
    """The pipeline of ``tokenizer.json``, and behind it the tokens that only other files add.

    The wrapper's own is another: its class may change normalizer, post-processor and the tokens'
    flags by what ``tokenizer_config.json`` says.
    """
    from tokenizers import Tokenizer as Pipeline

    pipeline = Pipeline.from_file(str(file))
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    for _, token in sorted(wrapped.added_tokens_decoder.items()):
        if token.content not in known:
            add = pipeline.add_special_tokens if token.special else pipeline.add_tokens
            add([token])
    if pipeline.get_vocab() != wrapped.get_vocab():
        raise ModelError(
            f"{file.parent}: tokenizer_config.json gives tokens other ids than {_FILE} has for them"
        )
    return pipeline


def _auto_map(directory: Path) -> Any:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A list is the old form, and stands for AutoTokenizer's.
    found = config.get("auto_map", ())
    return ("AutoTokenizer",) if isinstance(found, list) else found


def _is_vocabulary(path: Path) -> bool:
    return path.suffix in (".model", ".tiktoken") or path.name in _VOCABULARIES
