"""The server room: HTTP. It knows requests and their samples, nothing of pages or tensors.

From the inside out::

    writer         the seam to the shapes of answers: each protocol below has writers of its own
    tasks          one kind of request: from its JSON to prompts that can run and a writer
    native, sglang, embeddings, responses      protocols beside OpenAI's completions and chats
    operations     the table of what can be asked
    answers        from a request to its answer, for connections and for batches

Stands on the text core, ``tokasaurus.text``.
"""
