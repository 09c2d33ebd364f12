"""The architectures, one short file each, and ``registry``, which names them. ``registry`` loads no torch."""
