"""``python -m tokasaurus.client.lm.run``: a small evaluation of a served model.

    python -m tokasaurus.client.lm.run --config configs/memoryless_toka_demo.yaml --launch

Reads an agent's YAML, asks the questions that it names, and prints a table.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tokasaurus.client.lm.call_log import DEFAULT_DIRECTORY, enable_json_logging
from tokasaurus.client.lm.evaluation import (
    EvaluationConfig,
    Outcome,
    Question,
    evaluate,
    read_questions,
)
from tokasaurus.client.lm.launched import launched_engine
from tokasaurus.client.lm.lm_factory import get_lm_client
from tokasaurus.client.lm.tokasaurus_client import TokasaurusClient
from tokasaurus.client.lm.totals import TotalUsage
from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError, EngineDead

__all__ = ["RUN", "RunConfig", "main"]

_PROGRAM = "python -m tokasaurus.client.lm.run"
_AGENT = "memoryless_agent"
_CONFIG_WORDS = ("--config=", "config=")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """An agent, what it is asked, and which engine answers."""

    agent: Mapping[str, Any] = flag(
        help=f"The agent: its `type`, which is {_AGENT}, and the `lm_config` of its model."
    )
    evaluation: EvaluationConfig = flag(  # noqa: RUF009 (a flag is no shared value)
        help="The questions, and how answers are judged."
    )
    engine: Mapping[str, Any] | None = flag(
        None, help="Flags of the engine that launch starts.", adapts="the engine's own defaults"
    )
    launch: bool = flag(
        False, help="Start an engine at the address of lm_config.base_url, and stop it at the end."
    )
    results_dir: str | None = flag(
        None,
        help="A directory for results.jsonl, and for llm_calls if lm_config.log_calls is true.",
        adapts="no results are kept, and calls are logged in ./llm_calls",
        verbatim=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = sorted(set(self.agent) - {"type", "lm_config"})
        if unknown:
            raise ConfigError(f"agent.{unknown[0]}: an agent has a type and an lm_config only")
        if self.agent.get("type") != _AGENT:
            raise ConfigError(
                f"agent.type={self.agent.get('type')!r}: this program runs {_AGENT}, which answers"
                " each question on its own; other agents are programs of their own"
            )
        if not isinstance(self.agent.get("lm_config"), dict):
            raise ConfigError("agent.lm_config: expected the keys of a language model")


RUN = Schema(
    target=RunConfig,
    program=_PROGRAM,
    summary="Ask a served model questions with known answers, and count the right ones.",
    reads_files=True,
    examples=(
        f"{_PROGRAM} --config configs/memoryless_toka_demo.yaml --launch",
        f"{_PROGRAM} --config configs/finer/memoryless_toka_llama3b.yaml"
        " agent.lm_config.model=toka:Qwen/Qwen3-4B evaluation.limit=10",
    ),
)


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if every question has a reply, 1 if calls failed or the engine ended, 2
        if the configuration is wrong, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    config = parse_or_exit(RUN, _with_shipped_file(words))
    try:
        with _ending_on_sigterm():
            return _run(config)
    except ValidationError as error:
        lines = [_readable(problem) for problem in error.errors()]
        print(f"{_PROGRAM}: error: {chr(10).join(lines)}", file=sys.stderr)
        return 2
    except (ConfigError, ValueError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except EngineDead as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(config: RunConfig) -> int:
    questions = read_questions(config.evaluation)
    lm = get_lm_client(config.agent["lm_config"])
    if config.results_dir is not None:
        enable_json_logging(Path(config.results_dir) / DEFAULT_DIRECTORY)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lm)
        if config.launch:
            print(f"starting an engine at {lm.cfg.address.url}", file=sys.stderr)
            stack.enter_context(launched_engine(lm.cfg, config.engine or {}))
        started = time.perf_counter()
        outcomes = _ask_all(lm, questions, config.evaluation)
        elapsed_s = time.perf_counter() - started
    if config.results_dir is not None:
        _write(Path(config.results_dir) / "results.jsonl", outcomes)
    total = lm.totals
    Console().print(_table(lm, outcomes, total, elapsed_s))
    return 1 if total.failures else 0


def _ask_all(
    lm: TokasaurusClient, questions: Sequence[Question], config: EvaluationConfig
) -> list[Outcome]:
    """The outcomes in the order of the questions, behind a progress bar."""
    outcomes: list[Outcome] = []
    with tqdm(total=len(questions), unit="question") as bar:
        for outcome in evaluate(lm, questions, config):
            outcomes.append(outcome)
            bar.set_postfix(right=sum(each.is_right for each in outcomes), refresh=False)
            bar.update()
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _table(
    lm: TokasaurusClient, outcomes: Sequence[Outcome], total: TotalUsage, elapsed_s: float
) -> Table:
    num_right = sum(outcome.is_right for outcome in outcomes)
    rows = {
        "model": lm.cfg.server_model,
        "server": f"{lm.cfg.address.url} ({lm.cfg.protocol})",
        "questions": f"{len(outcomes):,}",
        "right": f"{num_right:,}",
        "accuracy": f"{num_right / len(outcomes):.1%}",
        "failed calls": f"{total.failures:,}",
        "retries": f"{total.retries:,}",
        "input tokens": f"{total.input_tokens:,}",
        "output tokens": f"{total.output_tokens:,}",
        "time": f"{elapsed_s:.1f} s",
        "output tokens/s": f"{total.output_tokens / elapsed_s:,.1f}",
        "mean time of a call": f"{total.duration / max(total.calls, 1):.2f} s",
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{outcome.line()}\n" for outcome in outcomes), encoding="utf-8")


def _with_shipped_file(words: Sequence[str]) -> list[str]:
    """Puts the package's own file in the place of a ``configs/...`` that is not here."""
    found = list(words)
    for place, word in enumerate(words):
        prefix = next((each for each in _CONFIG_WORDS if word.startswith(each)), None)
        if prefix is not None:
            found[place] = prefix + _shipped(word.removeprefix(prefix))
        elif place > 0 and words[place - 1] == "--config":
            found[place] = _shipped(word)
    return found


def _shipped(path: str) -> str:
    ours = _PACKAGE / path
    if Path(path).exists() or Path(path).parts[:1] != ("configs",) or not ours.is_file():
        return path
    return str(ours)


def _readable(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    said = problem["msg"].removeprefix("Value error, ")
    return f"agent.lm_config.{place}: {said}" if place else f"agent.lm_config: {said}"


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the block as an exception does, so that no launched engine stays behind."""

    def end(_signal: int, _frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
