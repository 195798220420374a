"""One-level preconditioners against dense formulas, and the cases in which K-FAC is exact."""

import pytest
import torch
from helpers import (
    DEVICES,
    LIKELIHOODS,
    ZOO,
    Positions,
    assert_close,
    blocks,
    captured,
    error,
    jacobian,
    mlp,
    normal,
    output_hessian,
)

import kfac_viz as kv
from kfac_viz.method.kronecker import KroneckerFactors

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")

BUILDERS = {
    "identity": kv.Identity,
    "diagonal": kv.Diagonal,
    "root of diagonal": lambda F, damping: kv.Diagonal(F, damping, power=0.5),
    "block-diagonal": kv.BlockDiagonal,
    "kfac eigen": kv.KFAC,
    "kfac factored": lambda F, damping: kv.KFAC(F, damping, rule="factored"),
    "kfac reduce": lambda F, damping: kv.KFAC(F, damping, convention="reduce"),
    "ekfac": kv.EKFAC,
    "block-tridiagonal": lambda F, damping: kv.BlockTridiagonal(F, damping, convention="reduce"),
}


def eye_like(X):
    return torch.eye(len(X), dtype=X.dtype)


def factored(F, damping, convention="expand"):
    """Per layer the damped factors (G + √λ/π I, A + π√λ I), from the paper's definition."""
    pairs = []
    for l in range(len(F.partition)):
        A, G = F.factors(l, l, convention)
        pi = torch.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        pairs.append((G + damping**0.5 / pi * eye_like(G), A + damping**0.5 * pi * eye_like(A)))
    return pairs


# ---- factors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_factors_are_moments_of_activations_and_of_bias_jacobians(likelihood):
    """d outputs / d bias is d outputs / d pre-activation: G without any of the package's own passes."""
    model, x = mlp((4, 5, 2, 3)), normal(6, 4)
    F = kv.capture(model, x, likelihood=likelihood)
    activations = [x, model[:2](x).detach(), model[:4](x).detach()]
    inputs = [torch.cat([h, torch.ones(6, 1, dtype=h.dtype)], 1) for h in activations]
    H = output_hessian(model(x), likelihood)
    J = jacobian(model, x, F.partition.names)
    P = F.partition
    g = [J[:, :, s].unflatten(2, layer.shape)[..., -1] for s, layer in zip(P.slices, P.layers, strict=True)]
    for l in range(3):
        for m in range(3):
            A, G = F.factors(l, m)
            assert_close(A, inputs[l].T @ inputs[m] / 6)
            assert_close(G, torch.einsum("nao,nab,nbp->op", g[l], H, g[m]) / 6)


@pytest.mark.parametrize("case", ["positions, T² > S", "conv", "two extra axes", "called twice"])
def test_conventions_expand_and_reduce(case):
    """Expand takes a position for an example of its own; reduce averages inputs and sums vectors."""
    F = captured(case)
    for l in range(len(F.partition)):
        a, g = F.a[l], F.g[l]
        A, G = F.factors(l, l, "expand")
        assert_close(A, torch.einsum("nti,ntj->ij", a, a) / a.shape[:2].numel())
        assert_close(G, torch.einsum("snto,sntp->op", g, g) / F.N)
        A, G = F.factors(l, l, "reduce")
        assert_close(A, torch.einsum("ni,nj->ij", a.mean(1), a.mean(1)) / F.N)
        assert_close(G, torch.einsum("sno,snp->op", g.sum(2), g.sum(2)) / F.N)


def test_the_conventions_agree_without_positions():
    F = captured("residual")
    assert_close(kv.KFAC(F, 1e-2).dense(), kv.KFAC(F, 1e-2, convention="reduce").dense(), 1e-13)


# ---- where K-FAC is exact, and where it is not -------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_for_a_single_example_off_diagonal_blocks_included(likelihood, fisher):
    F = captured("sigmoid, some bias", n=1, likelihood=likelihood, fisher=fisher)
    assert_close(kv.KroneckerFisher(F).dense(), F.dense())


@pytest.mark.parametrize("bias", [True, False])
def test_exact_for_deep_linear_networks_with_gaussian_likelihood(bias):
    model = mlp((4, 3, 3, 2), activation=torch.nn.Identity, bias=bias)
    F = kv.capture(model, normal(7, 4), likelihood="gaussian")
    assert_close(kv.KroneckerFisher(F).dense(), F.dense())


def test_exact_in_the_layer_after_which_nothing_depends_on_the_example():
    """The last layer with a Gaussian likelihood, whatever came before."""
    F = captured("tanh", likelihood="gaussian")
    A, G = F.factors(-1, -1)
    assert_close(torch.kron(G, A), F.block(-1, -1))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: captured("tanh", n=2), id="two examples, non-linear"),
        pytest.param(lambda: captured("tanh", likelihood="gaussian"), id="gaussian, non-linear"),
        pytest.param(
            lambda: kv.capture(
                mlp((4, 3, 3), activation=torch.nn.Identity), normal(7, 4), normal(7, 3), likelihood="gaussian",
                fisher="empirical",
            ),
            id="deep linear, empirical",
        ),
        pytest.param(
            lambda: kv.capture(
                mlp((4, 3, 3), activation=torch.nn.Identity), normal(7, 4), likelihood="gaussian", fisher="mc"
            ),
            id="deep linear, one sampled label",
        ),
        pytest.param(
            lambda: kv.capture(mlp((4, 3, 3), activation=torch.nn.Identity), normal(7, 4), likelihood="categorical"),
            id="deep linear, categorical",
        ),
        pytest.param(lambda: captured("positions, T² > S", n=1), id="one example, several positions"),
    ],
)  # fmt: skip
def test_not_exact_where_theory_says_so(build):
    F = build()
    A, G = F.factors(0, 0)
    assert error(torch.kron(G, A), F.block(0, 0)) > 1e-2


def test_deep_linear_monte_carlo_factorisation_becomes_exact_with_samples():
    model, x = mlp((4, 3, 3), activation=torch.nn.Identity), normal(7, 4)
    errors = []
    for samples in (10, 4000):
        F = kv.capture(model, x, likelihood="gaussian", fisher="mc", samples=samples)
        errors.append(error(kv.KroneckerFisher(F).dense(), F.dense()))
    assert errors[1] < errors[0] / 5


# ---- the model with all blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["residual", "sigmoid, some bias", "called twice", "conv"])
def test_kronecker_fisher_is_all_blocks_g_times_a(case):
    F = captured(case)
    K = kv.KroneckerFisher(F, convention="reduce")
    layers = range(len(F.partition))
    pairs = [[F.factors(l, m, "reduce") for m in layers] for l in layers]
    expected = torch.cat([torch.cat([torch.kron(G, A) for A, G in row], 1) for row in pairs])
    assert_close(K.dense(), expected, 1e-14)
    assert_close(K @ K.eye(), expected)
    assert_close(K.block(0, 1), blocks(F.partition, expected)[0][1], 1e-14)
    assert_close(K.diagonal(), expected.diagonal(), 1e-14)
    assert float(torch.linalg.eigvalsh(expected)[0]) > -1e-13 * float(expected.norm())


def test_kronecker_fisher_with_equal_numbers_of_positions_expands():
    model, x = Positions(3).double(), normal(5, 2, 3)
    model.head = torch.nn.Identity()
    F = kv.capture(model, x, likelihood="gaussian")
    K = kv.KroneckerFisher(F)
    A, G = F.factors(0, 1)
    assert_close(A, torch.einsum("nti,ntj->ij", F.a[0], F.a[1]) / 10)
    assert_close(K.block(0, 1), torch.kron(G, A))
    assert float(torch.linalg.eigvalsh(K.dense())[0]) > -1e-14


# ---- each preconditioner against its definition ------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("case", ["residual", "sigmoid, some bias", "conv", "positions, T² > S", "width 1"])
def test_apply_dense_block_diagonal_agree_and_are_symmetric_positive_definite(name, case):
    M = BUILDERS[name](captured(case, n=4), 1e-2)
    matrix = M.dense()
    assert_close(M @ M.eye(), matrix)
    assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    assert_close(M.diagonal(), matrix.diagonal())
    assert_close(M.block(0, -1), blocks(M.partition, matrix)[0][-1])
    r = normal(M.shape[0])
    assert_close(M @ r, matrix @ r)
    assert (M @ r[:, None][:, :0]).shape == (M.shape[0], 0)


@pytest.mark.parametrize("case", ["residual", "conv"])
def test_kfac_eigen_is_the_inverse_of_the_damped_block_diagonal(case):
    F = captured(case)
    pairs = [F.factors(l, l) for l in range(len(F.partition))]
    damped = torch.block_diag(*(torch.kron(G, A) for A, G in pairs)) + 1e-3 * F.eye()
    assert_close(kv.KFAC(F, 1e-3).dense(), torch.linalg.inv(damped), 1e-11)


@pytest.mark.parametrize("case", ["residual", "conv"])
def test_kfac_factored_is_the_product_of_damped_inverses(case):
    F = captured(case)
    inverses = [torch.kron(torch.linalg.inv(G), torch.linalg.inv(A)) for G, A in factored(F, 1e-3)]
    assert_close(kv.KFAC(F, 1e-3, rule="factored").dense(), torch.block_diag(*inverses), 1e-11)


def test_factored_rule_with_a_dead_layer_takes_pi_one():
    partition = kv.Partition.from_sizes([2])
    factors = KroneckerFactors(partition, (torch.ones(1, 1, dtype=torch.float64),), (torch.zeros(2, 2).double(),))
    M = kv.KFAC(factors, 0.04, rule="factored")
    assert_close(M.dense(), torch.eye(2, dtype=torch.float64) / (0.2 * 1.2))


def test_block_diagonal_is_the_inverse_of_the_exact_damped_blocks():
    F = captured("residual")
    exact = torch.block_diag(*(F.block(l, l) for l in range(3))) + 1e-3 * F.eye()
    assert_close(kv.BlockDiagonal(F, 1e-3).dense(), torch.linalg.inv(exact), 1e-11)


def test_block_diagonal_of_any_operator():
    matrix = normal(6, 9) @ normal(6, 9).T
    A = kv.Dense(matrix, kv.Partition.from_sizes([2, 4]))
    expected = torch.block_diag(torch.linalg.inv(matrix[:2, :2]), torch.linalg.inv(matrix[2:, 2:]))
    assert_close(kv.BlockDiagonal(A, 0.0).dense(), expected, 1e-11)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_diagonal(power):
    F = captured("residual")
    expected = torch.diag((F.dense().diagonal() + 1e-3) ** -power)
    assert_close(kv.Diagonal(F, 1e-3, power).dense(), expected)


def test_identity_ignores_the_damping():
    F = captured("tanh")
    assert torch.equal(kv.Identity(F, 3.0).with_damping(5.0).dense(), F.eye())


@pytest.mark.parametrize("case", ["residual", "conv", "positions, T² ≤ S", "called twice"])
def test_ekfac_keeps_the_exact_variances_in_kfacs_basis(case):
    F = captured(case)
    M = kv.EKFAC(F, 1e-3)
    assert_close(M.dense(), torch.block_diag(*(_ekfac_block(F, l, 1e-3) for l in range(len(F.partition)))), 1e-11)


def _ekfac_block(F, l, damping):
    A, G = F.factors(l, l)
    U = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
    d = (U.T @ F.block(l, l) @ U).diagonal()
    return (U / (d + damping)) @ U.T


def test_ekfac_is_never_farther_from_the_block_than_kfac():
    for case in ("tanh", "residual", "conv", "batch norm, dropout"):
        F = captured(case)
        for l in range(len(F.partition)):
            exact, (A, G) = F.block(l, l), F.factors(l, l)
            U = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
            ekfac = (U * (U.T @ exact @ U).diagonal()) @ U.T
            kfac = float((exact - torch.kron(G, A)).norm())
            assert float((exact - ekfac).norm()) <= kfac * (1 + 1e-12) + 1e-14 * float(exact.norm())


# ---- block-tridiagonal -------------------------------------------------------------------------------


def damped_kronecker(F, damping, convention="expand"):
    """Factored damping on the diagonal blocks of the Kronecker model, cross blocks as they are."""
    K = kv.KroneckerFisher(F, convention).dense()
    for s, (G, A) in zip(F.partition.slices, factored(F, damping, convention), strict=True):
        K[s, s] = torch.kron(G, A)
    return K


@pytest.mark.parametrize("damping", [1e-3, 1e-1, 10.0])
def test_block_tridiagonal_is_the_exact_inverse_for_two_layers(damping):
    F = captured("tanh", n=20)
    assert_close(kv.BlockTridiagonal(F, damping).dense(), torch.linalg.inv(damped_kronecker(F, damping)), 1e-10)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_block_tridiagonal_is_characterised_by_its_inverse(layers, damping):
    """The one matrix that is block-tridiagonal and whose inverse agrees with K on and next to the diagonal."""
    F = kv.capture(mlp((4, *[3] * (layers - 1), 3)), normal(20, 4), likelihood="categorical")
    M, K = kv.BlockTridiagonal(F, damping).dense(), damped_kronecker(F, damping)
    inverse, found, expected = (blocks(F.partition, X) for X in (torch.linalg.inv(M), M, K))
    for l in range(layers):
        for m in range(layers):
            if abs(l - m) <= 1:
                assert float((inverse[l][m] - expected[l][m]).abs().max()) < 1e-10 * float(K.abs().max())
            else:
                assert float(found[l][m].abs().max()) < 1e-13 * float(M.abs().max())


def test_block_tridiagonal_is_the_exact_inverse_when_that_is_block_tridiagonal():
    """Capturing only neighbours: three layers whose first and last factors are made conditionally independent."""
    F = kv.capture(mlp((4, 3, 3, 3)), normal(20, 4), likelihood="categorical")
    K = damped_kronecker(F, 0.1)
    a, b, c = F.partition.slices
    chain = K.clone()
    chain[a, c] = K[a, b] @ torch.linalg.solve(K[b, b], K[b, c])
    chain[c, a] = chain[a, c].T
    inverse = torch.linalg.inv(chain)
    assert float(inverse[a, c].abs().max()) < 1e-10 * float(inverse.abs().max())
    assert_close(kv.BlockTridiagonal(F, 0.1).dense(), inverse, 1e-9)


def test_block_tridiagonal_is_not_the_inverse_of_the_whole_model():
    """Negative control: with three layers the model's inverse has corner blocks."""
    F = kv.capture(mlp((4, 3, 3, 3)), normal(20, 4), likelihood="categorical")
    assert error(kv.BlockTridiagonal(F, 1e-2).dense(), torch.linalg.inv(damped_kronecker(F, 1e-2))) > 1e-3


def test_block_tridiagonal_refuses_a_layer_that_the_next_one_determines():
    """A chain of scalar linear layers: without damping the two blocks are one and the same number."""
    F = kv.capture(mlp((1, 1, 1), activation=torch.nn.Identity, bias=False), normal(5, 1), likelihood="gaussian")
    with pytest.raises(ValueError, match="'0' is determined by the next one at damping 0; choose a larger damping"):
        kv.BlockTridiagonal(F, 0.0)
    assert torch.isfinite(kv.BlockTridiagonal(F, 1e-12).dense()).all()


def test_block_tridiagonal_with_positions_reduces():
    F = captured("positions, T² > S", n=8)
    M = torch.linalg.inv(kv.BlockTridiagonal(F, 0.1, "reduce").dense())
    K = damped_kronecker(F, 0.1, "reduce")
    assert_close(blocks(F.partition, M)[1][2], blocks(F.partition, K)[1][2], 1e-10)
    M = torch.linalg.inv(kv.BlockTridiagonal(F, 0.1).dense())
    assert_close(blocks(F.partition, M)[1][2], blocks(F.partition, damped_kronecker(F, 0.1))[1][2], 1e-10)


# ---- another λ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_with_damping_is_a_fresh_one_and_leaves_the_first_alone(name):
    F = captured("residual")
    M = BUILDERS[name](F, 1e-2)
    before, spectrum = M.dense(), M.eigen.d
    other = M.with_damping(3.0)
    assert other.damping == 3.0 and M.damping == 1e-2
    assert_close(other.dense(), BUILDERS[name](F, 3.0).dense(), 1e-14)
    assert_close(other.eigen.d, torch.linalg.eigvalsh(other.dense()).clamp_min(0), 1e-12)
    assert torch.equal(M.dense(), before) and torch.equal(M.eigen.d, spectrum)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        M.with_damping(-1)
    assert torch.equal(M.dense(), before)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "block-tridiagonal"])
def test_another_damping_costs_no_factorisation(name, monkeypatch):
    M = BUILDERS[name](captured("residual"), 1e-2)
    # λ stands inside the two small inverses of the factored rule: those alone are formed again.
    own = {"cholesky_ex"} if name == "kfac factored" else set()
    for routine in {"eigh", "cholesky", "cholesky_ex", "inv", "solve", "qr", "svd"} - own:
        monkeypatch.setattr(torch.linalg, routine, None)
    assert torch.isfinite(M.with_damping(1.0) @ normal(M.shape[0])).all()


@pytest.mark.parametrize("name", ["kfac eigen", "kfac factored", "ekfac", "block-diagonal", "diagonal"])
def test_no_damping_works_where_the_matrix_is_invertible_and_is_refused_where_not(name):
    regular = kv.capture(mlp((3, 2, 2)), normal(200, 3), likelihood="gaussian")
    assert torch.isfinite(BUILDERS[name](regular, 0.0).dense()).all()
    dead = kv.capture(mlp((3, 2, 2)), torch.zeros(4, 3, dtype=torch.float64), likelihood="gaussian")
    with pytest.raises(ValueError, match="singular.*damping 0 does not mend it; choose a larger damping"):
        BUILDERS[name](dead, 0.0)


@pytest.mark.parametrize("name", BUILDERS)
def test_repr_tells_layers_sizes_and_damping(name):
    M = BUILDERS[name](captured("sigmoid, some bias"), 1e-3)
    for words in (type(M).__name__, "30 parameters in 3 layers (15 + 6 + 9)", "λ = 0.001", "float64 on cpu"):
        assert words in repr(M)
    if "factored" in name:
        assert "rule factored" in repr(M)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUILDERS)
def test_float32_and_devices(name, device):
    model, inputs = ZOO["residual"].make()
    expected = BUILDERS[name](kv.capture(model, inputs, likelihood="categorical"), 1e-2).dense()
    F = kv.capture(model.to(device, torch.float32), inputs.to(device, torch.float32), likelihood="categorical")
    M = BUILDERS[name](F, 1e-2)
    assert M.dtype == torch.float32 and (M @ M.eye()).device.type == device
    assert_close(M.dense().cpu().double(), expected, 2e-4)


def test_subnormal_numbers_do_not_stop_the_eigensolver():
    """Saturated float32 networks have blocks from 1e-5 down to 1e-45, on which LAPACK fails to converge."""
    with torch.no_grad():
        model = mlp((4, 5, 4, 3))
        for p in model.parameters():
            p.mul_(60)
    F = kv.capture(model.float(), normal(20, 4).float(), likelihood="categorical")
    block = F.block(1, 1)
    assert (block[block != 0].abs() < torch.finfo(torch.float32).tiny).any()
    assert_close(
        kv.BlockDiagonal(F, 1.0).block(1, 1).double(), torch.linalg.inv(block.double() + eye_like(block)), 1e-6
    )


def test_factors_that_do_not_fit_are_named():
    partition = kv.Partition.from_sizes([2])
    with pytest.raises(ValueError, match=r"Factors G must have shapes \[\(2, 2\)\].*got \[\(3, 3\)\]"):
        KroneckerFactors(partition, (torch.ones(1, 1),), (torch.ones(3, 3),))
    with pytest.raises(ValueError, match="Factor A of layer '0' holds NaN"):
        kv.KFAC(KroneckerFactors(partition, (torch.full((1, 1), torch.nan),), (torch.eye(2),)), 1.0)
    with pytest.raises(ValueError, match="Factor G of layer '0' is not positive semi-definite.*-1 to 1"):
        kv.KFAC(KroneckerFactors(partition, (torch.ones(1, 1),), (torch.tensor([[0.0, 1.0], [1.0, 0.0]]),)), 1.0)
