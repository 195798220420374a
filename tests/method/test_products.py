"""Four Kronecker products of a layer's block, each against a dense definition that sees the block alone."""

import pytest
import torch
from helpers import Model, assert_close, captured, normal
from torch import nn
from torch.nn import functional

import kfac_viz as kv
from kfac_viz.method import products
from kfac_viz.method.partition import Layer
from kfac_viz.method.products import FACTORS, Scores

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")

OTHERS = FACTORS[1:]


def model_fisher(model, *shape, n=12, likelihood="categorical", words=False):
    torch.manual_seed(0)
    x = torch.randint(0, 5, (n, *shape)) if words else normal(n, *shape)
    return kv.capture(model.double().eval(), x, likelihood=likelihood)


def tied(s, x):
    return functional.linear(torch.tanh(s.down(x)), s.down.weight.mT, s.shift)


def written(s, x):
    return s.head(torch.tanh(s.norm(s.table(x) + s.place)).mean(1))


def of(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build()


CASES = {
    "one position": lambda: captured("tanh", 12),
    "no bias": lambda: captured("relu, no bias", 12),
    "layers of one shape": lambda: captured("residual", 12),
    "positions": lambda: captured("positions, T² ≤ S", 12),
    "few examples, positions": lambda: captured("conv", 3),
    "called twice": lambda: captured("called twice", 12),
    "norm": lambda: captured("batch norm, dropout", 12),
    "groups": lambda: model_fisher(
        nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), 4, 3, 3),
    "groups, one position": lambda: model_fisher(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)), 4, 3, 3),
    "transposed": lambda: model_fisher(
        nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), 2, 3, 2),
    "tied": lambda: model_fisher(Model(tied, down=nn.Linear(4, 3), shift=torch.randn(4)), 4, likelihood="gaussian"),
    "words and a norm": lambda: model_fisher(
        Model(written, table=nn.Embedding(5, 4), place=torch.randn(3, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 3)),
        3, words=True),
}  # fmt: skip


def units(F):
    """The exact block of every layer, or of each group of it, as (out, features, out, features)."""
    for l, layer in enumerate(F.partition.layers):
        (o, i), block = layer.unit, F.block(l, l)
        for k in range(layer.groups):
            s = slice(k * o * i, (k + 1) * o * i)
            yield block[s, s].view(o, i, o, i)


def products_of(f):
    """(G, A) of every layer, or of each group of it; A as a matrix."""
    for l, G in enumerate(f.G):
        A = f.dense_A(l)
        yield from zip(G, A, strict=True) if G.ndim == 3 else [(G, A)]


def objective(K, B):
    """``tr(K⁻¹B) + log det K`` on the range of K, which has to hold that of B."""
    d, U = torch.linalg.eigh(K)
    within = d > 1e-11 * d[-1]
    inside = U[:, within]
    assert torch.linalg.norm(B - inside @ (inside.T @ B)) <= 1e-6 * torch.linalg.norm(B)
    return float(((inside.T @ B @ inside).diagonal() / d[within]).sum() + d[within].log().sum())


@pytest.fixture(params=CASES)
def F(request):
    return of(CASES[request.param])


# ---- each rule against its definition ----------------------------------------------------------------


def test_shampoo_is_the_product_of_both_partial_traces(F):
    f = F.kronecker(factors="shampoo")
    for B, (G, A) in zip(units(F), products_of(f), strict=True):
        L, R = torch.einsum("ojpj->op", B), torch.einsum("ojok->jk", B)
        assert_close(torch.kron(G, A), torch.kron(L, R) / L.trace(), 1e-10)


def test_nearest_is_the_first_singular_pair_of_the_rearranged_block(F):
    for B, (G, A) in zip(units(F), products_of(F.kronecker(factors="nearest")), strict=True):
        o, i = B.shape[:2]
        U, s, Vh = torch.linalg.svd(B.transpose(1, 2).reshape(o * o, i * i))
        expected = s[0] * torch.kron(U[:, 0].view(o, o), Vh[0].view(i, i))
        assert_close(torch.kron(G, A), expected, 1e-5)


def errors(F, rule):
    """‖B − G ⊗ A‖ of every layer, or of each group of it."""
    pairs = zip(units(F), products_of(F.kronecker(factors=rule)), strict=True)
    return torch.stack([(B.reshape(len(G) * len(A), -1) - torch.kron(G, A)).norm() for B, (G, A) in pairs])


def test_nearest_has_no_larger_error_than_the_others(F):
    least = errors(F, "nearest")
    for rule in FACTORS:
        assert (least <= errors(F, rule) * (1 + 1e-10) + 1e-14).all(), rule


def test_kl_solves_the_equations_of_the_flip_flop(F):
    f = F.kronecker(factors="kl")
    assert not f.undetermined
    for B, (G, A) in zip(units(F), products_of(f), strict=True):
        G_inv, A_inv = (torch.linalg.pinv(X, rtol=1e-11, hermitian=True) for X in (G, A))
        rank_G, rank_A = (float((X @ Y).trace()) for X, Y in ((G, G_inv), (A, A_inv)))
        assert_close(torch.einsum("ojpk,jk->op", B, A_inv) / round(rank_A), G, 1e-6)
        assert_close(torch.einsum("ojpk,op->jk", B, G_inv) / round(rank_G), A, 1e-6)


@pytest.mark.parametrize("case", ["one position", "positions", "groups"])
def test_kl_has_the_least_divergence(case):
    """No other rule, scaled as it is best, and no product near this one has less of ``tr(K⁻¹F) + log det K``."""
    F = of(CASES[case])
    generator = torch.Generator().manual_seed(3)
    for B, *pairs in zip(units(F), *(products_of(F.kronecker(factors=rule)) for rule in FACTORS), strict=True):
        block = B.reshape(B.shape[0] * B.shape[1], -1)
        near = [torch.kron(*pair) for pair in pairs]
        least = objective(near[-1], block)
        for K in near[:-1]:
            inverse = torch.linalg.pinv(K, rtol=1e-11, hermitian=True)
            best = (inverse * block).sum() / torch.linalg.matrix_rank(K, rtol=1e-11, hermitian=True)
            assert least <= objective(best * K, block) + 1e-9
        G, A = pairs[-1]
        for _ in range(5):
            P, Q = (nudged(X, generator) for X in (G, A))
            assert least <= objective(torch.kron(P @ G @ P.T, Q @ A @ Q.T), block) + 1e-9


def nudged(X, generator):
    """Nearly the identity, and the identity outside the range of X."""
    d, U = torch.linalg.eigh(X)
    U = U[:, d > 1e-11 * d[-1]]
    change = torch.randn(X.shape, generator=generator, dtype=X.dtype)
    return torch.eye(len(X), dtype=X.dtype) + 1e-3 * U @ (U.T @ change @ U) @ U.T


def test_kl_factors_of_a_transformed_layer_are_the_factors_transformed():
    """The rule knows no units: S → P S Q takes G to ``P G Pᵀ`` and A to ``Qᵀ A Q``."""
    F = captured("tanh", 30, "gaussian")
    a, g, layer = F.a[0], F.g[0], Layer("one", 5, 5)
    P, Q = normal(5, 5, seed=4), normal(5, 5, seed=5)
    both = [kv.Fisher(kv.Partition((layer,)), [x], [y]).kronecker(factors="kl") for x, y in ((a, g), (a @ Q, g @ P.T))]
    K, transformed = (torch.kron(f.G[0], f.A[0]) for f in both)
    T = torch.kron(P, Q.T.contiguous())
    assert_close(transformed, T @ K @ T.T, 1e-7)


# ---- where they agree --------------------------------------------------------------------------------


def test_all_four_have_the_block_of_a_single_example():
    """In one position, also with several vectors: ``Σ_s (g_s aᵀ)(…)ᵀ`` is the product of ``Σ_s g_s g_sᵀ`` and a aᵀ."""
    F = captured("tanh", 1)
    for rule in FACTORS:
        for l, block in enumerate(F.kronecker(factors=rule).blocks()):
            assert_close(block, F.block(l, l), 1e-9)


def test_all_four_agree_where_inputs_and_vectors_are_independent():
    """Every a beside every g, so that the block is a Kronecker product."""
    a, g = normal(6, 3, seed=1), normal(4, 5, seed=2)
    F = one_layer(a.repeat_interleave(4, 0), g.repeat(6, 1))
    for rule in FACTORS:
        assert_close(F.kronecker(factors=rule).blocks()[0], F.block(0, 0), 1e-9)


def test_a_vector_layer_has_its_exact_block_and_a_scale_of_1():
    F = of(CASES["norm"])
    l = next(l for l, layer in enumerate(F.partition.layers) if layer.vector)
    for rule in FACTORS:
        f = F.kronecker(factors=rule)
        assert_close(f.G[l], F.block(l, l), 1e-9)
        assert_close(f.A[l], torch.ones(1, 1, dtype=f.dtype))


def test_shampoo_is_one_simultaneous_turn_from_the_identity_towards_nearest(F):
    for l, (a, g) in enumerate(zip(F.a, F.g, strict=True)):
        scores, f = Scores(a, g), F.kronecker(factors="shampoo")
        o, i = F.partition.layers[l].unit
        eyes = [torch.eye(n, dtype=f.dtype).expand(*F.partition.layers[l].axis, n, n) for n in (i, o)]
        assert_close(scores.left(eyes[0]), f.G[l], 1e-12)
        assert_close(products.unit_trace(scores.right(eyes[1])), f.A[l], 1e-12)


# ---- moments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("often", [False, True])
def test_moments_are_those_of_the_written_out_scores(F, often, chunk, monkeypatch):
    monkeypatch.setattr(products, "_CHUNK", chunk)
    blocks = iter(units(F))
    for layer, a, g in zip(F.partition.layers, F.a, F.g, strict=True):
        scores, (o, i) = Scores(a, g, often=often), layer.unit
        X, Y = (x + x.mT for x in (normal(layer.groups, n, n, seed=n) for n in (i, o)))
        lefts = scores.left(X.view(*layer.axis, i, i)), scores.left()
        rights = scores.right(Y.view(*layer.axis, o, o)), scores.right()
        for k, B in zip(range(layer.groups), blocks, strict=False):
            for found, x in zip(lefts, (X[k], torch.eye(i, dtype=X.dtype)), strict=True):
                assert_close(found.view(-1, o, o)[k], torch.einsum("ojpk,jk->op", B, x), 1e-11)
            for found, y in zip(rights, (Y[k], torch.eye(o, dtype=X.dtype)), strict=True):
                assert_close(found.view(-1, i, i)[k], torch.einsum("ojpk,op->jk", B, y), 1e-11)
    assert next(blocks, None) is None


def test_one_position_never_forms_its_scores(monkeypatch):
    F = captured("tanh", 12)
    monkeypatch.setattr(Scores, "_formed", lambda self: pytest.fail("scores were formed"))
    for rule in OTHERS:
        F.kronecker(factors=rule)


# ---- too few scores, no scores, and what is refused ----------------------------------------------------


def one_layer(a, g):
    """The Fisher of a layer with one position, from inputs (N, features) and one vector for each (N, out)."""
    return kv.Fisher(kv.Partition((Layer("one", g.shape[1], a.shape[1]),)), [a[:, None]], [g[None, :, None]])


def test_kl_says_where_it_has_no_minimum_and_stops_at_its_floor():
    """Scores at five corners of a 3 × 3 matrix, no three of which share neither row nor column."""
    rows, columns, eye = [0, 0, 0, 1, 2], [0, 1, 2, 0, 0], torch.eye(3, dtype=torch.float64)
    F = one_layer(eye[columns], eye[rows])
    f = F.kronecker(factors="kl")
    assert f.undetermined == ("one",)
    for X in (f.A[0], f.G[0]):
        d = torch.linalg.eigvalsh(X)
        assert 0.1 * products.FLOOR < d[0] / d[-1] < 1e-3
    assert torch.isfinite(kv.KFAC(F, 1e-2, factors="kl").dense()).all()
    assert not F.kronecker(factors="nearest").undetermined


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("damping_rule", ["eigen", "factored"])
def test_damping_enters_after_the_product(rule, damping_rule):
    F = of(CASES["words and a norm"])
    f = F.kronecker(factors=rule)
    M = kv.KFAC(F, 1e-2, damping_rule, factors=rule)
    blocks = f.blocks() if damping_rule == "eigen" else f.blocks(1e-2)
    shift = 1e-2 if damping_rule == "eigen" else 0.0
    expected = torch.block_diag(*(torch.linalg.inv(K + shift * torch.eye(len(K), dtype=K.dtype)) for K in blocks))
    assert_close(M.dense(), expected, 1e-10)
    assert_close(M.with_damping(0.1).dense(), kv.KFAC(F, 0.1, damping_rule, factors=rule).dense(), 1e-12)


@pytest.mark.parametrize("rule", OTHERS)
def test_a_layer_whose_scores_are_all_zero_has_no_curvature(rule):
    F = captured("tanh")
    dead = F.like(F.a, [torch.zeros_like(F.g[0]), F.g[1]])
    f = dead.kronecker(factors=rule)
    assert not f.blocks()[0].any()
    first = F.partition.slices[0]
    assert_close(kv.KFAC(dead, 0.5, factors=rule).dense()[first, first], 2 * torch.eye(25).double())
    with pytest.raises(ValueError, match=r"'0'.*singular"):
        kv.KFAC(dead, 0.0, factors=rule)


def test_what_has_no_meaning_is_refused_by_name():
    F = captured("positions, T² > S")
    with pytest.raises(ValueError, match="factors must be one of 'kfac', 'shampoo', 'nearest', 'kl'; got 'soap'"):
        kv.KFAC(F, 0.1, factors="soap")
    with pytest.raises(ValueError, match="convention='reduce' says what factors='kfac' does"):
        kv.KFAC(F, 0.1, convention="reduce", factors="kl")
    with pytest.raises(ValueError, match="factors='kl' are made of a Fisher; these"):
        kv.KFAC(F.kronecker(), 0.1, factors="kl")
    with pytest.raises(ValueError, match="no layer 'never'|'never'"):
        F.factors("never", "never")


def test_an_embedding_beyond_the_vocabulary_keeps_kfac(monkeypatch):
    F = of(CASES["words and a norm"])
    monkeypatch.setattr(products, "VOCABULARY", 4)
    kv.KFAC(F, 0.1)
    for rule in OTHERS:
        with pytest.raises(ValueError, match="embedding 'table' as a matrix, and has it up to 4 words; got 5"):
            kv.KFAC(F, 0.1, factors=rule)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused_by_the_name_of_their_layer(rule, bad):
    F = captured("tanh")
    g = F.g[0].clone()
    g[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="layer '0' holds NaN or inf"):
        kv.KFAC(F.like(F.a, [g, F.g[1]]), 0.1, factors=rule)


@pytest.mark.parametrize("rule", OTHERS)
def test_single_precision_agrees(rule):
    F = of(CASES["positions"])
    low = F.like([a.float() for a in F.a], [g.float() for g in F.g])
    for mine, expected in zip(low.kronecker(factors=rule).blocks(), F.kronecker(factors=rule).blocks(), strict=True):
        assert_close(mine.double(), expected, 1e-3)
