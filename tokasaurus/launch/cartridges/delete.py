"""``toka-cartridge delete``: lets a running engine forget a cartridge."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.launch.cartridges.engine import SOURCES, asked, path_of
from tokasaurus.scripts.connection import Connection

__all__ = ["SCHEMA", "DeleteConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class DeleteConfig(Connection):
    """What to delete, and where."""

    id: str = flag(help="The name, as toka-cartridge list shows it.")
    source: str = flag("local", choices=SOURCES, help="Of the cartridge.")
    force: bool = flag(
        False, help="Delete it even if requests use it, which finish with what they have."
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=DeleteConfig,
    program="toka-cartridge delete",
    summary="Let a running engine forget a cartridge. A file that it comes from stays.",
    examples=("toka-cartridge delete notes", "toka-cartridge delete me/run source=wandb force=T"),
)


def run(config: DeleteConfig) -> None:
    """Deletes the name.

    Raises:
        EngineError: the engine is not there, has no such cartridge, or requests use it.
    """
    query = {"source": config.source, "force": str(config.force).lower()}
    path = path_of(config.id, query)
    asked(config, lambda client: client.delete(path, cast_to=object))
    print(f"{config.id} is deleted")
