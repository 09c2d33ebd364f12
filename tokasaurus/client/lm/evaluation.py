"""A small evaluation: questions with known answers, each asked on its own.

Owns the form of the data and how an answer is judged. Knows no server: it is given a language
model.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tokasaurus.client.lm.call_log import json_log_context
from tokasaurus.client.lm.language_model import LanguageModel
from tokasaurus.config.schema import check_fields, flag
from tokasaurus.errors import ConfigError

__all__ = ["MATCHES", "EvaluationConfig", "Outcome", "Question", "evaluate", "read_questions"]

_PACKAGE = Path(__file__).parent
_QUESTION = "{question}"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is asked, and how answers are judged."""

    data: str = flag(
        help="A JSONL file: each line has a `question`, and an `answer` or a list of answers, each"
        " of which is right. A name that is no file is looked up in the package's data.",
        verbatim=True,
    )
    system_prompt: str = flag(
        "", help="The system's prompt of each call.", verbatim=True, may_be_empty=True
    )
    prompt: str = flag(
        _QUESTION, help="The user's prompt, in which {question} stands for one.", verbatim=True
    )
    match: str = flag(
        "exact",
        choices=("exact", "contains"),
        help="exact: the reply is the answer, but for case, spaces and a full stop at the end."
        " contains: the answer stands somewhere in the reply.",
    )
    num_threads: int = flag(128, minimum=1, help="Calls at a time.")
    limit: int | None = flag(None, minimum=1, help="Ask only so many.", adapts="all questions")

    def __post_init__(self) -> None:
        check_fields(self)
        if _QUESTION not in self.prompt:
            raise ConfigError(
                f"evaluation.prompt={self.prompt!r}: it must contain {_QUESTION}, where a question"
                " goes"
            )


@dataclass(frozen=True)
class Question:
    """A question, and the answers that are right."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a question; an empty reply may be that of a call that failed."""

    index: int
    question: str
    answers: tuple[str, ...]
    reply: str
    is_right: bool

    def line(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def read_questions(config: EvaluationConfig) -> list[Question]:
    """Reads the data, up to the limit.

    Raises:
        ConfigError: there is no such file, or a line of it is wrong.
    """
    path = Path(config.data)
    if not path.is_file() and not path.is_absolute():
        path = _PACKAGE / "data" / config.data
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        ours = ", ".join(sorted(each.name for each in (_PACKAGE / "data").glob("*.jsonl")))
        raise ConfigError(
            f"evaluation.data={config.data!r} cannot be read ({error}); the package has {ours}"
        ) from None
    wanted = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    questions = [_question(f"{path}:{number}", line) for number, line in wanted[: config.limit]]
    if not questions:
        raise ConfigError(f"evaluation.data={config.data!r} has no questions")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        fields = json.loads(line)
        question, answer = fields["question"], fields["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: expected an object with `question` and `answer` ({error!r})"
        ) from None
    answers = answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str) or not answers or not all(isinstance(a, str) for a in answers):
        raise ConfigError(f"{where}: `question` is a text, and `answer` a text or a list of texts")
    return Question(question, tuple(answers))


def evaluate(
    lm: LanguageModel, questions: Sequence[Question], config: EvaluationConfig
) -> Iterator[Outcome]:
    """Asks all questions and yields outcomes in the order in which they come.

    An exception, such as Ctrl-C, leaves out the questions that have not been asked yet.
    """
    with ThreadPoolExecutor(min(config.num_threads, len(questions))) as pool:
        futures = [
            # A copy of the context each, so that the caller's log context reaches the threads.
            pool.submit(contextvars.copy_context().run, _ask, lm, index, question, config)
            for index, question in enumerate(questions)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ask(lm: LanguageModel, index: int, question: Question, config: EvaluationConfig) -> Outcome:
    with json_log_context(
        mode="val", call_type="action", episode_index=index, step_index=0, num_seen_episodes=0
    ):
        # Not str.format: questions and prompts may have braces of their own.
        prompt = config.prompt.replace(_QUESTION, question.question)
        reply = lm.call(config.system_prompt, prompt)
    is_right = any(MATCHES[config.match](reply, answer) for answer in question.answers)
    return Outcome(index, question.question, question.answers, reply, is_right)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".")


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda reply, answer: _plain(reply) == _plain(answer),
    "contains": lambda reply, answer: _plain(answer) in _plain(reply),
}
