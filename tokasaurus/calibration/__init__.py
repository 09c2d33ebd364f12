"""Measures on this machine the constants of the planner's cost model.

Batches of one kind at a time go through a worker that times its parts: few rows and many, short
contexts and long ones, chunks, groups, and kinds of draws. The constants follow from these times by
least squares. Nothing is learnt from a workload.
"""
