"""How a request names a cartridge, and what the store has of one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CartridgeMetadata", "CartridgeSpec", "ModelShape", "StoredCartridge"]


@dataclass(frozen=True)
class CartridgeSpec:
    """A cartridge as a request names it.

    Attributes:
        id: a path or name, a run, a repository, a URL: as its source has it.
        source: "local", "wandb", "huggingface", "s3" or "http".
        force_redownload: look whether the source has another version by now.
    """

    id: str
    source: str = "wandb"
    force_redownload: bool = False


@dataclass(frozen=True)
class ModelShape:
    """What a cartridge must have in common with a model.

    Attributes:
        name: of the model; "" if it is not known.
        rope: a digest of the parameters of its rotary embedding; "" if it is not known.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    name: str = ""
    rope: str = ""


@dataclass(frozen=True)
class CartridgeMetadata:
    """What is in a cartridge's file.

    Attributes:
        digest: SHA-256 of its tensors, in hexadecimal: the identity of a version. It does not
            depend on the layout of the file.
        num_tokens: positions that it takes, of which ``num_frozen`` were not trained.
        shape: of the model that it is for.
        dtype: "BF16", "F16" or "F32".
        num_bytes: of its tensors.
        tokenizer: a digest of the tokenizer; "" if it is not known.
    """

    digest: str
    num_tokens: int
    num_frozen: int
    shape: ModelShape
    dtype: str
    num_bytes: int
    tokenizer: str = ""


@dataclass(frozen=True)
class StoredCartridge:
    """One version of a cartridge on the disk, read and checked whole.

    Attributes:
        path: of its file, which does not change. tokasaurus/cartridge_file.py describes it.
    """

    path: Path
    metadata: CartridgeMetadata
