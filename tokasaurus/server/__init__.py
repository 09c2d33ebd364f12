"""The server room: text and HTTP. It knows requests and their samples, nothing of pages or tensors.

From the inside out::

    params        what a client may ask of sampling
    tokenizer     text to ids, ids to bytes, chat templates
    text          ids to text as they come, and where a stop string ends it
    generation    one prompt and its samples
    core          every generation in flight: messages out, messages in      (no HTTP; the embedded engine too)
    schemas       the JSON that clients send
    render        the JSON that they get
    calls         one HTTP request's generations, and its client's going away
    endpoints     the routes
    app           all of it as an ASGI application
"""
