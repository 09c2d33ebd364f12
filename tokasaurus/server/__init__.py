"""The server room: HTTP. It knows requests and their samples, and nothing of pages or tensors.

It stands on the text core, ``tokasaurus.text``. From the inside out::

    errors        what an error is to a client
    metrics       what monitoring is told
    state         whether the engine can serve
    operations/   what a client can ask for: schemas, fields, how a request is carried out
    protocols/    the shapes of requests and answers, and the table of all operations
    http/         what HTTP needs: bodies, answers, event streams, keys, request ids
    routes/       the routes: the operations, and what the engine says of itself
    app           joins them into one ASGI application

``http`` and ``operations`` do not know each other; the routes join them.
"""
