"""Processes of an engine on other machines.

An *outpost* is a program on another machine. It connects to the supervisor, starts processes that
the supervisor asks for, and passes their lifelines on. The processes do not know that their
supervisor is elsewhere.

::

    supervisor ── lifeline ── outposts ══ link (TCP) ══ outpost ─┬ lifeline ── manager
         └ server                                                └ lifeline ── worker

What starts outposts is not decided here: Ray does, or torchrun.
"""
