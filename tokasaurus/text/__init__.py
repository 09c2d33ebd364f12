"""The text core: tokens to text and back, prompts in flight, fair shares. HTTP, ``LLM`` and batches stand on it.

From the inside out::

    token_bytes        what each id of a vocabulary adds to a text
    tokenizer          text to ids, ids to text, chat templates
    stop_strings       the automaton that finds stop strings
    text_stream        the text of one sample while it grows
    structured_output  what a client asks of an answer's form, as the text of a grammar
    params             what a client may ask of sampling
    preparation        a prompt before it runs: refusals, and what the client left open
    samples            one sample of a prompt
    generation         a prompt in flight: messages out, messages in
    turnstile          a bounded number of sequences pass to the manager, in fair shares
    generations        the table of prompts in flight

Knows nothing of HTTP, pages or tensors: no module here imports a web framework or pydantic.
"""
