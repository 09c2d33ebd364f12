"""Durable batches: many requests in a file, answered some time, each exactly once, whatever happens meanwhile.

From the inside out::

    records   files and batches as clients see them
    lines     one line of an input file, and of a result
    store     SQLite and files in one directory: what survives
    results   the files that a batch ends with
    capacity  how much of the engine batches may have at once
    runner    answers the lines of unfinished batches

Knows nothing of HTTP and of engines: the runner is given a function that answers one request.
"""
