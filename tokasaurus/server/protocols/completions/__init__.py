"""``POST /v1/completions``, as OpenAI's clients use it."""
