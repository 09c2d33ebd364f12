"""``toka-bench quantization``: what 8 bits change: perplexity and greedy answers.

    toka-bench quantization                              the bundled model
    toka-bench quantization model=DIR text=FILE          any model, on a text of yours

Runs the embedded engine in each dtype, as usual and with each change, one after the other. Each is
compared with the first, in which nothing has 8 bits.

============  ====================================================================================
int8          quantization=int8
fp8           quantization=fp8
kv_cache_fp8  kv_cache_dtype=fp8, with attention=reference
============  ====================================================================================

==========================  ====================================================================
perplexity                  of the texts: e to the power of the mean loss of their tokens
same top token              positions of the texts where the same token is the most likely one
same greedy tokens          tokens of greedy continuations that are equal, position by position
same continuations          continuations that are equal as a whole
first difference            the mean position of the first token that differs
==========================  ====================================================================

The texts are parts of a file; without one, passages about invented names with a question and its
answer, which are no training documents of the bundled model. With random weights only the
difference between the rows means anything: the perplexity is about the size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError, RequestError
from tokasaurus.text.params import SamplingParams

if TYPE_CHECKING:
    from tokasaurus.launch.llm import LLM
    from tokasaurus.launch.outputs import RequestOutput
    from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["SCHEMA", "QuantizationConfig", "run"]

_DTYPES = ("float32", "bfloat16")

# The flags of each.
_CHANGES: Mapping[str, Mapping[str, str]] = {
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "kv_cache_fp8": {"kv_cache_dtype": "fp8", "attention": "reference"},
}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What to compare."""

    model: str | None = flag(
        None, help="The directory of the model.", adapts="the small bundled model"
    )
    text: str | None = flag(
        None, help="A file of text in UTF-8.", adapts="passages with questions and answers"
    )
    dtypes: tuple[str, ...] = flag(
        _DTYPES, choices=_DTYPES, help="Of the activations; the first one's model is the measure."
    )
    changes: tuple[str, ...] = flag(
        tuple(_CHANGES), choices=tuple(_CHANGES), help="What has 8 bits, one at a time."
    )
    num_texts: int = flag(64, minimum=1, help="The most parts of the text, or passages.")
    text_tokens: int = flag(256, minimum=2, help="Tokens of a part of the file.")
    max_tokens: int = flag(64, minimum=1, help="Tokens of each greedy continuation.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.dtypes:
            raise ConfigError(f"dtypes: expected one or both of {', '.join(_DTYPES)}")


SCHEMA = Schema(
    target=QuantizationConfig,
    program="toka-bench quantization",
    summary="What 8 bits change: perplexity and greedy answers.",
    examples=(
        "toka-bench quantization",
        "toka-bench quantization model=DIR text=FILE dtypes=bfloat16",
    ),
)


@dataclass(frozen=True)
class _Sample:
    """A text, and how many of its tokens greedy decoding continues."""

    ids: list[int]
    num_prompt: int


@dataclass(frozen=True)
class _Answers:
    """What an engine says about the samples."""

    perplexity: float
    # Of all positions of all texts.
    top_ids: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class _Row:
    """A line of the table. Shares are of 1."""

    engine: str
    perplexity: float
    perplexity_ratio: float
    same_top_token: float
    same_greedy_tokens: float
    same_continuations: float
    first_difference: float


def run(config: QuantizationConfig) -> None:
    """Measures and prints the results."""
    rows: list[_Row] = []
    samples: list[_Sample] = []
    measure: _Answers | None = None
    for dtype in config.dtypes:
        for change in (None, *config.changes):
            name = dtype if change is None else f"{dtype}, {change}"
            progress(f"{name}: loading")
            with _start(config, dtype, {} if change is None else _CHANGES[change]) as llm:
                samples = samples or _samples(config, llm.get_tokenizer())
                answers = _answer(config, llm, samples, name)
            measure = measure or answers
            rows.append(_compare(name, answers, measure))
    print(_table(rows))
    num_tokens = sum(len(sample.ids) for sample in samples)
    print_json(
        {"texts": len(samples), "text_tokens": num_tokens, "rows": [asdict(row) for row in rows]}
    )


def _start(config: QuantizationConfig, dtype: str, flags: Mapping[str, str]) -> LLM:
    from tokasaurus.launch.llm import LLM  # imports torch, which --help does not need

    # A small cache: the command may run beside an engine.
    return LLM(
        config.model,
        dtype=dtype,
        device="cpu",
        kv_cache_num_tokens=16384,
        max_seqs_per_forward=64,
        max_tokens_per_forward=1024,
        **flags,
    )


# --- the texts ------------------------------------------------------------------------------------


def _samples(config: QuantizationConfig, tokenizer: Tokenizer) -> list[_Sample]:
    if config.text is not None:
        samples = list(_parts(config, config.text, tokenizer))
    else:
        samples = [_passage(Random(number), tokenizer) for number in range(config.num_texts)]
    if not samples:
        raise ConfigError(f"text={config.text}: it has less than {config.text_tokens} tokens")
    return samples


def _parts(config: QuantizationConfig, path: str, tokenizer: Tokenizer) -> Iterator[_Sample]:
    """Whole parts from the beginning of a file. The first half of each is the prompt."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={path}: {error}") from None
    size = config.text_tokens
    ids = tokenizer.encode(text)
    for start in range(0, min(len(ids) - size + 1, size * config.num_texts), size):
        yield _Sample(ids[start : start + size], size // 2)


def _passage(random: Random, tokenizer: Tokenizer) -> _Sample:
    """A passage, a question about it and the answer: in the words of the chat template, if any."""
    from tokasaurus.demo.corpus import passages

    item = passages.passage(random, num_subjects=2, num_facts=4, held_out=True)
    question, answer = passages.ask(random, random.choice(item.facts))
    asked = passages.frame(random, item.text, question)
    messages = [{"role": "user", "content": asked}]
    try:
        prompt = tokenizer.render_chat(messages)
    except RequestError:  # there is no template
        prompt = tokenizer.encode(f"{asked}\n")
    return _Sample([*prompt, *tokenizer.encode_fragment(answer)], len(prompt))


# --- the comparison -------------------------------------------------------------------------------


def _answer(
    config: QuantizationConfig, llm: LLM, samples: Sequence[_Sample], name: str
) -> _Answers:
    progress(f"{name}: scoring {len(samples)} texts")
    scoring = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=1)
    scored = llm.generate([sample.ids for sample in samples], scoring, use_tqdm=False)
    progress(f"{name}: continuing them")
    greedy = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, ignore_eos=True)
    prompts = [sample.ids[: sample.num_prompt] for sample in samples]
    continued = llm.generate(prompts, greedy, use_tqdm=False)
    positions = [position for output in scored for position in _positions(output)]
    loss = -sum(logprob for logprob, _ in positions) / len(positions)
    return _Answers(
        math.exp(loss),
        [top_id for _, top_id in positions],
        [list(output.outputs[0].token_ids) for output in continued],
    )


def _positions(output: RequestOutput) -> Iterator[tuple[float, int]]:
    """The logprob of each token of a text but the first, and the most likely token there."""
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    for token_id, logprobs in pairs:
        if logprobs is not None:
            top_id = max(logprobs, key=lambda each: logprobs[each].logprob)
            yield logprobs[token_id].logprob, top_id


def _compare(name: str, answers: _Answers, measure: _Answers) -> _Row:
    pairs = list(zip(answers.continuations, measure.continuations, strict=True))
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return _Row(
        name,
        answers.perplexity,
        answers.perplexity / measure.perplexity,
        _share(a == b for a, b in zip(answers.top_ids, measure.top_ids, strict=True)),
        _share(each for row in same for each in row),
        _share(all(row) for row in same),
        sum([*row, False].index(False) for row in same) / len(same),
    )


def _share(flags: Iterator[bool]) -> float:
    found = list(flags)
    return sum(found) / len(found)


def _table(rows: Sequence[_Row]) -> str:
    heads = (
        "engine",
        "perplexity",
        "times the first",
        "same top token",
        "same greedy tokens",
        "same continuations",
        "first difference",
    )
    return markdown_table(
        heads,
        [
            (
                row.engine,
                f"{row.perplexity:,.4f}",
                f"{row.perplexity_ratio:.4f}",
                f"{row.same_top_token:.1%}",
                f"{row.same_greedy_tokens:.1%}",
                f"{row.same_continuations:.1%}",
                f"{row.first_difference:.1f}",
            )
            for row in rows
        ],
    )
