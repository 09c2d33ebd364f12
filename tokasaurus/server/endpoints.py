"""The endpoints under their documented name; they live in ``tokasaurus.server.routes``."""

from tokasaurus.server.routes.generating import Endpoints

__all__ = ["Endpoints"]
