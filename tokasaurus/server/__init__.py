"""The server room: HTTP. It knows requests and their samples, nothing of pages or tensors.

Stands on the text core, ``tokasaurus.text``. From the inside out::

    operations/   what a client can ask for: schemas, fields, how a request is carried out
    protocols/    the shapes of requests and answers, and the table of all operations
    http/         what HTTP needs: errors, bodies, keys, request ids
    routes/       the routes: what generates, and what the engine says of itself
    state         whether the engine can serve
    app           joins them into one ASGI application
"""
