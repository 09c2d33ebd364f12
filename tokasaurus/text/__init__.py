"""The text core: tokens to text and back, prompts in flight, fair shares.

HTTP, ``LLM`` and batches stand on it. From the inside out::

    token_bytes        the bytes that each id of a vocabulary adds to a text
    tokenizer          text to ids, ids to text, chat templates
    stop_strings       the automaton that finds stop strings
    text_stream        the text of one sample while it grows
    structured_output  the form that a client asks of an answer, as the text of a grammar
    params             the sampling parameters of a client
    adjustments        what a client asks of single tokens, for the worker
    preparation        a prompt before it runs: refusals, and values for what the client left out
    samples            one sample of a prompt
    generation         a prompt in flight: messages out, messages in
    turnstile          lets a bounded number of sequences pass to the manager, in fair shares
    generations        the table of prompts in flight

It knows nothing of HTTP, pages or tensors, and imports neither a web framework nor pydantic.
"""
