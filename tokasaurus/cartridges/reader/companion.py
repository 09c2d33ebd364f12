"""The ``config.yaml`` that trainers write beside a cartridge: which model it is for. No torch.

::

    model:
      pretrained_model_name_or_path: meta-llama/Llama-3.2-3B-Instruct
    kv_cache_initializer:
      max_tokens: 2048        an upper bound; the tensors say how many there are

Weights & Biases puts every value below ``value``. Tags such as ``!!python/tuple`` are passed over:
what they are on is read as plain YAML.
"""

from __future__ import annotations

import os
from typing import Any

import yaml

from tokasaurus.cartridges.contents import Refusal, quoted

__all__ = ["read_companion"]

_MAX_BYTES = 1 << 20
_MAX_KEYS = 10_000
_MAX_NAME_LENGTH = 512


class _Loader(yaml.SafeLoader):
    """Makes plain values only, whatever the tags say."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._num_keys = 0  # of all mappings

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges ``<<``, so that a few lines can be many keys; with old releases, they double."""
        super().flatten_mapping(node)
        self._num_keys += len(node.value)
        if self._num_keys > _MAX_KEYS:
            raise yaml.YAMLError(f"its mappings have more than {_MAX_KEYS} keys")


def _plain(loader: _Loader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("", _plain)


def read_companion(descriptor: int) -> str:
    """The name of the model; "" if the file does not say.

    Raises:
        Refusal: it is no YAML file with keys and values.
    """
    with os.fdopen(os.dup(descriptor), "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise Refusal(f"its config.yaml is larger than {_MAX_BYTES} bytes")
    try:
        fields = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = quoted(str(error).partition("\n")[0] or type(error).__name__)
        raise Refusal(
            f"its config.yaml cannot be read ({reason}); correct it, or remove it"
        ) from None
    if fields is None:
        return ""
    if not isinstance(fields, dict):
        raise Refusal("its config.yaml has no keys and values; correct it, or remove it")
    model = _unwrapped(fields.get("model"))
    if not isinstance(model, dict):
        return ""
    name = _unwrapped(model.get("pretrained_model_name_or_path"))
    if name is None:
        return ""
    if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise Refusal(
            f"its config.yaml says model.pretrained_model_name_or_path: {quoted(name)}, which is "
            "no model's name"
        )
    return name


def _unwrapped(value: Any) -> Any:
    """A value without the ``value`` that Weights & Biases puts around it."""
    if isinstance(value, dict) and "value" in value:
        return value["value"]
    return value
