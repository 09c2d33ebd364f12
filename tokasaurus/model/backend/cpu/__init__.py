"""Attention on the CPU: a kernel that is compiled where a compiler is found."""
