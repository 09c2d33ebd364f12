"""Cartridges: trained KV caches that stand for long texts; their sources, checks and store.

Nothing here knows an engine. Files of others are read in a process of their own.
"""
