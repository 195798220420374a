"""Over the whole range of the sliders: finite, symmetric, positive definite, or a sentence."""

import math
import re
import warnings
from functools import cache

import pytest
import torch
from helpers import CORRECTIONS, LIKELIHOODS, SPACES, Positions, mlp, normal, space
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kfac_viz as kv

DAMPINGS = st.one_of(st.floats(-12, 6).map(lambda exponent: 10.0**exponent), st.sampled_from([1e-12, 1e-6, 1.0, 1e6]))
SENTENCE = re.compile("choose a larger damping|does not mend it|linearly dependent|exceeds layer|asks for .* columns")


def scaled(model, factor):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


NETWORKS = {
    "plain": lambda: (mlp((4, 5, 4, 3)), normal(20, 4)),
    "one example": lambda: (mlp((4, 5, 3)), normal(1, 4)),
    "one layer": lambda: (mlp((4, 3)), normal(9, 4)),
    "widths of one": lambda: (mlp((1, 1, 1, 2)), normal(9, 1)),
    "dead inputs": lambda: (mlp((4, 5, 3)), torch.zeros(6, 4, dtype=torch.float64)),
    "saturated": lambda: (scaled(mlp((4, 5, 4, 3)), 60), normal(20, 4)),
    "tiny weights": lambda: (scaled(mlp((4, 5, 4, 3)), 1e-6), normal(20, 4)),
    "large inputs": lambda: (mlp((4, 5, 3), torch.nn.ReLU), 1e4 * normal(20, 4)),
    "positions": lambda: (Positions(3), normal(6, 2, 3)),
}


@cache
def fisher(network, likelihood, flavour, dtype):
    model, inputs = NETWORKS[network]()
    return kv.capture(model.double().to(dtype), inputs.to(dtype), likelihood=likelihood, fisher=flavour)


FISHERS = st.builds(
    fisher,
    st.sampled_from(list(NETWORKS)),
    st.sampled_from(LIKELIHOODS),
    st.sampled_from(["exact", "mc"]),
    st.sampled_from([torch.float64, torch.float32]),
)
ONE_LEVEL = {
    "eigen": kv.KFAC,
    "factored": lambda F, damping: kv.KFAC(F, damping, rule="factored"),
    "ekfac": kv.EKFAC,
    "blocks": kv.BlockDiagonal,
    "diagonal": kv.Diagonal,
    "tridiagonal": lambda F, damping: kv.BlockTridiagonal(F, damping, convention="reduce"),
}


def attempt(build):
    """The result, or a discarded example where the answer is a sentence that says what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return build()
    except ValueError as refusal:
        assert SENTENCE.search(str(refusal)), refusal
        assume(False)


def assert_symmetric_positive_definite(operator):
    matrix = operator.dense()
    assert torch.isfinite(matrix).all()
    scale = float(matrix.abs().max())
    precision = 1e3 * torch.finfo(matrix.dtype).eps
    assert float((matrix - matrix.T).abs().max()) <= precision * scale
    assert float(torch.linalg.eigvalsh(matrix.double())[0]) > -precision * scale
    for seed in range(3):
        r = normal(operator.shape[0], seed=seed).to(matrix.dtype)
        assert float(r @ (operator @ r)) > 0


@given(FISHERS, DAMPINGS, st.sampled_from(list(ONE_LEVEL)))
@settings(max_examples=150)
def test_one_level(F, damping, name):
    M = attempt(lambda: ONE_LEVEL[name](F, damping))
    assert_symmetric_positive_definite(M)
    assert_symmetric_positive_definite(attempt(lambda: M.with_damping(damping * 10)))


@given(st.sampled_from(list(NETWORKS)), st.sampled_from(LIKELIHOODS), DAMPINGS)
def test_in_float64_a_positive_damping_is_never_refused(network, likelihood, damping):
    """What the sliders reach has an answer: K-FAC under both rules, EKFAC and the exact blocks."""
    F = fisher(network, likelihood, "exact", torch.float64)
    for name in ("eigen", "factored", "ekfac", "blocks", "diagonal"):
        assert torch.isfinite(ONE_LEVEL[name](F, damping).dense()).all()


@given(
    FISHERS,
    DAMPINGS,
    DAMPINGS,
    st.sampled_from(["eigen", "factored"]),
    st.sampled_from(SPACES),
    st.integers(0, 30),
    st.sampled_from(["itself", "kronecker"]),
)
@settings(max_examples=300)
def test_two_levels(F, damping, moved, rule, name, per_layer, coarse):
    A, M = F.damped(damping), attempt(lambda: kv.KFAC(F, damping, rule))
    K = kv.KroneckerFisher(F, "reduce").damped(damping) if coarse == "kronecker" else None
    g = F @ normal(F.shape[0]).to(F.dtype)
    Z = attempt(lambda: space(name, A, M, g, per_layer))
    T = attempt(lambda: kv.TwoLevel(A, M, Z, coarse_operator=K))
    for level in (T, attempt(lambda: T.with_damping(moved))):
        for correction in CORRECTIONS:
            corrected = level.with_correction(correction)
            assert torch.isfinite(corrected @ g).all()
            assert torch.isfinite(corrected.contribution()).all()
        assert_symmetric_positive_definite(level.with_correction("additive"))
        if F.dtype == torch.float64 and level.damping >= 1e-6 * float(F.diagonal().max()):
            assert_symmetric_positive_definite(level.with_correction("balanced"))


@given(FISHERS, DAMPINGS, st.integers(0, 5), st.sampled_from(CORRECTIONS))
@settings(max_examples=100)
def test_what_a_panel_shows(F, damping, per_layer, correction):
    """Directions, captured decrease and spectrum: numbers, never NaN."""
    A, M = F.damped(damping), attempt(lambda: kv.KFAC(F, damping))
    T = attempt(lambda: kv.TwoLevel(A, M, kv.coarse.spectral(F, per_layer), correction))
    g = F @ normal(F.shape[0]).to(F.dtype)
    assume(float(g.norm()) > 1e-15)
    exact = attempt(lambda: A.solve(g))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        A.solve(g)
    shares = attempt(lambda: [kv.captured_decrease(A, g, v) for v in (M @ g, T @ g, exact)])
    values = attempt(lambda: kv.spectrum(A, T))
    assert all(map(math.isfinite, shares)) and torch.isfinite(values).all()
    if F.dtype == torch.float64:  # exact, or the solution says that it is not
        assert abs(shares[2] - 1) < 1e-6 or any("is not accurate" in str(warning.message) for warning in told)


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=6),
    st.integers(1, 8),
    st.sampled_from(LIKELIHOODS),
    st.booleans(),
    DAMPINGS,
)
@settings(max_examples=100)
def test_any_widths_and_batch_sizes(widths, n, likelihood, bias, damping):
    widths = [*widths[:-1], widths[-1] + 1]  # two classes at least
    F = kv.capture(mlp(widths, bias=bias), normal(n, widths[0]), likelihood=likelihood)
    matrix = F.dense()
    assert F.partition.size == sum((a + bias) * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    assert float((F @ F.eye() - matrix).abs().max()) <= 1e-13 * float(matrix.abs().max())
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-13 * float(matrix.abs().max())
    T = kv.TwoLevel(F.damped(damping), kv.KFAC(F, damping), kv.coarse.nicolaides(F, 1), "additive")
    assert_symmetric_positive_definite(T)


@pytest.mark.parametrize("damping", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("network", NETWORKS)
def test_preconditioners_invert_what_they_say_at_the_ends_of_the_range(network, damping):
    """Relative to the size of the product, not only to λ: M (M⁻¹ r) = r."""
    F = fisher(network, "categorical", "exact", torch.float64)
    M = kv.KFAC(F, damping)
    blocks = [torch.kron(G, A) for G, A in zip(F.kronecker().G, F.kronecker().A, strict=True)]
    damped = torch.block_diag(*blocks) + damping * F.eye()
    r = normal(F.shape[0])
    condition = float(torch.linalg.eigvalsh(damped)[-1]) / damping
    assert float((M @ (damped @ r) - r).norm() / r.norm()) < 1e-14 * max(1.0, condition) * 10
