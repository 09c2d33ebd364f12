"""The server room: text and HTTP. It knows requests and their samples, nothing of pages or tensors.

From the inside out::

    params         what a client may ask of sampling
    token_bytes    what each id of a vocabulary adds to a text
    tokenizer      text to ids, ids to text, chat templates
    stop_strings   the automaton that finds stop strings
    text           the text of one sample while it grows
    samples        one sample of a prompt
    generation     the prompts in flight: messages out, messages in; no HTTP, the embedded engine too
    writer         the seam to the shapes of answers: each protocol below has writers of its own
    tasks          one kind of request: from its JSON to prompts that can run and a writer
    native, sglang, embeddings, responses      protocols beside OpenAI's completions and chats
    operations     the table of what can be asked
    answers        from a request to its answer, for connections and for batches
"""
