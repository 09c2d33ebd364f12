"""On-policy distillation of a cartridge, with an engine as the rollout.

    python examples/cartridge_distillation.py plot=losses.png
    python examples/cartridge_distillation.py text=manual.txt out=manual.safetensors

A cartridge learns to stand for a document from its own answers. First, the model writes questions
about the document, which it has in sight. Then each step:

1. The cartridge goes to the engine as a new version.
2. The engine answers questions behind the cartridge, without the document, and tells the logprob of
   every token.
3. The trainer computes the same logprobs. If they differed, another cartridge would have answered.
4. The engine says what the model would have said at each place of these answers with the document
   in sight: its likeliest tokens and their logprobs.
5. The cartridge is changed so that the model behind it says rather that. The loss is the
   Kullback-Leibler divergence of the two, on answers of the student itself (Agarwal et al., 2023,
   arXiv:2306.13649). The model stays as it is.

``toka-cartridge train`` learns from answers of the model that sees the document instead, which are
made once.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from engine import engine
from plot import check_plot, draw
from rollout import Rollout, largest_difference
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokasaurus.cartridge_training.distillation import (
    TrainableCartridge,
    answer_logits,
    distillation_loss,
)
from tokasaurus.cartridge_training.self_study import (
    ChatForm,
    Conversation,
    Question,
    Sample,
    questions,
)
from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus.passages import Passage, passage
from tokasaurus.errors import ConfigError, TokasaurusError
from tokasaurus.launch.cartridges.tensors import save_tensors

__all__ = ["SCHEMA", "Config", "History", "run"]

_FILES, _ENGINE, _ROLLOUT, _TRAINING = "Files", "Engine", "Rollout", "Training"
_TOP_K = 20  # of the teacher's tokens in each place
_FLAGS = ("dtype=float32", f"max_topk_logprobs={_TOP_K}", "log_level=WARNING")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train."""

    text: str | None = flag(
        None,
        group=_FILES,
        help="The document: a text file in UTF-8.",
        usually="a passage of invented facts, about which questions are asked before and after",
    )
    out: str | None = flag(None, group=_FILES, help="Where to write the cartridge.")
    plot: str | None = flag(None, group=_FILES, help="Where to draw the losses, as a PNG.")
    model: str = flag(
        str(MODEL_DIR),
        group=_ENGINE,
        help="A Hugging Face directory or repository id.",
        usually="the bundled model",
    )
    url: str | None = flag(
        None,
        group=_ENGINE,
        help="An engine that runs this model with dtype=float32.",
        usually="one is started, and ended with the program",
    )
    device: str = flag("cpu", group=_ENGINE, help="Where the trainer and its engine compute.")
    num_questions: int = flag(
        256, group=_ROLLOUT, minimum=2, help="Questions that the model writes about the document."
    )
    max_tokens: int = flag(48, group=_ROLLOUT, minimum=1, help="The longest answer.")
    temperature: float = flag(1.0, group=_ROLLOUT, minimum=0.01, help="Of the answers.")
    num_tokens: int = flag(32, group=_TRAINING, minimum=2, help="Positions of the cartridge.")
    num_frozen: int = flag(
        1, group=_TRAINING, minimum=0, help="Positions at its beginning that are not trained."
    )
    num_steps: int = flag(100, group=_TRAINING, minimum=1, help="Updates of the cartridge.")
    batch_size: int = flag(16, group=_TRAINING, minimum=1, help="Answers of a step.")
    learning_rate: float = flag(
        0.06, group=_TRAINING, minimum=0.0, help="Of Adam. It falls to zero as a cosine."
    )
    most_difference: float = flag(
        1e-3,
        group=_TRAINING,
        minimum=0.0,
        help="Ends the program if a logprob of the engine differs by more from the trainer's.",
    )
    evaluate_every: int = flag(
        10, group=_TRAINING, minimum=1, help="Steps from one measurement to the next."
    )
    seed: int = flag(
        0, group=_TRAINING, minimum=0, help="Of the passage, the questions and the answers."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_plot(self.plot)
        if self.num_frozen >= self.num_tokens:
            raise ConfigError(f"num_frozen={self.num_frozen} must be less than num_tokens")


SCHEMA = Schema(
    target=Config,
    program="cartridge_distillation.py",
    summary="Train a cartridge on its own answers.",
    examples=(
        "python examples/cartridge_distillation.py plot=losses.png",
        "python examples/cartridge_distillation.py text=manual.txt out=manual.safetensors",
    ),
)


@dataclass(frozen=True)
class History:
    """What a training was like.

    Attributes:
        losses: of each step, in nats a token.
        differences: the largest of each step's, between the logprobs of engine and trainer.
        held_out: losses on questions that are not trained on, by the number of steps before.
        right: the share of right answers about the passage's facts; by what was in sight.
    """

    losses: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)


class Trainer:
    """The cartridge that learns, and its engine.

    Args:
        config: how to train.
        url: of the engine.
        directory: for the file of the cartridge.

    Raises:
        ConfigError: the document is too short or too long, or the model asks too few questions.
    """

    def __init__(self, config: Config, url: str, directory: Path) -> None:
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(config.model)
        self._model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        self._model.to(config.device).eval().requires_grad_(False)
        self._form = ChatForm.of(self._render, self._tokenizer.bos_token or "")
        self._passage: Passage | None = None
        if config.text is None:
            self._passage = invented_passage(config.seed)
            self._document = self._passage.text
        else:
            self._document = read_document(config.text)
        self._path = directory / "cartridge.safetensors"
        self._student, self._teacher = Rollout(url, config.seed), Rollout(url, config.seed + 1)
        self._rng = Random(config.seed)
        self.history = History()
        ids = self._encode(self._form.before_document + self._document)
        if len(ids) < config.num_tokens:
            raise ConfigError(f"num_tokens={config.num_tokens}: the document has {len(ids)} tokens")
        first = ids[: config.num_tokens]
        self._cartridge = TrainableCartridge.of_text(self._model, first, config.num_frozen)
        self._optimizer = torch.optim.Adam(self._cartridge.parameters(), config.learning_rate)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, config.num_steps
        )
        self.upload()
        asked = self._questions()
        share = max(1, len(asked) // 5)
        self._held_out, self._trained = asked[:share], asked[share:]

    def step(self) -> None:
        """Lets the cartridge answer, and trains it on the answers."""
        asked = self._rng.choices(self._trained, k=self._config.batch_size)
        loss, difference = self._loss(asked, self._config.temperature)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._schedule.step()
        self.history.losses.append(loss.item())
        self.history.differences.append(difference)
        self.upload()

    def evaluate(self) -> float:
        """The loss on questions that are not trained on."""
        with torch.no_grad():
            loss, _ = self._loss(self._held_out, self._config.temperature)
        self.history.held_out[len(self.history.losses)] = loss.item()
        return loss.item()

    def upload(self) -> None:
        """The engine answers behind the present cartridge from now on."""
        keys, values = ([each[0] for each in tensors] for tensors in self._cartridge.whole())
        save_tensors(self._path, keys, values, num_frozen=self._cartridge.num_frozen)
        self._student.use_cartridge(self._path)

    def save(self, path: Path) -> None:
        """Writes the cartridge to a file of the user's."""
        path.write_bytes(self._path.read_bytes())

    def score(self, name: str, *, sees_document: bool = False) -> None:
        """Asks for every fact of the passage, greedily; does nothing with another document."""
        if self._passage is None:
            return
        asked = [
            (fact.fill(question), fact.value)
            for fact in self._passage.facts
            for question in fact.relation.questions
        ]
        form, document = self._form, self._document
        before = form.before_document + document + form.before_question
        prompts = [
            self._encode((before if sees_document else form.begin) + each + form.before_answer)
            for each, _ in asked
        ]
        model = self._teacher if sees_document else self._student
        answers = model.answers(prompts, max_tokens=self._config.max_tokens, temperature=0.0)
        said = [self._text(each.token_ids).lower() for each in answers]
        right = [value.lower() in text for (_, value), text in zip(asked, said, strict=True)]
        self.history.right[name] = float(np.mean(right))

    def close(self) -> None:
        """Closes the connections to the engine."""
        self._student.close()
        self._teacher.close()

    def _loss(self, asked: Sequence[Question], temperature: float) -> tuple[torch.Tensor, float]:
        """Of fresh answers, with gradients; and how much the logprobs differ."""
        config = self._config
        answers = self._student.answers(
            [each.behind_cartridge for each in asked],
            max_tokens=config.max_tokens,
            temperature=temperature,
        )
        wanted = self._teacher.likeliest([each.with_document for each in asked], answers, _TOP_K)
        conversations = [
            Conversation(each.behind_cartridge, Sample(answer.token_ids, "", True, *likeliest))
            for each, answer, likeliest in zip(asked, answers, wanted, strict=True)
        ]
        logits = answer_logits(self._model, self._cartridge, conversations)
        chosen = torch.tensor([token for answer in answers for token in answer.token_ids])
        logprobs = (logits.detach().cpu() / temperature).log_softmax(-1)
        difference = largest_difference(
            answers, logprobs.gather(1, chosen[:, None])[:, 0], config.most_difference
        )
        return distillation_loss(logits, conversations), difference

    def _questions(self) -> list[Question]:
        asked = questions(
            self._sample,
            self._encode,
            self._form,
            self._document,
            count=self._config.num_questions,
            seed=self._config.seed,
            excerpt_tokens=sys.maxsize,
        )
        if len(asked) < 2:
            raise ConfigError(f"the model asks {len(asked)} questions about the document")
        return asked

    def _sample(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, top_k: int
    ) -> list[Sample]:
        """Continues prompts with the document, for the questions."""
        answers = self._teacher.answers(prompts, max_tokens=max_tokens, temperature=temperature)
        end = self._tokenizer.eos_token_id
        no_ids, no_logprobs = np.zeros((0, top_k), np.int64), np.zeros((0, top_k), np.float32)
        return [
            Sample(ids, self._text(ids), ids[-1] == end, no_ids, no_logprobs)
            for ids in (each.token_ids for each in answers)
        ]

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def invented_passage(seed: int) -> Passage:
    """Facts that no model has learnt: twelve, about three subjects."""
    return passage(Random(seed), num_subjects=3, num_facts=4, held_out=True)


def read_document(path: str) -> str:
    """The text of a file. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={path}: {error}") from None


def train(config: Config, url: str) -> History:
    """Trains, with the engine at an address."""
    with tempfile.TemporaryDirectory(prefix="tokasaurus-") as directory:
        trainer = Trainer(config, url, Path(directory))
        try:
            trainer.score("the document", sees_document=True)
            trainer.score("the cartridge, before")
            run_steps(config, trainer)
            trainer.score("the cartridge, trained")
            if config.out is not None:
                trainer.save(Path(config.out).expanduser())
        finally:
            trainer.close()
    for name, share in trainer.history.right.items():
        print(f"right answers behind {name}: {share:.0%}")
    return trainer.history


def run_steps(config: Config, trainer: Trainer) -> None:
    """All steps, with a progress bar and a table of what was measured."""
    history = trainer.history
    with tqdm(total=config.num_steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        bar.write("step   loss on held-out questions   mean loss   logprobs differ by at most")
        bar.write(f"{0:4}   {trainer.evaluate():26.3f}")
        for step in range(1, config.num_steps + 1):
            trainer.step()
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", refresh=False)
            bar.update()
            if step % config.evaluate_every == 0 or step == config.num_steps:
                since = step - (step - 1) % config.evaluate_every - 1
                bar.write(
                    f"{step:4}   {trainer.evaluate():26.3f}"
                    f"   {np.mean(history.losses[since:]):9.3f}"
                    f"   {max(history.differences[since:]):26.1e}"
                )


def run(config: Config) -> History:
    """Trains, and draws what the training was like.

    Raises:
        ConfigError: the document does not fit, or is not asked about.
        EngineError: the engine cannot be started or asked, or runs another model.
    """
    flags = [f"model={config.model}", f"device={config.device}", *_FLAGS]
    if config.device == "cpu":
        flags.append("kv_cache_num_tokens=32768")
    with engine(config.url, *flags) as url:
        history = train(config, url)
    if config.plot is not None:
        draw(
            config.plot,
            "loss",
            history.losses,
            "on held-out questions",
            history.held_out,
            ylabel="KL divergence, nats a token",
            ylim=(0, None),
        )
    return history


def main() -> None:
    """Runs the program."""
    config = parse_or_exit(SCHEMA, sys.argv[1:])
    try:
        run(config)
    except TokasaurusError as error:
        raise SystemExit(f"cartridge_distillation.py: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
