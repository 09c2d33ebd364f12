"""Ours against other engines, side by side on this machine."""

from tokasaurus.bench.peers.command import SCHEMA, PeersConfig, run

__all__ = ["SCHEMA", "PeersConfig", "run"]
