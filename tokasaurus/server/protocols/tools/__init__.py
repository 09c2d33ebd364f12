"""What a chat answer holds besides text: calls of tools, and reasoning.

``request`` says what a client may ask for and enforces it by a grammar; ``formats`` knows how
models write calls and thoughts; ``parsing`` finds them in a text while it grows, with
``call_reader`` for one call.
"""
