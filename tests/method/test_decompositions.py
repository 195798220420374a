"""Eigenvalues of symmetric matrices: one routine, against NumPy, and where LAPACK gives up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, normal

import kfac_viz as kv
from kfac_viz.method.decompositions import eigh, eigvalsh


def symmetric(*shape: int) -> torch.Tensor:
    X = normal(*shape)
    return X + X.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 130])
def test_eigenvalues_are_those_of_numpy_and_of_the_eigenvectors(n, dtype):
    matrix = symmetric(n, n).to(dtype)
    before, found = matrix.clone(), eigvalsh(matrix, "The matrix")
    assert found.dtype == dtype and torch.equal(matrix, before)
    assert torch.equal(found, found.sort().values)
    expected = torch.from_numpy(np.linalg.eigvalsh(before.double().numpy()))
    assert_close(found.double(), expected, 1e-12 if dtype == torch.float64 else 1e-5)
    d, U = eigh(matrix, "The matrix")
    assert_close(found, d, 1e-12 if dtype == torch.float64 else 1e-5)
    assert_close((U * d) @ U.T, before, 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_transposed_or_cut_matrix_and_one_that_requires_grad_have_eigenvalues_too():
    whole = symmetric(9, 9)
    expected = np.linalg.eigvalsh(whole[::2, ::2].numpy())
    for matrix in (whole[::2, ::2], whole[::2, ::2].T, whole[::2, ::2].clone().requires_grad_()):
        assert_close(eigvalsh(matrix, "The matrix"), torch.from_numpy(expected), 1e-13)


def test_an_empty_and_a_zero_matrix():
    assert eigvalsh(torch.zeros(3, 3), "The matrix").tolist() == [0.0] * 3
    assert eigvalsh(torch.zeros(0, 0), "The matrix").tolist() == []


@pytest.mark.parametrize("fails", ["raises", "answers NaN"])
def test_eigenvalues_are_found_where_lapack_gives_up(monkeypatch, fails):
    matrix, original = symmetric(6, 6).float(), np.linalg.eigvalsh
    expected = torch.from_numpy(original(matrix.double().numpy()))

    def gives_up(x):
        if x.dtype == np.float64:
            return original(x)
        if fails == "raises":
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return original(x) * np.nan

    monkeypatch.setattr(np.linalg, "eigvalsh", gives_up)
    assert_close(eigvalsh(matrix, "The matrix").double(), expected, 1e-6)


def test_where_there_are_none_a_sentence_says_so(monkeypatch):
    with pytest.raises(ValueError, match="The matrix overflows torch.float64; choose another damping"):
        eigvalsh(torch.full((3, 3), torch.inf, dtype=torch.float64), "The matrix")

    def never(x):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", never)
    with pytest.raises(ValueError, match="No eigenvalues were found of: The matrix"):
        eigvalsh(symmetric(3, 3), "The matrix")


def test_nothing_else_in_the_package_asks_lapack_for_eigenvalues():
    package = Path(kv.__file__).parent
    asking = {path.name for path in package.rglob("*.py") if "linalg.eigvalsh" in path.read_text()}
    assert asking == {"decompositions.py"}
