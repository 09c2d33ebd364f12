"""The process that reads one cartridge's file, which may be hostile.

``process`` is its program; ``reading`` starts it. Nothing else imports this package.
"""
