"""A trainer's end of weight updates: sends its tensors to engines that run.

from tokasaurus.integrations.trainer import BucketSender

with BucketSender("http://127.0.0.1:10210") as sender:
    sender.send(model.state_dict(), label=f"step-{step}")
"""

from __future__ import annotations

from tokasaurus.integrations.trainer.broadcast import BroadcastSender
from tokasaurus.integrations.trainer.buckets import BucketSender
from tokasaurus.integrations.trainer.sender import NamedTensors, WeightsSender

__all__ = ["BroadcastSender", "BucketSender", "NamedTensors", "WeightsSender"]
