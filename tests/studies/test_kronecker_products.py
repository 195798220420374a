"""The study of four Kronecker products: its numbers against dense definitions, and its facts."""

import numpy as np
import pytest
import torch

import kfac_viz as kv
from kfac_viz.method.products import FACTORS
from kfac_viz.studies.kronecker_products import COMPARED, GROUPS, NETWORKS, _block, _steps, divergence, network_of

PLACE = ("mlp", 40, 0, 5, "cpu")


def test_the_divergence_is_that_of_two_normal_distributions():
    block = _block(PLACE, 2).matrices
    B = block["block"]
    for rule in FACTORS:
        K, λ = block[rule], 1e-2
        k, U = torch.linalg.eigh(K)
        found = divergence(torch.linalg.eigvalsh(B), k, ((B @ U) * U).sum(0), λ)
        p, q = (
            torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=X.dtype), X + λ * torch.eye(len(X)))
            for X in (B, K)
        )
        expected = float(torch.distributions.kl_divergence(p, q)) / len(B)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_step_is_too_long_by_the_curvature_over_the_products():
    block, λ = _block(PLACE, 2), 1e-3
    B = block.matrices["block"]
    for rule in FACTORS:
        k, U = torch.linalg.eigh(block.matrices[rule])
        ratios = torch.stack([(u @ B @ u + λ) / (value + λ) for value, u in zip(k, U.T, strict=True)]).flip(0)
        expected = [float(part.mean()) for part in np.array_split(ratios.numpy(), GROUPS)]
        np.testing.assert_allclose(block.too_long(λ)["too_long", rule], expected, rtol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_product_nearest_in_divergence_is_right_on_average(network):
    """``tr(K⁻¹ F)`` is the rank of K: without damping the mean of the factors is 1, where there is any curvature."""
    place = (network, 40, 0, 5, "cpu")
    F = network_of(*place).F
    for number in (1, 2, 3):
        k, seen = _block(place, number).along["kl"]
        within = k > 1e-9 * k[-1]
        assert float((seen[within] / k[within]).mean()) == pytest.approx(1, abs=1e-5)
    assert not F.kronecker(factors="kl").undetermined


def test_steps_capture_what_the_preconditioners_do():
    s, found = network_of(*PLACE), _steps(PLACE)
    at = COMPARED.index(1e-3)
    A = s.F.damped(1e-3)
    for rule in FACTORS:
        v = kv.KFAC(s.F, 1e-3, factors=rule) @ s.g
        assert found["captured", rule][at] == pytest.approx(kv.captured_decrease(A, s.g, v), rel=1e-8)
    assert found["at_best_length", "block-diagonal"][at] <= 1 + 1e-9


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_has_its_four_products(network):
    layers = [layer for layer in network_of(network, 40, 0, 2).F.partition.layers if not layer.vector]
    for number in (1, len(layers), 8):
        result = kv.studies.kronecker_products.run(network=network, layer=number, n=40, steps=2, repeats=1)
        layer = layers[min(number, len(layers)) - 1]
        assert f"{min(number, len(layers))} of {len(layers)} ({layer.out} × {layer.features})" in result.where
        errors = {rule: c.y[0] for rule, c in result.of("error").items()}
        assert min(errors, key=errors.get) == "nearest" or errors["nearest"] == pytest.approx(min(errors.values()))


def test_the_table_has_all_networks_and_optimizers():
    table = kv.studies.kronecker_products.run(n=50, steps=2, repeats=2).table()
    for network in NETWORKS:
        rows = table[table.quantity == f"at_best_length, {network}"]
        assert {*FACTORS, "Adam", "Shampoo", "SOAP", "Muon", "ekfac", "block-diagonal"} <= set(rows.series)
        assert ((rows.low <= rows["median"]) & (rows["median"] <= rows.high) & (rows.high <= 1 + 1e-9)).all()
