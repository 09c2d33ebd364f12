"""Durable batches: many requests in a file, answered some time, each exactly once, whatever happens meanwhile.

From the inside out::

    records   files and batches as clients see them
    lines     one line of an input file, and of a result
    store     SQLite and files in one directory: what survives
    results   the files that a batch ends with
    capacity  how much of the engine batches may have at once
    recorder  writes answers in groups
    answering the lines of one batch on their way
    runner    answers the lines of unfinished batches
    tables    JSONL and Parquet, for batches without a server
    offline   such a batch, from one file to another

Knows nothing of HTTP and of engines: the runner is given a function that answers one request.
"""
