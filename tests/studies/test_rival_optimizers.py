"""Muon, SOAP and Shampoo as their libraries have them, beside the papers' formulas for one step."""

import pytest
import torch
from helpers import ZOO, assert_close, benchmark, targets_for

import kfac_viz as kv
from kfac_viz.studies.common.batches import directions, parts_of

N, LR = 12, 1e-3
SHAMPOO = {"start_preconditioning_step": 1, "preconditioning_compute_steps": 1, "shape_interpretation": False,
           "use_svd": True, "graft_type": 0, "matrix_eps": 1e-14}  # fmt: skip


def moved(name, opt, steps):
    """What so many steps with one gradient change in a network, as a vector over its layers, and that gradient."""
    model, x = ZOO[name].make(N)
    y = targets_for(model(x).detach(), "categorical")
    F = kv.capture(model, x, y, likelihood="categorical", fisher="empirical")
    kv.nll(model(x), y, "categorical").backward()
    gradient = F.partition.pack_grad(model)
    before = F.partition.pack(model).clone()
    made = opt(model)
    for _ in range(steps):
        made.step()
    return F, before - F.partition.pack(model), gradient


def weights(F, v):
    return [F.partition.matrices(v)[l][rows, columns] for l, rows, columns in parts_of(F.partition)
            if columns.stop - columns.start > 1]  # fmt: skip


@pytest.mark.parametrize("name", ["tanh", "conv"])
def test_muon_takes_the_papers_direction_of_each_weight_matrix(name):
    """Its iteration stops with singular values between about 0.7 and 1.2, in 8 bits."""
    F, v, g = moved(name, lambda model: benchmark("optimizers").muon(model, LR), 1)
    for found, expected, V in zip(weights(F, v), weights(F, directions(F, g, N)["muon"]), weights(F, g), strict=True):
        found = found / (0.2 * max(V.shape) ** 0.5 * LR)
        d = torch.linalg.svdvals(V)
        within = d > 0.1 * d[0]  # of the others the iteration has not made 1 yet
        U, _, W = torch.linalg.svd(V, full_matrices=False)
        made, wanted = ((U.T @ X @ W.T)[within][:, within] for X in (found, expected))
        assert (made - wanted).abs().max() < 0.4
        assert torch.nn.functional.cosine_similarity(made.flatten(), wanted.flatten(), 0) > 0.97


@pytest.mark.parametrize("name", ["tanh", "conv"])
def test_soap_and_shampoo_of_the_library_step_as_the_papers_do(name):
    """With the same gradient again and again averages are that gradient's matrices; SOAP's first step only gathers.
    Grafting is off: it changes the length of a weight's step alone."""
    pytest.importorskip("pytorch_optimizer", reason="not installed: pip install 'kfac_viz[bench]'")
    make = benchmark("optimizers")
    F, v, g = moved(name, lambda model: make.shampoo(model, LR, **SHAMPOO), 1)
    for found, expected in zip(weights(F, v), weights(F, directions(F, g, N, epsilon=1e-11)["shampoo"]), strict=True):
        assert_close(found / found.norm(), expected / expected.norm(), 1e-4)
    F, v, g = moved(name, lambda model: make.soap(model, LR, weight_decay=0.0), 2)
    for found, expected in zip(weights(F, v), weights(F, directions(F, g, N)["soap"]), strict=True):
        assert_close(found / LR, expected, 1e-3)
