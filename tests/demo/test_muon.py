"""The optimizer, compared with a singular value decomposition."""

from __future__ import annotations

import torch

from tokasaurus.demo.muon import Muon, orthogonalise


def test_orthogonalise_keeps_singular_vectors_and_brings_values_near_one() -> None:
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        torch.manual_seed(0)
        matrices = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        result = orthogonalise(matrices)
        sizes = u.mT @ result @ vh.mT  # diagonal if the singular vectors are unchanged
        diagonal = torch.diagonal(sizes, dim1=-2, dim2=-1)
        assert (sizes - torch.diag_embed(diagonal)).abs().max() < 1e-3, shape
        assert diagonal.median() > 0.6, shape
        assert diagonal.max() < 1.3, shape


def test_the_optimizer_minimises() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 12)
    parameter = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([parameter], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        ((parameter - target) ** 2).sum().backward()
        optimizer.step()
    assert (parameter - target).abs().max() < 0.3
