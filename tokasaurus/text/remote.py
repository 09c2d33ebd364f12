"""The table of prompts of an HTTP process, whose engine is behind the server's process.

It sends its prompts to the server as if that were the manager, and has no limit of its own on what
is in flight: the turnstile and the limit of the queue are the server's; see ``relay``.
"""

from __future__ import annotations

from collections.abc import Callable

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import EngineError, EngineOverloaded, ProtocolError
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FromServer,
    GenerateRequest,
    StopSequence,
)
from tokasaurus.protocol.relaying import (
    EngineNews,
    FromHTTP,
    PrefixAcquired,
    PrefixRefused,
    RequestFailed,
    Submit,
    ToHTTP,
)
from tokasaurus.receipts.weights import StampedFile
from tokasaurus.safetensors_file import FileStamp
from tokasaurus.text.generations import Generations
from tokasaurus.text.numbering import PROCESS_SHIFT
from tokasaurus.text.prefix_relay import RemotePrefixes
from tokasaurus.text.queue_limit import check_queue
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["RemoteGenerations"]

_NO_LIMIT = 1 << 40


class RemoteGenerations(Generations):
    """The prompts of one HTTP process.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        give: gives a message to the server; must not block.
        receipts: of this process.
        number: of this process.

    Attributes:
        prefixes: for requests with cartridges.
    """

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        give: Callable[[FromHTTP], None],
        receipts: Receipts,
        number: int,
    ) -> None:
        super().__init__(
            config, tokenizer, self._submit, receipts=receipts, first_id=number << PROCESS_SHIFT
        )
        self.set_num_seats(_NO_LIMIT)
        self.prefixes = RemotePrefixes(give, number)
        self._give = give
        self._news = EngineNews(0, {})
        self._needs_room = True

    def check_room(self, client: str) -> None:
        """Checks that there is room, as far as is known here. The server checks again.

        Raises:
            EngineOverloaded: there is no room.
        """
        self._needs_room = True
        news, num_of_client = self._news, self.num_of(client)
        # The client may have more prompts elsewhere. Then the server refuses the request.
        check_queue(
            self.config.max_queued_requests,
            num_prompts=news.num_prompts + self._num_expected,
            num_clients=news.num_clients,
            num_of_client=num_of_client,
            retry_after_s=lambda: news.retry_after_s,
        )

    def take(self, message: ToHTTP) -> None:
        """Takes a message of the server."""
        if isinstance(message, EngineNews):
            self._follow(message)
        elif isinstance(message, PrefixAcquired | PrefixRefused):
            self.prefixes.take(message)
        elif isinstance(message, RequestFailed):
            error = EngineError(message.reason)
            if message.retry_after_s is not None:
                error = EngineOverloaded(message.reason, message.retry_after_s)
            self.fail(message.request_id, error)
        else:
            self.absorb(message)

    def _submit(self, message: FromServer) -> None:
        if isinstance(message, GenerateRequest):
            generation = self.find(message.request_id)
            names = () if generation is None else tuple(generation.names)
            # Of a request with several prompts, the first one decides.
            needs_room, self._needs_room = self._needs_room, False
            self._give(Submit(message, names, needs_room))
        elif isinstance(message, AbortRequest | StopSequence | Acknowledge):
            self._give(message)
        else:
            raise ProtocolError(f"an HTTP process sends no {type(message).__name__}")

    def _follow(self, news: EngineNews) -> None:
        self._news = news
        self.commands.weights.follow(news.weights_version, news.labels)
        if self._receipts is None:
            return
        if news.workers is not None:
            self._receipts.adopt(news.workers)
        for update in news.updates:
            files = [
                StampedFile(each.path, FileStamp(each.num_bytes, each.modified_ns))
                for each in update.files
            ]
            self._receipts.note_stamped(update.version, files)
