"""The protocols: shapes of requests and answers. ``table`` lists all operations."""
