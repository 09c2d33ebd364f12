"""Kernels in Triton, for CUDA. Only ``backend.py`` is imported from elsewhere, without Triton."""
