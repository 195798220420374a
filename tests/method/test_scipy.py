"""SciPy's solvers run with the package's operators."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from helpers import CORRECTIONS, DEVICES, ZOO, captured, normal, space

import kfac_viz as kv

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")


def setting():
    F = captured("residual")
    A, M = F.damped(0.05), kv.KFAC(F, 0.05)
    return F, A, M, normal(F.shape[0], seed=3)


def operators():
    F, A, M, g = setting()
    found = [F, A, kv.KroneckerFisher(F), M, kv.Identity(F), kv.Diagonal(F, 0.1), kv.EKFAC(F, 0.1)]
    found += [kv.BlockDiagonal(F, 0.1), kv.BlockTridiagonal(F, 0.1), kv.Dense(A.dense(), F.partition)]
    Z = space("spectral", A, M, g, 2)
    return found + [kv.CoarseCorrection(A, Z)] + [kv.TwoLevel(A, M, Z, correction) for correction in CORRECTIONS]


@pytest.mark.parametrize("which", range(15))
def test_products(which):
    operator = operators()[which]
    L, dense = operator.to_scipy(), operator.dense().numpy()
    assert L.shape == operator.shape and L.dtype == np.float64
    x = normal(operator.shape[0], 3).numpy()
    for found, expected in (
        (L @ x, dense @ x),
        (L @ x[:, 0], dense @ x[:, 0]),
        (L @ x[:, :1], dense @ x[:, :1]),
        (L @ np.arange(operator.shape[0]), dense @ np.arange(operator.shape[0])),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * abs(expected).max())
    if operator.symmetric:
        np.testing.assert_allclose(L.rmatvec(x[:, 0]), dense.T @ x[:, 0], rtol=0, atol=1e-10 * abs(dense @ x).max())
        np.testing.assert_allclose(L.H @ x, dense.T @ x, rtol=0, atol=1e-10 * abs(dense @ x).max())
    else:
        with pytest.raises(ValueError, match=f"'{operator.correction}' is not symmetric"):
            L.rmatvec(x[:, 0])


def test_solvers_and_eigensolvers():
    F, A, M, g = setting()
    Z = space("spectral", A, M, g, 2)
    exact = torch.linalg.solve(A.dense(), g).numpy()
    for correction in CORRECTIONS:
        T = kv.TwoLevel(A, M, Z, correction)
        x, info = sla.gmres(A.to_scipy(), g.numpy(), M=T.to_scipy(), rtol=1e-10)
        assert info == 0
        np.testing.assert_allclose(x, exact, rtol=0, atol=1e-8 * abs(exact).max())
    largest = sla.eigsh(F.to_scipy(), k=3, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(largest), torch.linalg.eigvalsh(F.dense())[-3:].numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.full(51, np.nan), ValueError, "NaN or inf in layer 'body.one'"),
        (np.ones(51, dtype=complex), TypeError, "Fisher is real; got a vector of torch.complex128"),
    ],
)
def test_bad_vectors_are_named(x, error, words):
    with pytest.raises(error, match=words):
        captured("residual").to_scipy() @ x


@pytest.mark.parametrize("device", DEVICES)
def test_numpy_in_numpy_out_whatever_the_device(device):
    model, inputs = ZOO["residual"].make()
    F = kv.capture(model.to(device, torch.float32), inputs.to(device, torch.float32), likelihood="categorical")
    L = F.to_scipy()
    out = L @ np.ones(51)
    assert L.dtype == np.float32 and isinstance(out, np.ndarray) and out.dtype == np.float32
