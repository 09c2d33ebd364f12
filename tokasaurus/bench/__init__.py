"""Benchmarks that anybody can run: ``toka-bench``. None needs a GPU, and nothing imports this room."""
