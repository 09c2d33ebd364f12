"""Benchmarks: ``toka-bench``. None of them needs a GPU, and no other room imports this one."""
