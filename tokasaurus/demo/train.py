"""Makes the demo model from nothing: corpus, tokenizer, weights.

On two quiet cores it takes an estimated 95 minutes.

    python -m tokasaurus.demo.train --out DIR

Owns the recipe: architecture, phases and learning rates. ``demo.evaluate`` scores the result.

A run is a list of phases, each with its data and learning rate. ``--tokens`` scales the length of
all phases. A run can be interrupted at any time, and continued with ``--resume``. ``--start DIR``
gives only the last course, to a model that has had the others.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokasaurus.demo import tokenizer as tokenization
from tokasaurus.demo.corpus import (
    CALCULATOR,
    COPYING_FIRST,
    EXPRESSIONS,
    PATTERNS,
    WORKED_SUMS,
    Mixture,
)
from tokasaurus.demo.muon import Muon
from tokasaurus.demo.packing import Packer


@dataclass(frozen=True)
class Phase:
    """A part of the run: its data, and its learning rate as shares of the peak."""

    tokens: int
    length: int
    batch: int
    mixture: Mixture
    rate_from: float
    rate_to: float


# Short blocks come first, since they are several times as fast; then long ones, so that all 2,048
# positions are trained. The second course is how to work out a sum, and more of what the model
# learned most slowly. The third is how to call a tool; the prompts that describe tools are long. It
# displaced patterns in chat, and its end brings them back.
FIRST_COURSES = (
    Phase(500_000, 256, 16, COPYING_FIRST, 0.0, 1.0),
    Phase(11_000_000, 256, 16, COPYING_FIRST, 1.0, 1.0),
    Phase(2_000_000, 256, 16, COPYING_FIRST, 0.8, 0.2),
    Phase(1_100_000, 1024, 4, COPYING_FIRST, 0.2, 0.0),
    Phase(100_000, 256, 16, WORKED_SUMS, 0.0, 0.6),
    Phase(1_100_000, 256, 16, WORKED_SUMS, 0.6, 0.2),
    Phase(300_000, 1024, 4, WORKED_SUMS, 0.2, 0.1),
    Phase(200_000, 2048, 2, WORKED_SUMS, 0.1, 0.0),
)
LAST_COURSE = (
    Phase(150_000, 512, 8, CALCULATOR, 0.0, 0.6),
    Phase(2_048_000, 512, 8, CALCULATOR, 0.6, 0.307),
    Phase(1_228_800, 512, 8, EXPRESSIONS, 0.307, 0.183),
    Phase(204_800, 512, 8, EXPRESSIONS, 0.183, 0.05),
    Phase(122_880, 1024, 4, EXPRESSIONS, 0.05, 0.0),
    Phase(81_920, 512, 8, PATTERNS, 0.0, 0.15),
    Phase(819_200, 512, 8, PATTERNS, 0.15, 0.05),
    Phase(122_880, 1024, 4, PATTERNS, 0.05, 0.0),
)
PHASES = FIRST_COURSES + LAST_COURSE
NUM_TOKENS = sum(phase.tokens for phase in PHASES)

MUON_RATE, ADAM_RATE = 0.02, 3e-3
"""The peak learning rates."""

STEPS_PER_CHUNK = 100
"""Each chunk of data has its own seed, so a resumed run sees the data of an uninterrupted one."""


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenization.MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def phase_at(seen_tokens: float) -> tuple[Phase, float]:
    """The phase at ``seen_tokens``, and the share of it that is done."""
    for phase in PHASES:
        if seen_tokens < phase.tokens:
            return phase, seen_tokens / phase.tokens
        seen_tokens -= phase.tokens
    return PHASES[-1], 1.0


def rate_factor(seen_tokens: float) -> float:
    """The learning rate as a share of the peak."""
    phase, done = phase_at(seen_tokens)
    return phase.rate_from + (phase.rate_to - phase.rate_from) * done


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor, *, bfloat16: bool
) -> torch.Tensor:
    """The weighted mean of the cross entropies of next tokens.

    Args:
        model: the model.
        ids: ``[batch, length]``.
        weights: ``[batch, length]``, the loss weight of each token.
        bfloat16: multiply matrices in that precision.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    losses = functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    return [
        Muon(inner, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(outer, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class Run:
    """A training run: model, optimizers and progress, which are saved to one file."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_tokens: int,
        seed: int,
        *,
        bfloat16: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.bfloat16 = bfloat16
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.scale = num_tokens / NUM_TOKENS
        self.seed = seed
        self.model = LlamaForCausalLM(architecture(tokenizer))
        self.optimizers = make_optimizers(self.model)
        self.peak_rates = [optimizer.defaults["lr"] for optimizer in self.optimizers]
        self.seen_tokens = 0
        self.num_chunks = 0

    @property
    def progress(self) -> float:
        return self.seen_tokens / self.num_tokens

    def start_last_course(self, model: Path) -> None:
        """Takes the weights of a model that has had the other courses, and skips their data."""
        self.model.load_state_dict(LlamaForCausalLM.from_pretrained(model).float().state_dict())
        while self.seen_tokens < self.scale * sum(phase.tokens for phase in FIRST_COURSES):
            phase, steps = self._next_steps()
            self.seen_tokens += steps * phase.length * phase.batch
            self.num_chunks += 1

    def _next_steps(self) -> tuple[Phase, int]:
        """The phase of the next chunk, and how many steps the chunk has."""
        phase, done = phase_at(self.seen_tokens / self.scale)
        left = (1 - done) * phase.tokens * self.scale
        return phase, min(STEPS_PER_CHUNK, math.ceil(left / (phase.length * phase.batch)))

    def chunk(self) -> float:
        """Trains on the next chunk of data, and returns its mean loss."""
        phase, steps = self._next_steps()
        packer = Packer(self.tokenizer, phase.length, phase.mixture)
        batches = packer.batches(seed=self.seed * 1_000_000 + self.num_chunks, size=phase.batch)
        total = 0.0
        for ids, weights in islice(batches, steps):
            total += self._step(ids, weights)
        self.num_chunks += 1
        return total / steps

    def _step(self, ids: torch.Tensor, weights: torch.Tensor) -> float:
        factor = rate_factor(self.seen_tokens / self.scale)
        loss = loss_of(self.model, ids, weights, bfloat16=self.bfloat16)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        self.seen_tokens += ids.numel()
        return float(loss.detach())

    def save_checkpoint(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "seen_tokens": self.seen_tokens,
            "num_chunks": self.num_chunks,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_checkpoint(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seen_tokens, self.num_chunks = state["seen_tokens"], state["num_chunks"]

    def export(self, out: Path) -> None:
        """Writes the files that ship: half-precision weights, configuration and tokenizer."""
        half = LlamaForCausalLM(self.model.config)
        half.load_state_dict(self.model.state_dict())
        half.to(torch.float16)
        half.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=[
                self.tokenizer.convert_tokens_to_ids(t)
                for t in (tokenization.END, tokenization.EOS)
            ],
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=True,
            temperature=0.7,
        )
        half.save_pretrained(out)
        tokenization.save(self.tokenizer, out)


def report(run: Run, loss: float, tokens: int, seconds: float) -> None:
    speed = tokens / seconds
    rate = rate_factor(run.seen_tokens / run.scale)
    left = (run.num_tokens - run.seen_tokens) / speed / 60
    print(
        f"{run.seen_tokens / 1e6:7.2f}M tokens  {run.progress:6.1%}  loss {loss:.4f}  "
        f"rate {rate:.2f}  {speed:,.0f} tokens/s  {left:.0f} min left",
        flush=True,
    )


def train(run: Run, checkpoint: Path) -> None:
    """Runs to the end, and saves after every chunk."""
    while run.seen_tokens < run.num_tokens:
        before, started = run.seen_tokens, time.monotonic()
        loss = run.chunk()
        report(run, loss, run.seen_tokens - before, time.monotonic() - started)
        run.save_checkpoint(checkpoint)


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument(
        "--checkpoint", type=Path, help="file for the state of the run (default: OUT.checkpoint)"
    )
    parser.add_argument(
        "--start", type=Path, help="folder of a model that has had all courses but the last"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument(
        "--tokens",
        type=int,
        default=NUM_TOKENS,
        help="length of the whole run (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply matrices in bfloat16: nearly twice as fast where the processor can",
    )
    arguments = parser.parse_args(None if argv is None else list(argv))

    torch.set_num_threads(arguments.threads)
    checkpoint = arguments.checkpoint or arguments.out.with_suffix(".checkpoint")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run = Run(
        tokenization.build(arguments.seed),
        arguments.tokens,
        arguments.seed,
        bfloat16=arguments.bfloat16,
    )
    num_parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{num_parameters:,} parameters, {arguments.tokens:,} tokens", flush=True)
    if arguments.resume:
        run.load_checkpoint(checkpoint)
    elif arguments.start:
        run.start_last_course(arguments.start)
    train(run, checkpoint)
    run.export(arguments.out)


if __name__ == "__main__":
    main()
