"""Attention on the processor: a plain-torch reference, and a compiled kernel where a compiler is found."""
