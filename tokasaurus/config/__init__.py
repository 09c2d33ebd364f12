"""The user's choices: flags, the key=value command line, config files, and their resolution.

Reads config files, and has no other side effects.
"""
