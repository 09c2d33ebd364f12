"""The words that the rooms share: frozen messages, their wire encoding, the channels between processes.

Knows nothing of text, HTTP, scheduling or tensors. Imports msgspec, numpy and pyzmq only.
"""
