"""Finds good flags for a workload on the machine at hand, by short runs of real engines.

``coordinates`` decides what to try next, and knows no engine. ``trial`` is the program that runs
one engine, ``trial_process`` its owner. ``trial_log`` remembers what was measured, ``tuned_file``
writes what ``config=`` reads.
"""
