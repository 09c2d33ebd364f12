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
from tokasaurus.demo.corpus.document import Chat, Document

BOS, EOS, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (BOS, EOS, END, PAD, *(f"<|{role}|>" for role in ROLES))

VOCAB_SIZE = 2048
NUM_SPACED = 560
"""How many tokens of the vocabulary are a piece that is merged with the space before it."""

MAX_LENGTH = 2048

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Each digit is a token. Digits, words and punctuation include one space before them. The rest is
# white space.
_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACE = "Ġ"


def render(document: Document) -> str:
    """The text of a document with special tokens, exactly as the chat template writes it."""
    if isinstance(document, Chat):
        return BOS + "".join(f"<|{m.role}|>{m.content.strip()}{END}" for m in document.messages)
    return BOS + document.text + (EOS if document.ends else "")


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
