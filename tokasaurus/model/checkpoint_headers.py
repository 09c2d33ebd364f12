"""What the headers of a checkpoint's files say, before a tensor is read. No torch.

Owns the names that some checkpoints have for the usual tensors, and the comparison of the sizes in
``config.json`` with the shapes in the files.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.errors import ModelError
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.json_fields import JsonFields
from tokasaurus.safetensors_file import SafetensorsFile

__all__ = ["EMBEDDING", "HEAD", "CheckpointHeaders", "check_sizes", "heads_differ", "usual_names"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class CheckpointHeaders:
    """What the headers of a checkpoint say.

    Attributes:
        shapes: of all tensors, by their usual names.
        has_prefix: the names in the files are the usual ones. A model without its head is often
            saved without the prefix "model."; such models embed texts.
        heads_differ: there are an embedding and a head, and they are not copies.
        dtype: of most numbers, in the words of the format, such as "BF16"; None without numbers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    has_prefix: bool
    heads_differ: bool
    dtype: str | None

    @classmethod
    def read(cls, directory: Path) -> CheckpointHeaders | None:
        """Reads the headers; None if files are missing or damaged, which the loader reports."""
        with contextlib.ExitStack() as opened:
            try:
                paths = checkpoint_files(directory)
                files = [opened.enter_context(SafetensorsFile(path)) for path in paths]
            except ModelError:
                return None
            owners = {name: file for file in files for name in file.tensors}
            names = usual_names(owners)
            return cls(
                {usual: owners[name].tensors[name].shape for name, usual in names.items()},
                all(name == usual for name, usual in names.items()),
                heads_differ(files),
                _commonest_dtype(files),
            )


def usual_names(names: Collection[str]) -> dict[str, str]:
    """The usual name of each tensor: with the prefix "model.", unless it is the head's."""
    has_prefix = "embed_tokens.weight" not in names
    return {
        name: name if has_prefix or name.startswith("lm_head.") else f"model.{name}"
        for name in names
    }


def _commonest_dtype(files: Collection[SafetensorsFile]) -> str | None:
    counts: Counter[str] = Counter()
    for file in files:
        for entry in file.tensors.values():
            counts[entry.dtype] += prod(entry.shape)
    return counts.most_common(1)[0][0] if counts else None


def heads_differ(files: Collection[SafetensorsFile]) -> bool:
    """Whether files have an embedding and a head that are not copies of each other.

    Rows that only one of them has are padding.
    """
    owners = {name: file for file in files for name in file.tensors}
    found = {usual: name for name, usual in usual_names(owners).items()}
    if EMBEDDING not in found or HEAD not in found:
        return False
    one, other = owners[found[EMBEDDING]], owners[found[HEAD]]
    embedding, head = one.tensors[found[EMBEDDING]], other.tensors[found[HEAD]]
    if (embedding.dtype, embedding.shape[1:]) != (head.dtype, head.shape[1:]):
        return True
    return not one.has_equal_bytes(embedding, other, head)


def check_sizes(
    fields: JsonFields, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares the sizes of ``config.json`` with the tensors, as far as they are there.

    Raises:
        ModelError: names the field and the tensor.
    """
    embedding = EMBEDDING if EMBEDDING in shapes else HEAD
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = "model.layers.0"
    rows = (
        ("hidden_size", config.hidden_size, embedding, 1),
        ("vocab_size", config.vocab_size, embedding, 0),
        ("intermediate_size", config.intermediate_size, f"{layer}.mlp.gate_proj.weight", 0),
        ("num_attention_heads", queries, f"{layer}.self_attn.q_proj.weight", 0),
        ("num_key_value_heads", keys, f"{layer}.self_attn.k_proj.weight", 0),
    )
    for name, size, tensor, dimension in rows:
        shape = shapes.get(tensor, ())
        # Rows beyond the vocabulary are padding.
        is_padded = name == "vocab_size" and len(shape) == 2 and shape[0] > size
        if len(shape) == 2 and shape[dimension] != size and not is_padded:
            needed = "" if fields.raw(name) == size else f", which with head_dim makes {size} rows"
            raise fields.error(
                name,
                f"is {fields.raw(name)}{needed}, but tensor {tensor} has shape {list(shape)}; "
                f"the config.json or the weights are another model's",
            )
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if layers and config.num_layers != max(layers) + 1:
        raise fields.error(
            "num_hidden_layers",
            f"is {config.num_layers}, but the weights have {max(layers) + 1} layers; "
            "the config.json or the weights are another model's",
        )
