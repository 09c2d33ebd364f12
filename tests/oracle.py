"""The oracle: transformers, with weights in fp32, judges the tokens that our engine generated.

Greedy decoding is checked by teacher forcing. One forward pass of the reference over prompt and
completion shows, for each generated token, whether it is the reference's best one. That is the
token that ``transformers.generate`` would have produced after the same tokens. The method also
checks the tokens after a tie.
"""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import TRANSFORMERS, rope_fields
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tokasaurus.cartridge_training.distillation import cache_argument

# The two best logits may come in either order if they are closer than this.
TIE = 1e-5
LOGPROB_TOLERANCE = 1e-4


@lru_cache(maxsize=4)
def reference_model(path: Path) -> Any:
    config = AutoConfig.from_pretrained(path)
    if TRANSFORMERS == 4 and hasattr(config, "rope_parameters"):
        # It takes a config.json of transformers 5, and computes without what this field says.
        for name, value in rope_fields(config.rope_parameters).items():
            setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


@lru_cache(maxsize=4)
def _reference_in_fp64(path: Path) -> Any:
    """The same weights. transformers computes norms and angles in fp32 all the same."""
    return deepcopy(reference_model(path)).double()


def reference_generate(path: Path, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy ids of transformers' own ``generate``, which ignores the end of sequence."""
    model = reference_model(path)
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return ids[0, len(prompt_ids) :].tolist()


def reference_logits(path: Path, prompt_ids: list[int], token_ids: list[int]) -> torch.Tensor:
    """The logits that predict each generated token, [generated, vocabulary], computed in fp64.

    In fp32, the reference's own rounding may be larger than what is asked of the engine: after a
    text that the bundled model finds unlikely, its logits were off by up to 1.5e-4; a logprob of
    the reference was off by 1e-4, and the engine's by 5e-6.
    """
    model = _reference_in_fp64(path)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + token_ids])).logits[0]
    return logits[len(prompt_ids) - 1 : -1].float()


def reference_cache(path: Path, ids: list[int]) -> DynamicCache:
    """What transformers keeps of a text; each of its layers has keys and values."""
    model, cache = reference_model(path), DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=True, **cache_argument(model, cache))
    return cache


def assert_greedy(
    path: Path, prompt_ids: list[int], token_ids: list[int], logprobs: list[float] | None = None
) -> None:
    """Asserts that each token is the reference's best one, and its logprob the reference's."""
    logits = reference_logits(path, prompt_ids, token_ids)
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    short = logits.max(1).values - chosen
    assert short.max() <= TIE, f"token {int(short.argmax())} is {short.max():.2e} below the best"
    if logprobs is not None:
        expected = chosen - torch.logsumexp(logits, 1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=LOGPROB_TOLERANCE, rtol=0)
