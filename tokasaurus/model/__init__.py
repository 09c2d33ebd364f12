"""The model room: a ``ForwardBatch`` in, a ``ForwardResult`` out.

Owns weights, the paged KV tensors, attention backends and sampling. Knows nothing of requests, text,
scheduling or processes. Importing this package, ``config`` or ``registry`` loads no torch; the other
modules do.
"""

from __future__ import annotations

from tokasaurus.model.architectures.registry import get_model_cls

__all__ = ["get_model_cls"]
