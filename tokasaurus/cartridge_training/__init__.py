"""Cartridges by training: conversations about a document, and distillation on them.

Nothing here knows an engine: self-study is given a function that continues prompts.
"""
