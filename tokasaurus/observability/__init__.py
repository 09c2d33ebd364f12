"""Logging, one stream per process. Knows none of the rooms."""
