"""The architectures, and ``registry``, the table of them. Only ``*_model`` files load torch."""
