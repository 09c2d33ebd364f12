"""``toka-ping``: sends one prompt to a running engine and prints what comes back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import openai

from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.scripts.connection import Connection, connect, explain

__all__ = ["PingConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class PingConfig(Connection):
    """What to ask, and which engine."""

    prompt: str = flag(help="The text to continue or, with chat=T, to answer.", verbatim=True)
    model: str = flag(
        "", help="The model's name; the engine serves one and takes any.", may_be_empty=True
    )
    chat: bool = flag(False, help="Send the prompt as a chat message.")
    max_tokens: int = flag(100, minimum=1, help="Tokens to generate, at most.")
    n: int = flag(1, minimum=1, help="Samples.")
    temperature: float = flag(0.0, minimum=0, help="0 always takes the most likely token.")
    hide: bool = flag(False, help="Print only the time that it took, without the text.")
    retries: int = flag(0, minimum=0, help="How many times to try again after a failure.")
    stream: bool = flag(False, help="Print the text of the first sample as it arrives.")

    def __post_init__(self) -> None:
        check_fields(self)


PING = Schema(
    target=PingConfig,
    program="toka-ping",
    summary="Send one prompt to a running engine.",
    examples=(
        "toka-ping prompt='Once upon a time' n=3 temperature=1.0",
        "toka-ping prompt='tell me a joke' max_tokens=256 chat=True",
    ),
)


@dataclass(frozen=True)
class _Piece:
    """Some text of one sample."""

    index: int
    text: str


@dataclass(frozen=True)
class _Usage:
    """The number of generated tokens, at the end."""

    num_tokens: int


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0, or 1 if the engine cannot be reached or refuses.
    """
    config = parse_or_exit(PING, sys.argv[1:] if arguments is None else arguments)
    try:
        client = connect(config, config.retries)
    except ConfigError as error:
        print(f"{PING.program}: error: {error}", file=sys.stderr)
        return 2
    try:
        _ping(client, config)
    except openai.OpenAIError as error:
        print(f"{PING.program}: error: {explain(error, client)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _ping(client: openai.OpenAI, config: PingConfig) -> None:
    started = time.perf_counter()
    texts = [""] * config.n
    num_tokens = 0
    live = config.stream and not config.hide  # the first sample is printed while it comes
    for event in _events(client, config):
        if isinstance(event, _Usage):
            num_tokens = event.num_tokens
        else:
            texts[event.index] += event.text
            if live and event.index == 0:
                print(event.text, end="", flush=True)
    elapsed_s = time.perf_counter() - started
    if live:
        print()
    if not config.hide:
        _print_samples(texts, first=1 if live else 0)
    samples = f"{config.n} samples, " if config.n > 1 else ""
    rate = f", {num_tokens / elapsed_s:.1f} tokens/s" if elapsed_s > 0 else ""
    print(f"[{samples}{num_tokens} tokens in {elapsed_s:.2f} s{rate}]", file=sys.stderr)


def _print_samples(texts: list[str], first: int) -> None:
    for index in range(first, len(texts)):
        if len(texts) > 1:
            print(f"--- sample {index}")
        print(texts[index])


def _events(client: openai.OpenAI, config: PingConfig) -> Iterator[_Piece | _Usage]:
    if config.chat:
        return _stream_chat(client, config) if config.stream else _chat(client, config)
    return _stream_text(client, config) if config.stream else _text(client, config)


def _text(client: openai.OpenAI, config: PingConfig) -> Iterator[_Piece | _Usage]:
    answer = client.completions.create(
        model=config.model or "default",
        prompt=config.prompt,
        max_tokens=config.max_tokens,
        n=config.n,
        temperature=config.temperature,
    )
    for choice in answer.choices:
        yield _Piece(choice.index, choice.text)
    if answer.usage is not None:
        yield _Usage(answer.usage.completion_tokens)


def _stream_text(client: openai.OpenAI, config: PingConfig) -> Iterator[_Piece | _Usage]:
    chunks = client.completions.create(
        model=config.model or "default",
        prompt=config.prompt,
        max_tokens=config.max_tokens,
        n=config.n,
        temperature=config.temperature,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            yield _Piece(choice.index, choice.text)
        if chunk.usage is not None:
            yield _Usage(chunk.usage.completion_tokens)


def _chat(client: openai.OpenAI, config: PingConfig) -> Iterator[_Piece | _Usage]:
    answer = client.chat.completions.create(
        model=config.model or "default",
        messages=[{"role": "user", "content": config.prompt}],
        max_tokens=config.max_tokens,
        n=config.n,
        temperature=config.temperature,
    )
    for choice in answer.choices:
        yield _Piece(choice.index, choice.message.content or "")
    if answer.usage is not None:
        yield _Usage(answer.usage.completion_tokens)


def _stream_chat(client: openai.OpenAI, config: PingConfig) -> Iterator[_Piece | _Usage]:
    chunks = client.chat.completions.create(
        model=config.model or "default",
        messages=[{"role": "user", "content": config.prompt}],
        max_tokens=config.max_tokens,
        n=config.n,
        temperature=config.temperature,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            yield _Piece(choice.index, choice.delta.content or "")
        if chunk.usage is not None:
            yield _Usage(chunk.usage.completion_tokens)


if __name__ == "__main__":
    sys.exit(main())
