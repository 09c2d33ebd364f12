"""The place of the bundled demo model. The sibling modules make its files.

Importing this package imports nothing heavy. ``corpus``, ``tokenizer``, ``train`` and ``evaluate``
are run by hand.
"""

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR = Path(__file__).parent / "model"
