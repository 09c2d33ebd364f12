"""Engines on a Ray cluster. Importing this package does not import Ray, which is an extra."""
