"""Receipts: what an answer followed from, in a form that another engine can check.

Owns the form of a receipt, its digests, and what differs between two of them. Knows JSON and files
of tensors; knows no engine.
"""
