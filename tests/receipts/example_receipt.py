"""A receipt with one prompt and two samples, for tests without an engine."""

from __future__ import annotations

from typing import Any

from tokasaurus.receipts.form import sealed


def sections() -> dict[str, Any]:
    return {
        "model": {
            "weights": {
                "digest": "aa",
                "parts": {"model.layers.0": "a0", "model.layers.1": "a1", "lm_head.weight": "a2"},
            },
            "tokenizer": {"digest": "bb", "chat_template": "cc"},
            "config": {"num_layers": 2, "rms_norm_eps": 1e-05},
        },
        "engine": {"tokasaurus": "1.2.3", "kernels": {"attention": {"source": "dd"}}},
        "configuration": {"dtype": "float32", "torch_compile": False},
        "request": [
            {
                "prompt_ids": [5, 6, 7],
                "n": 2,
                "temperature": 1.0,
                "top_p": 0.9,
                "seed": "9223372036854775807",
                "logit_bias": {"5": -1.0},
            }
        ],
        "answer": [
            {
                "choices": [
                    {
                        "index": index,
                        "token_ids": [1, 2, 3],
                        "text": "naïve \U0001f600",
                        "finish_reason": "length",
                        "logprobs": {
                            "chosen": "bf000000bf800000c0000000",
                            "top_ids": [[1], [2], [3]],
                            "top": "bf000000bf800000c0000000",
                        },
                    }
                    for index in range(2)
                ],
                "prompt_logprobs": {"chosen": "bf000000", "top_ids": [[]], "top": ""},
            }
        ],
        "environment": {"threads": 2, "processor": "fast", "model": None},
    }


def example_receipt() -> dict[str, Any]:
    return sealed(sections())
