"""Clients of a running engine. None of them imports torch."""
