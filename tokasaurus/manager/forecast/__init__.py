"""The use of pages at every coming step: lengths, the curve of use, admission by it, ETA."""
