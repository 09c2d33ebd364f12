"""The manager: which sequence runs when, where its KV lies, when it ends.

A pure state machine: events in, actions out. Knows token ids and page numbers; nothing of text,
HTTP, tensors, sockets or the clock.
"""
