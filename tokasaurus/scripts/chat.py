"""``toka-chat``: a conversation with a running engine, in a terminal or through a pipe.

Owns the conversation and its few commands. Each line from a pipe is one message, and only the
answers are printed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai

from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.scripts.connection import Connection, connect, explain

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

__all__ = ["ChatConfig", "main"]

_HELP = """\
/help          print this list
/reset         forget the conversation
/system TEXT   instruct the model, and start anew; without TEXT, print the instruction
/exit          end; so does Ctrl-D
Ctrl-C interrupts an answer."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Connection):
    """The engine to talk to, and how it answers."""

    model: str = flag(
        "", help="The model's name; the engine serves one and takes any.", may_be_empty=True
    )
    system: str | None = flag(
        None,
        verbatim=True,
        help="An instruction at the start of the conversation.",
        adapts="no instruction",
    )
    temperature: float | None = flag(
        None, minimum=0, help="0 always takes the most likely token.", adapts="the engine's default"
    )
    max_tokens: int | None = flag(
        None, minimum=1, help="Tokens of an answer, at most.", adapts="the engine's default"
    )

    def __post_init__(self) -> None:
        check_fields(self)


CHAT = Schema(
    target=ChatConfig,
    program="toka-chat",
    summary="Talk to a running engine.",
    examples=("toka-chat", "toka-chat port=8080 system='Answer in one sentence.' temperature=0.7"),
)


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 at the end of the input, 1 if the engine cannot be reached or, in a pipe,
        refuses a message.
    """
    config = parse_or_exit(CHAT, sys.argv[1:] if arguments is None else arguments)
    try:
        client = connect(config)
    except ConfigError as error:
        print(f"{CHAT.program}: error: {error}", file=sys.stderr)
        return 2
    try:
        name = next(iter(client.models.list())).id
    except (openai.OpenAIError, StopIteration) as error:
        reason = explain(error, client) if isinstance(error, openai.OpenAIError) else "no model"
        print(f"{CHAT.program}: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    conversation = Conversation(client, config)
    if sys.stdin.isatty():
        print(f"{name} at {client.base_url.host}:{config.port}. /help lists the commands.")
        return _talk(conversation)
    return _answer_lines(conversation)


def _talk(conversation: Conversation) -> int:
    """Holds the conversation in a terminal; errors are printed, and the user may continue."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and a history
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("  (Ctrl-D or /exit ends)", end="")
            continue
        if line == "/exit":
            return 0
        if line.startswith("/"):
            print(_command(conversation, line))
        elif line:
            _answer(conversation, line)


def _answer_lines(conversation: Conversation) -> int:
    """Holds the conversation through a pipe, up to the first error."""
    for line in map(str.strip, sys.stdin):
        if line == "/exit":
            return 0
        if line.startswith("/"):
            print(_command(conversation, line), file=sys.stderr)
        elif line and not _answer(conversation, line):
            return 1
    return 0


def _command(conversation: Conversation, line: str) -> str:
    """Runs a command; returns what to tell the user."""
    name, _, text = line.partition(" ")
    text = text.strip()
    if name == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    if name == "/system":
        if not text:
            return conversation.system or "There is no instruction."
        conversation.system = text
        conversation.reset()
        return "The instruction is set, and a new conversation begins."
    return _HELP if name == "/help" else f"{name} is not a command.\n{_HELP}"


def _answer(conversation: Conversation, text: str) -> bool:
    """Prints the answer to a message while it comes; False if there was an error."""
    try:
        with contextlib.closing(conversation.say(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("  (interrupted)")
    except openai.OpenAIError as error:
        reason = explain(error, conversation.client)
        print(f"{CHAT.program}: error: {reason}", file=sys.stderr)
        return False
    return True


class Conversation:
    """The messages so far.

    Attributes:
        system: the instruction at the start, if any.
    """

    def __init__(self, client: openai.OpenAI, config: ChatConfig) -> None:
        self.client = client
        self.system = config.system
        self._config = config
        self._messages: list[ChatCompletionMessageParam] = []

    def reset(self) -> None:
        """Forgets everything but the instruction."""
        self._messages.clear()

    def say(self, text: str) -> Generator[str, None, None]:
        """Yields the pieces of the answer; closing the generator ends it.

        An answer that is cut short stays in the conversation, as far as it came. A message without
        any answer is forgotten.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with self._ask() as chunks:
                for chunk in chunks:
                    for choice in chunk.choices:
                        if choice.delta.content:
                            pieces.append(choice.delta.content)
                            yield choice.delta.content
        finally:
            if pieces:
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()

    def _ask(self) -> openai.Stream[ChatCompletionChunk]:
        config = self._config
        messages = list(self._messages)
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        limits = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return self.client.chat.completions.create(
            model=config.model or "default",
            messages=messages,
            stream=True,
            extra_body={key: value for key, value in limits.items() if value is not None},
        )


if __name__ == "__main__":
    sys.exit(main())
