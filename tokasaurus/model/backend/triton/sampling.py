"""Launches the kernels of sampling. Importing this imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tokasaurus.model.backend.triton import sampling_kernels
from tokasaurus.model.backend.triton.shapes import power_of_2

__all__ = ["TRITON_SAMPLING", "TritonSampling"]

# Tokens that a program looks at together.
_TILE = 2048

_MAX_ID = (1 << 31) - 1


class TritonSampling:
    """Implements ``SamplingKernels``."""

    def draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        if len(logits):
            # A copy, since bytes may lie anywhere and the kernel reads words.
            words = draws.clone(memory_format=torch.contiguous_format).view(torch.int32)
            sampling_kernels.draw_token[len(logits),](
                logits, words, tokens, logits.stride(0), **_constants(logits)
            )
        return tokens

    def log_sums(
        self,
        logits: Tensor,
        index: Tensor | None,
        temperature: Tensor | None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        device = logits.device
        # Made where they are not given, so that one kernel serves all that may be asked for.
        if index is None:
            index = torch.arange(len(logits), device=device)
        count = len(index)
        if temperature is None:
            temperature = torch.ones(count, dtype=torch.float32, device=device)
        norms = torch.empty(count, dtype=torch.float32, device=device)
        higher = None
        if token_ids is not None:
            higher = torch.empty(count, dtype=torch.int64, device=device)
        if count:
            sampling_kernels.sum_row[count,](
                logits,
                index,
                temperature,
                index if token_ids is None else token_ids,
                norms,
                index if higher is None else higher,
                logits.stride(0),
                COUNTS=token_ids is not None,
                **_constants(logits),
            )
        return norms, higher

    def ranked(
        self, logits: Tensor, index: Tensor | None, temperature: Tensor | None, depth: int
    ) -> tuple[Tensor, Tensor]:
        # In torch: few rows ask for it, and a sort is no loss to a kernel of ours.
        scores = (logits if index is None else logits[index]).to(torch.float32)
        if temperature is not None:
            scores = scores / temperature[:, None]
        # Numbers that are ordered like the tokens: by score, then by descending id. The bits of
        # positive fp32 numbers are ordered like these, and those of negative ones the other way
        # round. Adding 0 makes -0.0 equal to 0.0.
        bits = (scores + 0.0).view(torch.int32)
        ordered = (bits ^ ((bits >> 31) & _MAX_ID)).to(torch.int64)
        ids = torch.arange(scores.shape[1], device=logits.device)
        ids = _MAX_ID - (((ordered << 32) + (_MAX_ID - ids)).topk(depth, dim=-1).values & _MAX_ID)
        return scores.gather(1, ids), ids

    def mask(self, adjusted: Tensor, logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
        masked = adjusted.clone(memory_format=torch.contiguous_format)
        if len(rows):
            sampling_kernels.mask_row[len(rows),](
                masked,
                logits,
                rows,
                bits,
                masked.stride(0),
                logits.stride(0),
                bits.stride(0),
                IS_ADJUSTED=adjusted is not logits,
                **_constants(logits),
            )
        return masked


TRITON_SAMPLING = TritonSampling()


def _constants(logits: Tensor) -> dict[str, int | bool]:
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    size = logits.shape[1]
    return {
        "SIZE": size,
        "TILE": min(_TILE, power_of_2(size)),
        "num_warps": 8,
        "enable_fp_fusion": False,
    }
