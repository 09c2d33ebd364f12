"""The protocols: shapes of requests and answers. ``table`` has all operations."""
