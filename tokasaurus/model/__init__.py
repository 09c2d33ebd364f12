"""The model room turns a ``ForwardBatch`` into a ``ForwardResult``.

It owns weights, the paged KV tensors, attention backends and sampling. It knows nothing of
requests, text, scheduling or processes. Importing this package, ``config``, ``facts``,
``instruction_sets`` or ``architectures.registry`` loads no torch; the other modules load it.
"""

from __future__ import annotations

from tokasaurus.model.architectures.registry import get_model_cls

__all__ = ["get_model_cls"]
