"""Where cartridges come from: local files, W&B runs, repositories, S3 and web servers.

A source finds what it has under an id at present, and fetches it into a directory. It reads no
tensors, and knows neither the store nor the other sources.
"""
