"""``POST /generate`` in the words of SGLang."""
