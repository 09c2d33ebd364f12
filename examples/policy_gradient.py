"""Reinforcement learning with an engine as the rollout: a model learns to get sums right.

    python examples/policy_gradient.py plot=reward.png
    python examples/policy_gradient.py --help

Each step:

1. The engine answers problems, each several times, and tells the logprob of every token.
2. The trainer computes the same logprobs. If they differed, it would train another model than the
   one that answered.
3. An answer is worth 1 if its result is right, otherwise 0. Its advantage is what it is worth above
   the mean of the answers to the same problem.
4. The gradient of the answers' logprobs, each times its advantage, makes one step of Adam
   (REINFORCE: Williams, 1992; with the other answers as the baseline: Shao et al., 2024,
   arXiv:2402.03300).
5. The new weights go to the engine, which answers with them from then on.

From time to time, the reward of problems with other numbers is measured, which are not trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from engine import engine
from plot import check_plot, draw
from rollout import Answer, Rollout, largest_difference
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus.arithmetic import Problem, problem
from tokasaurus.errors import TokasaurusError
from tokasaurus.integrations.trainer import BucketSender
from tokasaurus.integrations.verl.server import key_from_environment

__all__ = ["SCHEMA", "Config", "History", "run"]

_ENGINE, _ROLLOUT, _TRAINING = "Engine", "Rollout", "Training"
_FLAGS = ("dtype=float32", "kv_cache_num_tokens=32768", "log_level=WARNING")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train."""

    plot: str | None = flag(None, help="Where to draw the reward, as a PNG.")
    url: str | None = flag(
        None,
        group=_ENGINE,
        help="An engine that runs the bundled model with dtype=float32. Its weights are replaced.",
        usually="one is started, and ended with the program",
    )
    num_different: int = flag(64, group=_ROLLOUT, minimum=1, help="Problems that there are.")
    num_problems: int = flag(16, group=_ROLLOUT, minimum=1, help="Problems of a step.")
    num_samples: int = flag(8, group=_ROLLOUT, minimum=2, help="Answers to each.")
    max_tokens: int = flag(32, group=_ROLLOUT, minimum=1, help="The longest answer.")
    temperature: float = flag(1.0, group=_ROLLOUT, minimum=0.01, help="Of the answers.")
    num_steps: int = flag(80, group=_TRAINING, minimum=1, help="Updates of the weights.")
    learning_rate: float = flag(2e-4, group=_TRAINING, minimum=0.0, help="Of Adam.")
    most_difference: float = flag(
        1e-3,
        group=_TRAINING,
        minimum=0.0,
        help="Ends the program if a logprob of the engine differs by more from the trainer's.",
    )
    num_evaluated: int = flag(
        256, group=_TRAINING, minimum=1, help="Problems with other numbers, to measure by."
    )
    evaluate_every: int = flag(10, group=_TRAINING, minimum=1, help="Steps from one to the next.")
    seed: int = flag(0, group=_TRAINING, minimum=0, help="Of the problems and the answers.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_plot(self.plot)


SCHEMA = Schema(
    target=Config,
    program="policy_gradient.py",
    summary="Teach the bundled model sums by reinforcement learning.",
    examples=(
        "python examples/policy_gradient.py plot=reward.png",
        "python examples/policy_gradient.py num_steps=20 learning_rate=1e-4",
    ),
)


@dataclass(frozen=True)
class History:
    """What a training was like.

    Attributes:
        rewards: the mean of each step's answers.
        differences: the largest of each step's, between the logprobs of engine and trainer.
        held_out: mean rewards of problems with other numbers, by the number of steps before.
    """

    rewards: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


class Trainer:
    """The model that learns, and its engine.

    Args:
        config: how to train.
        url: of the engine.
    """

    def __init__(self, config: Config, url: str) -> None:
        self._config, self._url = config, url
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self._model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self._optimizer = torch.optim.Adam(self._model.parameters(), config.learning_rate)
        self._rng = Random(config.seed)
        self._problems = sums(self._rng, config.num_different, held_out=False)
        self._left: list[Problem] = []  # of the present round through all of them
        self._held_out = sums(self._rng, config.num_evaluated, held_out=True)
        self._rollout = Rollout(url, config.seed)
        self._sender = BucketSender(url, api_key=key_from_environment())
        self.history = History()

    def step(self) -> None:
        """Answers problems, and trains on the answers."""
        config, history = self._config, self.history
        if len(self._left) < config.num_problems:
            self._left = self._rng.sample(self._problems, len(self._problems))
        problems = [self._left.pop() for _ in range(config.num_problems)]
        asked = [each for each in problems for _ in range(config.num_samples)]
        prompts = [self._prompt(each) for each in asked]
        answers = self._rollout.answers(
            prompts, max_tokens=config.max_tokens, temperature=config.temperature
        )
        rewards = torch.tensor([self._reward(*each) for each in zip(asked, answers, strict=True)])
        of_problem = rewards.view(config.num_problems, config.num_samples)
        advantages = (of_problem - of_problem.mean(1, keepdim=True)).flatten()
        # Where all answers to a problem are right, or all wrong, there is nothing to learn.
        trained = advantages.nonzero()[:, 0].tolist()
        if trained:
            self._update(
                [prompts[row] for row in trained],
                [answers[row] for row in trained],
                advantages[trained],
            )
        history.rewards.append(rewards.mean().item())
        self._sender.send(self._model.state_dict(), f"step-{len(history.rewards)}")

    def _update(
        self, prompts: Sequence[list[int]], answers: Sequence[Answer], advantages: Tensor
    ) -> None:
        config, history = self._config, self.history
        logprobs = answer_logprobs(self._model, prompts, answers, config.temperature)
        history.differences.append(
            largest_difference(answers, logprobs.detach(), config.most_difference)
        )
        lengths = torch.tensor([len(each.token_ids) for each in answers])
        num_answers = config.num_problems * config.num_samples
        loss = -(advantages.repeat_interleave(lengths) * logprobs).sum() / num_answers
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()

    def evaluate(self) -> float:
        """The mean reward of answers to held-out problems, drawn with the same seeds each time."""
        prompts = [self._prompt(each) for each in self._held_out]
        with Rollout(self._url, self._config.seed + 1) as rollout:
            answers = rollout.answers(
                prompts,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
            )
        rewards = [self._reward(*each) for each in zip(self._held_out, answers, strict=True)]
        mean = float(np.mean(rewards))
        self.history.held_out[len(self.history.rewards)] = mean
        return mean

    def close(self) -> None:
        """Closes the connections to the engine."""
        self._rollout.close()
        self._sender.close()

    def _prompt(self, asked: Problem) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": asked.question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reward(self, asked: Problem, answer: Answer) -> float:
        if answer.token_ids[-1] != self._tokenizer.eos_token_id:
            return 0.0  # it was cut, maybe within its result
        said = self._tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return float(said.strip().endswith(f"Answer: {asked.answer}"))


def sums(rng: Random, count: int, *, held_out: bool) -> list[Problem]:
    """Problems of one step, or bare ones, with numbers that the model was trained on or not."""
    found: list[Problem] = []
    while len(found) < count:
        drawn = problem(rng, held_out=held_out)
        if drawn.kind != "two steps":
            found.append(drawn)
    return found


def answer_logprobs(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[Answer], temperature: float
) -> Tensor:
    """Those of the tokens of all answers, one after the other, with gradients."""
    rows = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places: list[int] = []  # of the predictions, in the flat [rows x length]
    for row, (prompt, line) in enumerate(zip(prompts, rows, strict=True)):
        ids[row, : len(line)] = torch.tensor(line)
        mask[row, : len(line)] = 1
        places += range(row * length + len(prompt) - 1, row * length + len(line) - 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model.get_output_embeddings()(hidden.flatten(0, 1)[places]) / temperature
    chosen = torch.tensor([token for answer in answers for token in answer.token_ids])
    logprobs: Tensor = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    return logprobs


def train(config: Config, url: str) -> History:
    """Trains, with the engine at an address."""
    trainer = Trainer(config, url)
    history = trainer.history
    try:
        with tqdm(total=config.num_steps, desc="training", unit="step", dynamic_ncols=True) as bar:
            bar.write("step   reward   of other problems   logprobs differ by at most")
            bar.write(f"{0:4}            {trainer.evaluate():17.3f}")
            for step in range(1, config.num_steps + 1):
                trainer.step()
                bar.set_postfix(reward=f"{history.rewards[-1]:.2f}", refresh=False)
                bar.update()
                if step % config.evaluate_every == 0 or step == config.num_steps:
                    since = step - (step - 1) % config.evaluate_every - 1
                    bar.write(
                        f"{step:4}   {np.mean(history.rewards[since:]):6.3f}"
                        f"   {trainer.evaluate():17.3f}"
                        f"   {max(history.differences[since:]):26.1e}"
                    )
    finally:
        trainer.close()
    return history


def run(config: Config) -> History:
    """Trains, and draws what the training was like.

    Raises:
        EngineError: the engine cannot be started or asked, or runs another model.
    """
    with engine(config.url, *_FLAGS) as url:
        history = train(config, url)
    if config.plot is not None:
        draw(
            config.plot,
            "reward",
            history.rewards,
            "of other problems",
            history.held_out,
            ylabel="share of right answers",
            ylim=(0, 1),
        )
    return history


def main() -> None:
    """Runs the program."""
    config = parse_or_exit(SCHEMA, sys.argv[1:])
    try:
        run(config)
    except TokasaurusError as error:
        raise SystemExit(f"policy_gradient.py: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
