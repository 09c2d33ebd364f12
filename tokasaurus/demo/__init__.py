"""The bundled demo model: where its files lie. Everything that makes them is in the sibling modules.

Importing this package imports nothing heavy; ``corpus``, ``tokenizer``, ``train`` and ``evaluate``
need the training dependencies and are only run by hand.
"""

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR = Path(__file__).parent / "model"
