"""Scores the demo model on items that no training document contains.

    python -m tokasaurus.demo.evaluate --model DIR --json scores.json

Owns the evaluation items and how each is judged. transformers generates in single precision, so
that the scores are those of the weights alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus import arithmetic, calculator, copying, dinosaurs, passages, tool_table
from tokasaurus.demo.corpus.chat_table import JOKE_REQUESTS, JOKES
from tokasaurus.demo.corpus.dinosaur_table import DINOSAURS
from tokasaurus.demo.corpus.document import Call, Message, Tool, exchange
from tokasaurus.demo.corpus.words import HELD_OUT_WORDS, invent_name, invent_word
from tokasaurus.demo.tokenizer import for_template, tools_for_template

BATCH = 64


@dataclass(frozen=True)
class Case:
    """A prompt, which is a conversation or plain text, and the judge of its completion."""

    prompt: tuple[Message, ...] | str
    is_right: Callable[[str], bool]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Score:
    family: str
    right: float
    num_cases: int
    note: str = ""


def ask(question: str, is_right: Callable[[str], bool]) -> Case:
    return Case((Message("user", question),), is_right)


def says(expected: str) -> Callable[[str], bool]:
    return lambda reply: reply.strip().rstrip(".") == expected


def contains(expected: str) -> Callable[[str], bool]:
    return lambda reply: expected.lower() in reply.lower()


def begins(expected: str) -> Callable[[str], bool]:
    return lambda reply: reply.strip().startswith(expected)


def answers(number: int) -> Callable[[str], bool]:
    return lambda reply: reply.strip().endswith(f"Answer: {number}")


class Generator:
    """Completes prompts in batches, greedily or by sampling."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Generator:
        return cls(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
        )

    def encode(self, prompt: tuple[Message, ...] | str, tools: tuple[Tool, ...] = ()) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            for_template(prompt),
            tools=tools_for_template(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def complete(
        self, prompts: Sequence[list[int]], max_tokens: int, temperature: float = 0.0
    ) -> list[str]:
        """The replies in the order of the prompts, cut at the end-of-turn token."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies = [""] * len(prompts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = self._batch([prompts[i] for i in chosen], max_tokens, temperature)
            for i, reply in zip(chosen, batch, strict=True):
                replies[i] = reply
        return replies

    def _batch(self, prompts: list[list[int]], max_tokens: int, temperature: float) -> list[str]:
        inputs = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False, "temperature": None}
        )
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
        new = output[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def judge(self, cases: Sequence[Case], max_tokens: int) -> list[bool]:
        prompts = [self.encode(case.prompt, case.tools) for case in cases]
        replies = self.complete(prompts, max_tokens)
        return [case.is_right(reply) for case, reply in zip(cases, replies, strict=True)]


# --- the families ------------------------------------------------------------------------------


def _unseen_words(rng: Random, count: int) -> list[str]:
    return [invent_word(rng, held_out=True) for _ in range(count)]


def _pattern(rng: Random, unit: list[str], most_periods: int) -> tuple[str, str]:
    """A pattern that is cut anywhere after its second period, and its continuation."""
    size = len(unit)
    return copying.pattern_question(unit, rng.randint(2 * size, most_periods * size))


def echo_invented(rng: Random) -> list[Case]:
    words = _unseen_words(rng, 128)
    return [ask(copying.say_prompt(rng, word), says(word)) for word in words]


def echo_real(rng: Random) -> list[Case]:
    return [
        ask(f"{start} the word {word}{end}", says(word))
        for word in sorted(HELD_OUT_WORDS)
        for start in ("Reply with", "reply with", "Please say")
        for end in ("", ".")
    ]


def pattern_chat(rng: Random) -> list[Case]:
    cases = []
    for _ in range(96):
        given, answer = _pattern(rng, _unseen_words(rng, rng.randint(2, 5)), 4)
        cases.append(ask(f"Continue the pattern: {given}", begins(answer)))
    return cases


def pattern_letters_in_chat(*, whole: bool) -> Callable[[Random], list[Case]]:
    """Two to four letters, shown for three whole cycles, or cut after two to four."""

    def cases(rng: Random) -> list[Case]:
        made = []
        for _ in range(96):
            unit = rng.sample(string.ascii_uppercase, rng.randint(2, 4))
            given, answer = (
                copying.pattern_question(unit, 3 * len(unit)) if whole else _pattern(rng, unit, 4)
            )
            made.append(ask(f"Continue the pattern: {given}", begins(answer)))
        return made

    return cases


def pattern_letters(rng: Random) -> list[Case]:
    """A few letters repeated as plain text, not chat."""
    cases = []
    for _ in range(96):
        given, answer = _pattern(rng, rng.sample(string.ascii_uppercase, rng.randint(2, 6)), 6)
        cases.append(Case(given, begins(answer)))
    return cases


def pattern_text(rng: Random) -> list[Case]:
    cases = []
    for _ in range(96):
        given, answer = _pattern(rng, _unseen_words(rng, rng.randint(3, 8)), 4)
        cases.append(Case(given, begins(answer)))
    return cases


def passage_of(num_subjects: int) -> Callable[[Random], list[Case]]:
    def cases(rng: Random) -> list[Case]:
        made = []
        for _ in range(96):
            item = passages.passage(rng, num_subjects=num_subjects, num_facts=4, held_out=True)
            fact = rng.choice(item.facts)
            question, _ = passages.ask(rng, fact)
            made.append(ask(passages.frame(rng, item.text, question), contains(fact.value)))
        return made

    return cases


def memory(rng: Random) -> list[Case]:
    cases = []
    for _ in range(64):
        name = invent_name(rng, held_out=True)
        before = exchange(f"My name is {name}.", f"Hello {name}! Nice to meet you.")
        cases.append(Case((*before, Message("user", "What is my name?")), contains(name)))
    return cases


def dinosaur_wordings(rng: Random) -> list[Case]:
    return [
        ask(question.format(d=d), contains(topic.key.format(d=d).strip()))
        for d in DINOSAURS
        for topic in dinosaurs.TOPICS
        for question in dinosaurs.questions(d, topic, held_out=True)
    ]


def jokes(rng: Random) -> list[Case]:
    requests = sorted(
        {request.lower().rstrip(".?!") for request in JOKE_REQUESTS} | set(JOKE_REQUESTS)
    )
    return [ask(request, lambda reply: reply.strip() in JOKES) for request in requests]


def problems(rng: Random) -> list[arithmetic.Problem]:
    return [arithmetic.problem(rng, held_out=True) for _ in range(240)]


def arithmetic_cases(rng: Random) -> list[Case]:
    return [ask(p.question, answers(p.answer)) for p in problems(rng)]


def long_passage(num_tokens: int) -> Callable[[Random], list[Case]]:
    """Asks for a fact from the beginning of a conversation that is about other things.

    ``num_tokens`` is about how long the prompt is.
    """

    def cases(rng: Random) -> list[Case]:
        made = []
        for _ in range(24):
            item = passages.passage(rng, num_subjects=1, num_facts=3, held_out=True)
            fact, other = rng.sample(item.facts, 2)
            question, answer = passages.ask(rng, other)
            messages = exchange(passages.frame(rng, item.text, question), answer)
            characters = 0
            while characters < 3.1 * (num_tokens - 120):
                turns = dinosaurs.turns(rng)
                characters += sum(len(turn.content) + 10 for turn in turns)
                messages += turns
            question, _ = passages.ask(rng, fact)
            made.append(Case((*messages, Message("user", question)), contains(fact.value)))
        return made

    return cases


def long_pattern(rng: Random) -> list[Case]:
    """Repeats four invented words for about 1,800 tokens."""
    cases = []
    for _ in range(16):
        unit = _unseen_words(rng, 4)
        shown = 1_800 // 14 * 4 + rng.randrange(4)
        given, answer = copying.pattern_question(unit, shown)
        cases.append(Case(given, begins(answer)))
    return cases


@dataclass(frozen=True)
class FamilySpec:
    name: str
    cases: Callable[[Random], list[Case]]
    max_tokens: int


FAMILIES = (
    FamilySpec("reply with the word X: invented", echo_invented, 16),
    FamilySpec("reply with the word X: real words", echo_real, 16),
    FamilySpec("pattern in chat, invented words", pattern_chat, 56),
    FamilySpec("pattern in chat, letters, whole cycles", pattern_letters_in_chat(whole=True), 24),
    FamilySpec("pattern in chat, letters, cut anywhere", pattern_letters_in_chat(whole=False), 24),
    FamilySpec("pattern as plain text, letters", pattern_letters, 20),
    FamilySpec("pattern as plain text, invented words", pattern_text, 56),
    FamilySpec("passage, one subject", passage_of(1), 32),
    FamilySpec("passage, two subjects", passage_of(2), 32),
    FamilySpec("passage, three subjects", passage_of(3), 32),
    FamilySpec("name from an earlier turn", memory, 24),
    FamilySpec("dinosaur facts, unseen wording", dinosaur_wordings, 32),
    FamilySpec("joke", jokes, 48),
    FamilySpec("arithmetic, unseen pairs (greedy)", arithmetic_cases, 64),
)
LONG_FAMILIES = (
    FamilySpec("fact from about 500 tokens before", long_passage(500), 32),
    FamilySpec("fact from about 1,000 tokens before", long_passage(1000), 32),
    FamilySpec("fact from about 1,900 tokens before", long_passage(1900), 32),
    FamilySpec("pattern after about 1,800 tokens", long_pattern, 56),
)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate that one of k samples or more is right (Chen et al., 2021)."""
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def score_pass_at_k(
    generator: Generator,
    seed: int,
    num_problems: int = 80,
    num_samples: int = 32,
    temperature: float = 1.0,
) -> list[Score]:
    chosen = problems(Random(seed))[:num_problems]
    torch.manual_seed(seed)
    prompts = [
        generator.encode((Message("user", p.question),)) for p in chosen for _ in range(num_samples)
    ]
    replies = generator.complete(prompts, 64, temperature)
    rights = [
        sum(
            answers(problem.answer)(reply)
            for reply in replies[i * num_samples : (i + 1) * num_samples]
        )
        for i, problem in enumerate(chosen)
    ]
    note = f"{num_samples} samples, temperature {temperature}"
    return [
        Score(
            f"arithmetic, pass@{k}",
            sum(pass_at_k(num_samples, right, k) for right in rights) / len(rights),
            num_problems,
            note,
        )
        for k in (1, 2, 4, 8, 16, 32)
    ]


def score_arithmetic_kinds(generator: Generator, seed: int) -> list[Score]:
    chosen = problems(Random(seed))
    rights = generator.judge([ask(p.question, answers(p.answer)) for p in chosen], 64)
    scores = []
    for kind in sorted({p.kind for p in chosen}):
        own = [right for p, right in zip(chosen, rights, strict=True) if p.kind == kind]
        scores.append(Score(f"arithmetic, {kind}", sum(own) / len(own), len(own)))
    return scores


# --- the calculator -------------------------------------------------------------------------------

_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>")


@dataclass(frozen=True)
class LargeSum:
    """A sum that no training document contains, and the tools that are offered with it."""

    asked: calculator.Sum
    calculator: calculator.Calculator
    tools: tuple[Tool, ...]

    @property
    def call(self) -> Call:
        return self.calculator.call(self.asked)


def called(reply: str) -> Call | None:
    """The call that a reply is; None if it is anything else."""
    found = _CALL.fullmatch(reply.strip())
    try:
        said = json.loads(found[1]) if found else {}
        return Call(said["name"], said["arguments"])
    except (ValueError, KeyError):
        return None


def has_number(number: str) -> Callable[[str], bool]:
    """Judges that a reply names a number, which is not a part of a longer one."""
    pattern = re.compile(rf"(?<![\d.-]){re.escape(number)}(?!\.?\d)")
    return lambda reply: pattern.search(reply) is not None


def _with_expression(name: str, parameter: str) -> calculator.Calculator:
    """A calculator as a library describes a function with one argument."""
    tool = {
        "name": name,
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {parameter: {"type": "string"}},
            "required": [parameter],
        },
    }
    return calculator.Calculator(
        (tool,), lambda asked: Call(name, {parameter: asked.expression}), True
    )


def _usual(rng: Random) -> calculator.Calculator:
    return _with_expression("calculator", "expression")


def _unseen(rng: Random) -> calculator.Calculator:
    return _with_expression(
        rng.choice(tool_table.HELD_OUT_EXPRESSION_NAMES),
        rng.choice(tool_table.HELD_OUT_EXPRESSION_PARAMETERS),
    )


def _four_functions(rng: Random) -> calculator.Calculator:
    return calculator.pair_calculator(rng, "", ("a", "b"))


@dataclass(frozen=True)
class ToolFamily:
    name: str
    calculator: Callable[[Random], calculator.Calculator]
    num_other_tools: int
    num_cases: int

    def sums(self, rng: Random) -> list[LargeSum]:
        made: list[LargeSum] = []
        while len(made) < self.num_cases:
            own = self.calculator(rng)
            asked = calculator.large_sum(rng, held_out=True, chains=own.takes_chains)
            if "." in asked.expression and not own.takes_chains:
                continue
            tools = [*own.tools, *calculator.other_tools(rng, self.num_other_tools)]
            rng.shuffle(tools)
            made.append(LargeSum(asked, own, tuple(tools)))
        return made


TOOL_FAMILIES = (
    ToolFamily("calculator", _usual, 0, 256),
    ToolFamily("calculator of an unseen name", _unseen, 0, 128),
    ToolFamily("calculator among three tools", _usual, 2, 128),
    ToolFamily("add, subtract, multiply, divide", _four_functions, 0, 128),
)


def score_tools(generator: Generator, family: ToolFamily, seed: int) -> list[Score]:
    """The calls that are right, and the answers: the model's own call, then the tool's result."""
    sums = family.sums(Random(f"{seed} {family.name}"))
    asked = [Case((Message("user", s.asked.question),), lambda _: True, s.tools) for s in sums]
    replies = generator.complete([generator.encode(c.prompt, c.tools) for c in asked], 96)
    called_right = [called(reply) == s.call for s, reply in zip(sums, replies, strict=True)]
    told = [
        Case(
            (
                Message("user", s.asked.question),
                Message("assistant", "", (s.call,)),
                Message("tool", s.asked.result),
            ),
            has_number(s.asked.result),
            s.tools,
        )
        for s, right in zip(sums, called_right, strict=True)
        if right
    ]
    answered_right = generator.judge(told, 64)
    return [
        Score(f"{family.name}: calls", sum(called_right) / len(sums), len(sums)),
        Score(f"{family.name}: answers", sum(answered_right) / len(sums), len(sums)),
    ]


def no_call_needed(rng: Random) -> list[Case]:
    """Questions that need no calculator, while there is one."""
    own = _usual(rng)
    cases = [*rng.sample(dinosaur_wordings(rng), 64), *rng.sample(echo_invented(rng), 64)]
    return [Case(case.prompt, case.is_right, own.tools) for case in cases]


BESIDE_TOOLS = (FamilySpec("no sum, beside a calculator", no_call_needed, 32),)


def evaluate(generator: Generator, seed: int, *, quick: bool) -> list[Score]:
    """All scores. ``quick`` leaves out sampling and long prompts."""
    scores = []
    for family in FAMILIES + BESIDE_TOOLS + (() if quick else LONG_FAMILIES):
        cases = family.cases(Random(f"{seed} {family.name}"))
        rights = generator.judge(cases, family.max_tokens)
        scores.append(Score(family.name, sum(rights) / len(rights), len(rights)))
    for tool_family in TOOL_FAMILIES:
        scores += score_tools(generator, tool_family, seed)
    if not quick:
        scores += score_arithmetic_kinds(generator, seed)
        scores += score_pass_at_k(generator, seed)
    return scores


def table(scores: Sequence[Score]) -> str:
    lines = ["| family | right | cases |", "|---|---|---|"]
    for score in scores:
        note = f" ({score.note})" if score.note else ""
        lines.append(f"| {score.family}{note} | {score.right:.1%} | {score.num_cases} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL_DIR,
        help="folder of the model (default: the bundled one)",
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no sampling, no long prompts")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    scores = evaluate(Generator.load(arguments.model), arguments.seed, quick=arguments.quick)
    print(table(scores))
    print(f"\n{time.monotonic() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(score) for score in scores], indent=2) + "\n")


if __name__ == "__main__":
    main()
