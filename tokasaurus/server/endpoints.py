"""The endpoints, where the architecture notes say: they are in ``tokasaurus.server.routes``."""

from tokasaurus.server.routes.generating import Endpoints

__all__ = ["Endpoints"]
