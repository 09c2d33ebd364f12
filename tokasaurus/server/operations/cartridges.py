"""How requests name cartridges: in a field, and in tags of system messages.

A tag is ``<cartridge>{"id": ..., "source": ...}</cartridge>``. Text must not start downloads unless
the engine's owner wants it, so tags are only read with ``cartridge_tags=T``.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from tokasaurus import untrusted_json
from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.errors import RequestError
from tokasaurus.server.operations.strict import StrictSchema, validated

__all__ = ["CartridgeReference", "without_tags"]

_MAX_ID_CHARS = 4096
_OPENING, _CLOSING = "<cartridge>", "</cartridge>"
_TAG = re.compile(f"{_OPENING}(.*?){_CLOSING}", re.DOTALL)
_NEWLINES = re.compile(r"\n{3,}")


class CartridgeReference(StrictSchema):
    """A cartridge, which is a trained KV cache that comes before the prompt."""

    id: Annotated[str, Field(min_length=1, max_length=_MAX_ID_CHARS)]
    """A path or a name, a run, a repository or a URL: as its source has it."""
    source: Literal["local", "wandb", "huggingface", "s3", "http"] | None = None
    """Default ``wandb``."""
    force_redownload: bool | None = None
    """Look whether the source has another version by now. Default false."""

    @property
    def spec(self) -> CartridgeSpec:
        given = {
            "source": self.source,
            "force_redownload": self.force_redownload,
        }
        named = {name: value for name, value in given.items() if value is not None}
        return CartridgeSpec(self.id, **named)  # type: ignore[arg-type]


def without_tags(text: str, where: str) -> tuple[str, list[CartridgeReference]]:
    """Takes the tags out of a text; each ends at the first closing tag.

    Args:
        text: of a system message.
        where: the text is in the request, for errors.

    Returns:
        The text and what its tags name. Where there were tags, three or more newlines become two.

    Raises:
        RequestError: what is in a tag is not a cartridge.
    """
    if _OPENING not in text:
        return text, []
    found = [_reference(each, where) for each in _TAG.findall(text)]
    rest = _TAG.sub("", text)
    if _OPENING in rest:
        raise RequestError(f"{where}: a {_OPENING} tag has no {_CLOSING}", "messages")
    return _NEWLINES.sub("\n\n", rest), found


def _reference(content: str, where: str) -> CartridgeReference:
    try:
        return validated(untrusted_json.decode(content.encode()), CartridgeReference)
    except (ValueError, RecursionError) as error:  # RequestError is a ValueError
        raise RequestError(
            f"{where}: the content of a {_OPENING} tag is not a cartridge such as"
            f' {{"id": "name", "source": "local"}}: {error}',
            "messages",
        ) from None
