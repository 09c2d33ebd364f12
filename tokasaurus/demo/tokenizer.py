"""The demo model's tokenizer: byte-level BPE that splits a word alike with and without a space.

In ordinary byte-level BPE, `` toka`` and ``toka`` may split into entirely different pieces. To say
a word back (``Say toka`` -> ``toka``), a model would have to spell it. Here all merges inside words
rank before any merge with a space, so the two differ in their first token only::

    " tokasaur"  ->  Ġ  tok  asa  ur         " the"  ->  Ġthe
     "tokasaur"  ->     tok  asa  ur          "the"  ->   the

A frequent piece has a form that is merged with a leading space. Before a rare piece, the space
takes a token of its own.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tokasaurus.demo.corpus import documents
from tokasaurus.demo.corpus.document import Call, Chat, Document, Message, Text, Tool

BOS, EOS, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (BOS, EOS, END, PAD, *(f"<|{role}|>" for role in ROLES))

VOCAB_SIZE = 2048
NUM_SPACED = 560
"""How many tokens of the vocabulary are a piece that is merged with the space before it."""

MAX_LENGTH = 2048

# Tools stand in the system's turn, calls in the assistant's, and what tools say in the user's: the
# form of Hermes and Qwen, with no instructions around it. Each tool's fields have a fixed order.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set opening = (messages[0]['content'] or '') | trim %}{% set messages = messages[1:] %}"
    "{% endif %}"
    "{{ '<|system|>' + (opening + '\n\n' if opening else '') + '<tools>' }}"
    "{% for tool in tools %}"
    "{% set function = tool['function'] or tool %}"
    "{{ '\n{\"name\": ' + function['name'] | tojson }}"
    "{% if function['description'] %}"
    "{{ ', \"description\": ' + function['description'] | tojson }}"
    "{% endif %}"
    "{{ ', \"parameters\": ' + (function['parameters'] or {}) | tojson + '}' }}"
    "{% endfor %}"
    "{{ '\n</tools><|end|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set content = (message['content'] or '') | trim %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '\n' if not loop.first and loop.previtem['role'] == 'tool' else '<|user|>' }}"
    "{{ '<tool_response>\n' + content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|end|>' }}{% endif %}"
    "{% elif message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>' + content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set arguments = call['function']['arguments'] %}"
    "{{ '\n' if content or not loop.first }}"
    "{{ '<tool_call>\n{\"name\": ' + call['function']['name'] | tojson }}"
    "{{ ', \"arguments\": ' + (arguments if arguments is string else arguments | tojson) }}"
    "{{ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% else %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Each digit is a token. Digits, words and punctuation include one space before them. The rest is
# white space.
_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACE = "Ġ"


def render(document: Document) -> str:
    """The text of a document with special tokens, exactly as the chat template writes it."""
    if isinstance(document, Text):
        return BOS + document.text + (EOS if document.ends else "")
    messages = list(document.messages)
    text = BOS
    if document.tools:
        parts = [messages.pop(0).content.strip()] if messages[0].role == "system" else []
        tools = "".join(f"\n{json.dumps(tool)}" for tool in document.tools)
        text += "<|system|>" + "\n\n".join([*parts, f"<tools>{tools}\n</tools>"]) + END
    return text + "".join(map(_rendered, messages))


def _rendered(message: Message) -> str:
    content = message.content.strip()
    if message.role == "tool":
        return f"<|user|><tool_response>\n{content}\n</tool_response>{END}"
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": call.name, "arguments": call.arguments})
        + "\n</tool_call>"
        for call in message.calls
    ]
    return f"<|{message.role}|>" + "\n".join([content] * bool(content) + calls) + END


def for_template(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them."""
    return [
        {
            "role": message.role,
            "content": message.content,
            **(
                {"tool_calls": [_call_for_template(c) for c in message.calls]}
                if message.calls
                else {}
            ),
        }
        for message in messages
    ]


def _call_for_template(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "function": function}


def tools_for_template(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """Tools as the chat template takes them."""
    return [{"type": "function", "function": tool} for tool in tools]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _content(document: Document) -> Iterable[str]:
    return (
        (m.content for m in document.messages) if isinstance(document, Chat) else (document.text,)
    )


def _count_words(seed: int, num_documents: int) -> tuple[Counter[str], Counter[str]]:
    """Counts the pre-tokens of the corpus without their leading space, and those that had one."""
    split = _pre_tokenizer()
    words: Counter[str] = Counter()
    spaced: Counter[str] = Counter()
    for document in islice(documents(seed), num_documents):
        for text in _content(document):
            for word, _ in split.pre_tokenize_str(text):
                bare = word[1:] if word.startswith(_SPACE) and len(word) > 1 else word
                words[bare] += 1
                if bare != word:
                    spaced[bare] += 1
    return words, spaced


def _train_inside_words(
    words: Counter[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains ordinary BPE on words without spaces.

    Returns:
        Its vocabulary, and its merges in rank order.
    """
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    repeated = (word for word, count in sorted(words.items()) for _ in range(count))
    tokenizer.train_from_iterator(repeated, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _first_pieces(
    vocab: dict[str, int], merges: list[tuple[str, str]], spaced: Counter[str]
) -> Counter[str]:
    """Counts how often each token begins a word that follows a space."""
    model = models.BPE(vocab=vocab, merges=merges)
    firsts: Counter[str] = Counter()
    for word, count in spaced.items():
        firsts[model.tokenize(word)[0].value] += count
    return firsts


def build(seed: int = 0, num_documents: int = 60_000) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the first ``num_documents`` documents of the corpus."""
    words, spaced = _count_words(seed, num_documents)
    vocab, merges = _train_inside_words(words, VOCAB_SIZE - NUM_SPACED)
    firsts = _first_pieces(vocab, merges, spaced)
    for piece, _ in sorted(firsts.items(), key=lambda item: (-item[1], item[0]))[
        : VOCAB_SIZE - len(vocab)
    ]:
        vocab[_SPACE + piece] = len(vocab)
        merges.append((_SPACE, piece))
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=merges)))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Adds splitting, decoding, special tokens, and a BOS in front of every text."""
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes tokenizer.json, and tokenizer_config.json with the chat template inside it.

    It names the class that every release of transformers can load.
    """
    tokenizer.save_pretrained(out, save_jinja_files=False)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for tokenizer.json and tokenizer_config.json",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training corpus")
    arguments = parser.parse_args()
    save(build(arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
