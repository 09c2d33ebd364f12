"""``toka-bench training``: what a trained cartridge knows of a document.

    toka-bench training                                three documents; about ten minutes
    toka-bench training num_documents=1 num_steps=100 losses=losses.png

Documents are passages of invented facts that the bundled model was not trained on. For each, a
cartridge is trained as ``toka-cartridge train`` does it. Then every fact is asked for, in all
wordings that there are, greedily:

===================  ===============================================================================
nothing              the question alone: the model can only guess
first tokens         behind as many tokens of the document as the cartridge has positions
trained cartridge    behind the cartridge
whole document       with the document in the prompt: what the model can do at most
===================  ===============================================================================

An answer is right if it contains the fact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.plot import check_plot
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.text.params import SamplingParams

if TYPE_CHECKING:
    from tokasaurus.demo.corpus.passages import Passage
    from tokasaurus.launch.llm import LLM
    from tokasaurus.launch.outputs import RequestOutput

__all__ = ["SCHEMA", "TrainingBenchConfig", "run"]

_NUM_FACTS = 4  # of each subject
_ANSWER = SamplingParams(max_tokens=32, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class TrainingBenchConfig:
    """What to train."""

    num_documents: int = flag(3, minimum=1, help="Documents, each with a cartridge of its own.")
    num_subjects: int = flag(5, minimum=1, help="Invented subjects of a document, of four facts.")
    num_tokens: int = flag(64, minimum=2, help="Positions of a cartridge.")
    num_conversations: int = flag(2048, minimum=2, help="As for toka-cartridge train.")
    num_steps: int = flag(500, minimum=1, help="As for toka-cartridge train.")
    learning_rate: float = flag(0.06, help="As for toka-cartridge train.")
    losses: str | None = flag(None, help="Where to draw the losses of the first, as a PNG.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.losses is not None:
            check_plot(self.losses)


SCHEMA = Schema(
    target=TrainingBenchConfig,
    program="toka-bench training",
    summary="What a trained cartridge knows of a document.",
    examples=(
        "toka-bench training",
        "toka-bench training num_documents=1 num_steps=100 losses=losses.png",
    ),
)


def run(config: TrainingBenchConfig) -> None:
    """Trains, asks and prints the results."""
    shares: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="tokasaurus-") as name:
        for number in range(config.num_documents):
            document = _passage(number, config.num_subjects)
            losses = config.losses if number == 0 else None
            cartridge = _train(config, document, Path(name) / str(number), losses)
            found = _ask(config, document, cartridge)
            progress(
                f"{number + 1}/{config.num_documents}: "
                + ", ".join(f"{way} {share:.0%}" for way, share in found.items())
            )
            for way, share in found.items():
                shares.setdefault(way, []).append(share)
    _report(shares)


def _passage(seed: int, num_subjects: int) -> Passage:
    from tokasaurus.demo.corpus.passages import passage

    return passage(Random(seed), num_subjects=num_subjects, num_facts=_NUM_FACTS, held_out=True)


def _train(
    config: TrainingBenchConfig, document: Passage, directory: Path, losses: str | None
) -> Path:
    """Trains a cartridge; returns its file."""
    from tokasaurus.launch.cartridges.train import TrainConfig, run

    directory.mkdir()
    text, out = directory / "document.txt", directory / "cartridge.safetensors"
    text.write_text(document.text, encoding="utf-8")
    run(
        TrainConfig(
            text=str(text),
            out=str(out),
            plot=losses,
            num_tokens=config.num_tokens,
            num_conversations=config.num_conversations,
            num_steps=config.num_steps,
            learning_rate=config.learning_rate,
            dtype="float32",
            log_level="WARNING",
        )
    )
    return out


def _ask(config: TrainingBenchConfig, document: Passage, cartridge: Path) -> dict[str, float]:
    """The share of right answers of each way."""
    from tokasaurus.launch.llm import LLM

    asked = [
        (fact.fill(question), fact.value)
        for fact in document.facts
        for question in fact.relation.questions
    ]
    alone = [[{"role": "user", "content": question}] for question, _ in asked]
    system = {"role": "system", "content": document.text}
    whole = [[system, *messages] for messages in alone]
    with LLM(
        dtype="float32",
        cartridge_dir=str(cartridge.parent / "store"),
        cartridge_roots=(str(cartridge.parent),),
    ) as llm:
        given: dict[str, Sequence[RequestOutput]] = {
            "nothing": llm.chat(alone, _ANSWER, use_tqdm=False),
            "first tokens": _behind_first_tokens(llm, config.num_tokens, document.text, alone),
            "trained cartridge": llm.chat(
                alone, _ANSWER, use_tqdm=False, cartridges=str(cartridge)
            ),
            "whole document": llm.chat(whole, _ANSWER, use_tqdm=False),
        }
    return {
        way: sum(
            value.lower() in output.outputs[0].text.lower()
            for (_, value), output in zip(asked, outputs, strict=True)
        )
        / len(asked)
        for way, outputs in given.items()
    }


def _behind_first_tokens(
    llm: LLM, num_tokens: int, text: str, conversations: Sequence[list[dict[str, Any]]]
) -> Sequence[RequestOutput]:
    """What an untrained cartridge of this length would give: prompts behind the same tokens."""
    tokenizer = llm.get_tokenizer()
    system = tokenizer.chat_text([{"role": "system", "content": text}])
    first = tokenizer.encode_fragment(system)[:num_tokens]
    prompts = [
        [
            *first,
            *tokenizer.encode_fragment(
                tokenizer.chat_text(messages).removeprefix(tokenizer.bos_text)
            ),
        ]
        for messages in conversations
    ]
    return llm.generate(prompts, _ANSWER, use_tqdm=False)


def _report(shares: dict[str, list[float]]) -> None:
    means = {way: sum(each) / len(each) for way, each in shares.items()}
    rows = [
        (way, f"{means[way]:.0%}", f"{min(each):.0%} to {max(each):.0%}")
        for way, each in shares.items()
    ]
    print(markdown_table(("the question behind", "right answers", "range"), rows))
    print_json({"right": {way: round(mean, 3) for way, mean in means.items()}})
