"""Attention by FlashInfer's kernels. Only ``backend.py`` is imported from elsewhere."""
