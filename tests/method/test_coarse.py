"""Coarse spaces: what their columns are, that they are nested, and that no large matrix is formed for them."""

import pytest
import torch
from helpers import SPACES, assert_close, captured, mlp, normal, space
from torch import Tensor

import kfac_viz as kv
from kfac_viz.method.columns import LocalSpace, RankOneSpace
from kfac_viz.method.operator import Operator

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")

CASES = ["residual", "sigmoid, some bias", "positions, T² > S", "conv", "called twice"]


def setting(case="residual", damping=0.1):
    F = captured(case)
    A, M = F.damped(damping), kv.KFAC(F, damping)
    return F, A, M, normal(F.shape[0], seed=3)


def in_span(columns: Tensor, basis: Tensor, tol: float = 1e-9) -> bool:
    Q, _ = torch.linalg.qr(basis)
    outside = columns - Q @ (Q.T @ columns)
    return float((outside.norm(dim=0) / columns.norm(dim=0)).max()) < tol


# ---- all spaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("per_layer", [0, 1, 3])
def test_every_form_of_a_space_is_the_same_matrix(name, per_layer, case):
    F, A, M, g = setting(case)
    Z = space(name, A, M, g, per_layer)
    dense = Z.dense()
    assert dense.shape == (F.shape[0], Z.size) and Z.size == per_layer * len(F.partition)
    assert torch.linalg.matrix_rank(dense) == Z.size if Z.size else dense.numel() == 0
    eye = torch.eye(Z.size, dtype=torch.float64)
    assert_close(Z.prolong(eye), dense.T, 1e-14)
    assert_close(Z.restrict(F.eye()), dense, 1e-14)
    assert_close(Z.gram(), dense.T @ dense)
    assert_close(F.image(Z).U, F.scores(dense.T).flatten(1), 1e-11)
    c, r = normal(Z.size), normal(F.shape[0])
    assert_close(Z.prolong(c), dense @ c)
    assert_close(Z.restrict(r), dense.T @ r)
    assert_close(Z.restrict(torch.stack([r, -2 * r])), torch.stack([dense.T @ r, -2 * dense.T @ r]))
    assert_close(Z.add_(r.clone(), c, alpha=-0.5), r - 0.5 * dense @ c)
    assert Z.restrict(r[None][:0]).shape == (0, Z.size)
    assert Z.prolong(c[None][:0]).shape == (0, F.shape[0])


@pytest.mark.parametrize("case", ["residual", "sigmoid, some bias", "conv"])
@pytest.mark.parametrize("name", SPACES)
def test_nested_larger_spaces_contain_the_smaller(name, case):
    F, A, M, g = setting(case)
    spaces = [space(name, A, M, g, k) for k in range(1, 7)]
    for small, large in zip(spaces[:-1], spaces[1:], strict=True):
        assert in_span(small.dense(), large.dense())
        if name == "optimal":  # one list of eigenvectors for the whole matrix
            assert_close(large.dense()[:, : small.size], small.dense(), 1e-14)
        else:  # the smaller space's columns come first within each layer
            k = small.size // len(F.partition)
            first = [l * (k + 1) + j for l in range(len(F.partition)) for j in range(k)]
            assert_close(large.dense()[:, first], small.dense(), 1e-12)


@pytest.mark.parametrize("name", ["nicolaides", "spectral", "smooth", "krylov", "random"])
def test_each_column_lives_in_one_layer(name):
    F, A, M, g = setting()
    dense = space(name, A, M, g, 2).dense()
    for l, s in enumerate(F.partition.slices):
        outside = dense[:, 2 * l : 2 * l + 2].clone()
        outside[s] = 0
        assert not outside.any() and dense[s, 2 * l : 2 * l + 2].any()


@pytest.mark.parametrize("name", SPACES)
def test_full_spaces_span_everything(name):
    """As many columns per layer as the layer has parameters."""
    F = kv.capture(mlp((2, 2, 2), bias=False), normal(40, 2), likelihood="categorical")
    A, M = F.damped(0.1), kv.KFAC(F, 0.1)
    if name == "krylov":  # needs distinct eigenvalues
        A = kv.Dense(torch.diag(torch.arange(1.0, 9.0).double()), F.partition)
        M = kv.Identity(A)
    Z = space(name, A, M, normal(8, seed=3), 4)
    assert Z.size == F.shape[0] == 8 and torch.linalg.matrix_rank(Z.dense()) == 8


@pytest.mark.parametrize("name", SPACES)
def test_building_twice_gives_the_same_bits(name):
    _, A, M, g = setting()
    assert torch.equal(space(name, A, M, g, 2).dense(), space(name, A, M, g, 2).dense())


# ---- each space against its definition ---------------------------------------------------------------


def test_nicolaides_is_one_constant_per_layer():
    F = captured("residual")
    expected = torch.block_diag(*(torch.ones(layer.size, 1) for layer in F.partition.layers)).double()
    assert torch.equal(kv.coarse.nicolaides(F).dense(), expected)


def test_nicolaides_splits_the_largest_rectangle_along_its_longer_side():
    partition = kv.Partition((kv.method.partition.Layer("0", 2, 3),))
    Z = kv.coarse.nicolaides(kv.Dense(torch.eye(6), partition), per_layer=3).dense().T.view(3, 2, 3)
    expected = torch.tensor(
        [
            [[1, 1, 1], [1, 1, 1]],
            [[1, 0, 0], [1, 0, 0]],  # three columns are longer than two rows
            [[0, 1, 1], [0, 0, 0]],  # the rest is a square: rows first
        ]
    )
    assert torch.equal(Z, expected.float())


def test_nicolaides_aggregates_are_disjoint_halves():
    """All columns are indicators, and every cut halves one aggregate: its span holds both halves."""
    partition = kv.Partition((kv.method.partition.Layer("0", 4, 4),))
    Z = kv.coarse.nicolaides(kv.Dense(torch.eye(16), partition), per_layer=16)
    assert set(Z.dense().unique().tolist()) == {0.0, 1.0}
    assert torch.linalg.matrix_rank(Z.dense()) == 16


@pytest.mark.parametrize(("name", "largest"), [("spectral", True), ("smooth", False)])
def test_spectral_and_smooth_are_extreme_eigenvectors_of_each_kronecker_block(name, largest):
    F = captured("residual")
    Z = getattr(kv.coarse, name)(F, 3).dense()
    for l, s in enumerate(F.partition.slices):
        A, G = F.factors(l, l)
        block, V = torch.kron(G, A), Z[s, 3 * l : 3 * l + 3]
        values = torch.linalg.eigvalsh(block)
        expected = values.flip(0)[:3] if largest else values[:3]
        assert_close(V.T @ V, torch.eye(3, dtype=torch.float64))
        assert float((block @ V - V * expected).abs().max()) < 1e-13 * float(values[-1])


def test_spectral_takes_factors_from_a_preconditioner_too():
    F = captured("conv")
    from_fisher = kv.coarse.spectral(F, 2).dense()
    assert_close(kv.coarse.spectral(kv.KFAC(F, 0.1), 2).dense(), from_fisher)
    assert_close(kv.coarse.spectral(F.kronecker(), 2).dense(), from_fisher)
    reduced = kv.coarse.spectral(kv.KFAC(F, 0.1, convention="reduce"), 2).dense()
    assert float((reduced - from_fisher).abs().max()) > 1e-3


def test_krylov_spans_the_layers_pieces_of_powers():
    F, A, M, g = setting()
    Z = kv.coarse.krylov(A, M, g, 3)
    v = M.dense() @ g
    powers = [v, M.dense() @ A.dense() @ v, M.dense() @ A.dense() @ M.dense() @ A.dense() @ v]
    for l, s in enumerate(F.partition.slices):
        pieces = torch.stack([p[s] for p in powers], dim=1)
        basis = Z.dense()[s, 3 * l : 3 * l + 3]
        assert in_span(pieces, basis, 1e-10)
        assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))


def test_krylov_counts_what_it_removed_by_layer_and_power():
    """A diagonal matrix with d distinct values per layer has Krylov pieces of dimension d."""
    partition = kv.Partition.from_sizes([3, 4])
    A = kv.Dense(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]).double()), partition)
    with pytest.warns(UserWarning, match=r"columns \[1, 2, 5\] of the coarse space 'krylov'"):
        Z = kv.coarse.krylov(A, kv.Identity(A), normal(7), 3)
    assert Z.removed == (1, 2, 5) and Z.per_layer == (1, 2) and Z.size == 3
    assert "3 dependent removed" in repr(Z)


def test_krylov_of_a_zero_gradient_is_empty():
    _, A, M, g = setting()
    with pytest.warns(UserWarning, match="Removed"):
        Z = kv.coarse.krylov(A, M, 0 * g, 2)
    assert Z.size == 0 and len(Z.removed) == 6
    assert torch.equal(kv.TwoLevel(A, M, Z) @ g, M @ g)


def test_random_is_reproducible_and_leaves_the_global_generator_alone():
    F = captured("residual")
    state = torch.random.get_rng_state()
    assert torch.equal(kv.coarse.random(F, 2, seed=1).dense(), kv.coarse.random(F, 2, seed=1).dense())
    assert not torch.equal(kv.coarse.random(F, 2, seed=1).dense(), kv.coarse.random(F, 2, seed=2).dense())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_columns_of_layers_of_one_shape_differ():
    F = kv.capture(mlp((3, 3, 3)), normal(5, 3), likelihood="gaussian")
    (W, U), (X, V) = kv.coarse.random(F, 2).factors
    assert W.shape == X.shape and float((W - X).abs().min()) > 1e-3 and float((U - V).abs().min()) > 1e-3


def test_a_basis_of_nearly_dependent_columns_is_orthonormal():
    """Krylov pieces soon point the same way: one sweep of Gram–Schmidt would lose orthogonality."""
    partition = kv.Partition.from_sizes([30])
    A = kv.Dense(torch.diag(torch.linspace(1, 2, 30).double()), partition)
    Z = kv.coarse.krylov(A, kv.Identity(A), torch.ones(30, dtype=torch.float64), 9)
    assert Z.size == 9
    assert_close(Z.gram(), torch.eye(9, dtype=torch.float64), 1e-13)


def test_optimal_leaves_the_smallest_largest_eigenvalue_in_balanced_form():
    F, A, M, g = setting()
    values = kv.spectrum(A, M)
    best = kv.spectrum(A, kv.TwoLevel(A, M, kv.coarse.optimal(A, M, 2), "balanced"))[-1]
    assert abs(best - max(1.0, values[-7])) < 1e-10 * best  # 6 columns: the seventh largest is left
    for name in ("nicolaides", "spectral", "smooth", "krylov", "random"):
        other = kv.spectrum(A, kv.TwoLevel(A, M, space(name, A, M, g, 2), "balanced"))[-1]
        assert other >= best - 1e-10
    for seed in range(5):
        Z = kv.CoarseSpace(F.partition, normal(F.shape[0], 6, seed=seed))
        assert kv.spectrum(A, kv.TwoLevel(A, M, Z, "balanced"))[-1] >= best - 1e-10


# ---- the reader's own columns ------------------------------------------------------------------------


def test_own_columns_lose_dependent_ones_and_say_which():
    P = kv.Partition.from_sizes([3, 3])
    x, y = normal(6, seed=1), normal(6, seed=2)
    columns = torch.stack([x, torch.zeros(6).double(), y, 1e8 * x - 3 * y, normal(6, seed=4)], dim=1)
    with pytest.warns(UserWarning, match=r"linearly dependent columns \[1, 3\] of the coarse space 'mine'"):
        Z = kv.CoarseSpace(P, columns, name="mine")
    assert Z.removed == (1, 3) and torch.equal(Z.dense(), columns[:, [0, 2, 4]])
    assert "2 dependent removed" in repr(Z) and "mine" in repr(Z)


def test_own_columns_are_copied():
    columns = normal(6, 2)
    Z = kv.CoarseSpace(kv.Partition.from_sizes([6]), columns)
    before = Z.dense()
    columns.zero_()
    Z.dense().zero_()
    assert torch.equal(Z.dense(), before)


def test_tiny_and_huge_columns_are_not_dependent():
    columns = normal(6, 3) * torch.tensor([1e-150, 1.0, 1e150], dtype=torch.float64)
    assert kv.CoarseSpace(kv.Partition.from_sizes([6]), columns).size == 3


# ---- the coarse operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SPACES)
def test_both_coarse_operators_equal_z_a_z(name, case):
    F, A, M, g = setting(case)
    K = kv.KroneckerFisher(F, convention="reduce").damped(0.1)
    Z = space(name, A, M, g, 2)
    dense = Z.dense()
    assert_close(kv.CoarseCorrection(A, Z).E.dense(), dense.T @ A.dense() @ dense, 1e-11)
    assert_close(kv.CoarseCorrection(K, Z).E.dense(), dense.T @ K.dense() @ dense, 1e-11)
    for B in (F, K.operator):
        image, columns = B.image(Z), B.dense() @ dense
        for shape in ((), (2,)):  # one vector, and vectors as rows
            c, r = normal(*shape, Z.size), normal(*shape, F.shape[0])
            assert_close(image.add_(r.clone(), c, alpha=-0.5), r - 0.5 * c @ columns.T, 1e-11)
            assert_close(image.restrict(r), r @ columns, 1e-11)
        assert_close(B.galerkin(Z), dense.T @ columns, 1e-10)


@pytest.mark.parametrize("coarse", ["itself", "kronecker"])
def test_columns_in_the_null_space_are_not_called_indefinite(coarse):
    """There the coarse operator is round-off of either sign, larger than λ; F is semi-definite all the same."""
    F = kv.capture(mlp((4, 5, 3), torch.nn.ReLU), 1e4 * normal(2, 4), likelihood="gaussian")
    B = F if coarse == "itself" else kv.KroneckerFisher(F)
    _, U = torch.linalg.eigh(F.dense())
    for k in (1, 3, 8):
        Q = kv.CoarseCorrection(B.damped(1e-12), kv.CoarseSpace(F.partition, U[:, :k]))
        assert torch.isfinite(Q.dense()).all() and float(Q.dense().diagonal().min()) >= 0


@pytest.mark.parametrize("name", ["nicolaides", "spectral", "smooth", "random"])
def test_no_large_matrix_is_formed_for_rank_one_columns(name, monkeypatch):
    F, A, M, g = setting()
    K = kv.KroneckerFisher(F).damped(0.1)

    def refuse(*_):
        raise AssertionError("a P×P matrix, a cross-layer block or a dense column was formed")

    for kind in (Operator, kv.Fisher, kv.KroneckerFisher, kv.Damped):
        for method in ("dense", "block", "eye"):
            monkeypatch.setattr(kind, method, refuse)
    for kind in (RankOneSpace, LocalSpace, kv.CoarseSpace):
        monkeypatch.setattr(kind, "dense", refuse)
    monkeypatch.setattr(kv.Fisher, "factors", _diagonal_only(kv.Fisher.factors, refuse))
    Z = space(name, A, M, g, 3)
    assert kv.CoarseCorrection(A, Z).E.ZBZ.shape == (9, 9)
    assert kv.CoarseCorrection(K, Z).E.ZBZ.shape == (9, 9)
    assert torch.isfinite(kv.TwoLevel(A, M, Z, "balanced") @ g).all()


def _diagonal_only(factors, refuse):
    return lambda F, l, m, *rest: factors(F, l, m, *rest) if l == m else refuse()


# ---- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(
    ("per_layer", "words"),
    [
        (-1, "per_layer must be a whole number of at least 0; got -1"),
        (1.5, "got 1.5"),
        (True, "got True"),
        ("4", "got '4'"),
    ],
)
def test_counts_that_are_none_are_refused(name, per_layer, words):
    _, A, M, g = setting()
    with pytest.raises(ValueError, match=words):
        space(name, A, M, g, per_layer)


@pytest.mark.parametrize("name", ["nicolaides", "spectral", "smooth", "krylov", "random"])
def test_a_small_layer_gives_what_it_has(name, recwarn):
    """``per_layer`` means at most so many; more columns than any layer has parameters are the whole space."""
    F, A, M, g = setting("sigmoid, some bias")
    sizes = [layer.size for layer in F.partition.layers]
    Z = space(name, A, M, g, 7)
    assert min(sizes) == 6 and Z.size == sum(min(size, 7) for size in sizes) - len(Z.removed)
    if hasattr(Z, "per_layer") and not Z.removed:
        assert Z.per_layer == tuple(min(size, 7) for size in sizes)
    everything = space(name, A, M, g, 10**6)
    assert everything.size <= F.shape[0]
    if name in ("spectral", "smooth", "optimal"):
        assert_close(kv.TwoLevel(A, M, everything, "balanced").dense(), torch.linalg.inv(A.dense()), 1e-8)


@pytest.mark.parametrize("name", SPACES)
def test_repr_tells_space_size_and_layers(name):
    _, A, M, g = setting()
    for words in (name, "6 columns", "51 parameters in 3 layers (20 + 16 + 15)", "float64 on cpu"):
        assert words in repr(space(name, A, M, g, 2))
