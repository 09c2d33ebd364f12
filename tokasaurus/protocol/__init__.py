"""What the rooms share: frozen messages, their wire encoding, and channels between processes.

Knows nothing of text, HTTP, scheduling or tensors. Imports msgspec, numpy and pyzmq only.
"""
