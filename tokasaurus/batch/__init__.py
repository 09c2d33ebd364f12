"""Durable batches: a file of requests, each answered exactly once, even if the process is killed.

From the inside out::

    records     files and batches as clients see them
    lines       one line of an input file, and one of a results file
    store       SQLite and files in one directory: what survives
    disk        errors for clients when the disk fails
    results     the files that a batch ends with
    capacity    how much of the engine all batches may use at once
    recorder    writes answers in groups
    answering   answers the lines of one batch
    validation  checks an input file before any of it runs
    runner      runs unfinished batches
    tables      JSONL and Parquet, for batches without a server
    offline     a batch without a server, from one file to another

Knows nothing of HTTP and engines: the runner is given a function that answers one request.
"""
