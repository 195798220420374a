"""Embeddings: inputs that are kept as numbers of words, and a factor A that is a diagonal and stays one."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import Model, assert_close, fisher_by_backward, normal, opened
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_viz as kv
from kfac_viz.method.one_hot import OneHot, cat, cross, inner, padded
from kfac_viz.method.sample_space import SampleSpace
from kfac_viz.pages.layer_map import blocks_missed


def mean_of(s: Model, x: Tensor) -> Tensor:
    return s.head(torch.tanh(s.table(x)).mean(1))


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    models = {
        "words": lambda: Model(mean_of, table=nn.Embedding(6, 4), head=nn.Linear(4, 3)),
        "padded": lambda: Model(mean_of, table=nn.Embedding(6, 4, padding_idx=-2), head=nn.Linear(4, 3)),
        "called twice": lambda: Model(
            lambda s, x: s.head(torch.tanh(s.table(x) * s.table(x.flip(1))).mean(1)),
            table=nn.Embedding(6, 4), head=nn.Linear(4, 3),
        ),
        "two of a shape": lambda: Model(
            lambda s, x: s.head(torch.tanh(s.table(x) + s.other(5 - x)).mean(1)),
            table=nn.Embedding(6, 4), other=nn.Embedding(6, 4), head=nn.Linear(4, 3),
        ),
        "one position": lambda: Model(
            lambda s, x: s.head(torch.tanh(s.table(x[:, 0]))), table=nn.Embedding(6, 4), head=nn.Linear(4, 3)
        ),
        "two axes": lambda: Model(
            lambda s, x: s.head(torch.tanh(s.table(torch.stack([x, 5 - x], 1))).sum((1, 2))),
            table=nn.Embedding(6, 4), head=nn.Linear(4, 3),
        ),
        "beside a layer of its shape": lambda: Model(
            lambda s, x: s.head(torch.tanh(s.table(x) + s.like(functional.one_hot(5 - x, 6).double())).mean(1)),
            table=nn.Embedding(6, 4), like=nn.Linear(6, 4, bias=False), head=nn.Linear(4, 3),
        ),
        "a loose matrix": lambda: Model(
            lambda s, x: s.head(torch.tanh(functional.embedding(x, s.table.T)).mean(1)),
            table=nn.Parameter(torch.randn(4, 6)), head=nn.Linear(4, 3),
        ),
    }  # fmt: skip
    models |= {
        "tied": lambda: Model(
            lambda s, x: torch.tanh(s.table(x)).mean(1) @ s.table.weight.T, table=nn.Embedding(6, 4)
        ),
        "a linear weight": lambda: Model(
            lambda s, x: s.head(torch.tanh(functional.embedding(x, s.body.weight.T) + s.body(s.code(x))).mean(1)),
            code=nn.Embedding(6, 6), body=nn.Linear(6, 4), head=nn.Linear(4, 3),
        ),
    }  # fmt: skip
    return models[name]().double()


SPARSE = ("words", "padded", "called twice", "two of a shape", "one position", "two axes",
          "beside a layer of its shape", "a loose matrix")  # fmt: skip
ALL = (*SPARSE, "tied", "a linear weight")


def words(n: int = 5, T: int = 7, seed: int = 0, of: int = 6) -> Tensor:
    """More of them than there are different ones, so that some stand twice in an example."""
    return torch.randint(0, of, (n, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", ALL)
def test_the_fisher_is_that_of_autograd(name, likelihood):
    model, x = make(name), words()
    F = kv.capture(model, x, likelihood=likelihood)
    expected = fisher_by_backward(model, x, F.partition, likelihood)
    assert any(isinstance(a, OneHot) for a in F.a) == (name not in ("tied",))
    v = normal(F.partition.size, 3)
    assert_close(F.dense(), expected)
    assert_close(F @ v, expected @ v)
    assert_close(F @ v[:, 0], expected @ v[:, 0])
    assert_close(F.diagonal(), expected.diagonal())
    for l, rows in enumerate(F.partition.slices):
        for m, columns in enumerate(F.partition.slices):
            assert_close(F.block(l, m), expected[rows, columns])
    space = SampleSpace(F)
    J = torch.stack([F.pull(s) for s in torch.eye(F.S * F.N).double().view(-1, F.S, F.N)])
    assert_close(J.T @ J / F.N, expected)
    for l, s in enumerate(F.partition.slices):
        assert_close(space.kernel(l), J[:, s] @ J[:, s].T / F.N)
    assert_close(space.norms(), F.partition.norms(expected), 1e-7)
    assert_close(F.damped(0.1).solve(v), torch.linalg.solve(expected + 0.1 * torch.eye(len(v)).double(), v), 1e-10)


@pytest.mark.parametrize("name", ["words", "two of a shape", "tied"])
def test_images_of_every_coarse_space(name):
    model, x = make(name), words()
    F = kv.capture(model, x, likelihood="categorical")
    matrix, A, M = F.dense(), F.damped(0.1), kv.KFAC(F, 0.1)
    v = normal(F.partition.size)
    for Z in (
        kv.coarse.spectral(F, 3), kv.coarse.smooth(F, 3), kv.coarse.nicolaides(F, 3), kv.coarse.random(F, 3),
        kv.coarse.krylov(A, M, v, 3), kv.coarse.optimal(A, M, 2), kv.coarse.spectral(M.factors.leading(2), 2),
    ):  # fmt: skip
        Zd, image = Z.dense(), F.image(Z)
        assert_close(image.galerkin(), Zd.T @ matrix @ Zd, 1e-11)
        assert_close(image.restrict(v), Zd.T @ matrix @ v, 1e-11)
        assert_close(image.add_(torch.zeros_like(v), normal(Z.size)), matrix @ Zd @ normal(Z.size), 1e-11)


def counted(F: kv.Fisher, l: int) -> Tensor:
    """The diagonal A of a table: how often each word is looked up, over examples and positions."""
    a = F.a[l].dense()
    return a.square().sum((0, 1)) / (F.N * a.shape[1])


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", SPARSE)
def test_the_factor_of_a_table_is_a_diagonal_and_kfac_that_of_the_matrix(name, convention):
    model, x = make(name), words()
    F = kv.capture(model, x, likelihood="categorical")
    f = F.kronecker(convention)
    assert f.A[0].shape == (6,)
    assert_close(f.A[0], counted(F, 0))
    g = F.g[0]
    assert_close(f.G[0], torch.einsum("snto,sntp->op", g, g) / F.N)
    assert_close(F.factors(0, 0, convention)[0], f.A[0].diag())
    A = [f.dense_A(l) for l in range(len(f.A))]
    same = kv.KroneckerFactors(F.partition, tuple(A), f.G)
    K, v = torch.block_diag(*map(torch.kron, f.G, A)), normal(F.partition.size, 2)
    for rule in ("eigen", "factored"):
        M, dense = kv.KFAC(f, 0.1, rule), kv.KFAC(same, 0.1, rule)
        assert_close(M.dense(), dense.dense())
        assert_close(M @ v, dense @ v)
        assert_close(M.with_damping(0.5) @ v, dense.with_damping(0.5) @ v)
        for mine, theirs in zip(M.eigenvalues(), dense.eigenvalues(), strict=True):
            assert_close(mine.flatten().sort()[0], theirs.flatten().sort()[0])
    assert_close(kv.KFAC(f, 0.1) @ v, torch.linalg.solve(K + 0.1 * torch.eye(len(K)).double(), v))
    assert list(map(float, f.pi)) == pytest.approx(list(map(float, same.pi)))


@pytest.mark.parametrize("name", ["words", "padded", "tied"])
def test_the_map_of_layers_says_what_kfac_misses_of_each_block(name):
    F = kv.capture(make(name), words(), likelihood="categorical")
    exact, f = F.dense(), F.kronecker()
    kept = [torch.kron(f.G[l], f.dense_A(l)) for l in range(len(f.A))]
    missed = [(exact[s, s] - block).norm() for s, block in zip(F.partition.slices, kept, strict=True)]
    assert_close(blocks_missed(F, SampleSpace(F).norms().diagonal()), torch.stack(missed), 1e-6)


@pytest.mark.parametrize("name", ["words", "called twice", "one position"])
def test_ekfac_has_the_variances_of_the_scores_in_the_basis_of_the_words(name):
    model, x = make(name), words()
    F = kv.capture(model, x, likelihood="categorical")
    matrix, f = F.dense(), F.kronecker()
    s = F.partition.slices[0]
    basis = torch.kron(torch.linalg.eigh(f.G[0])[1].contiguous(), torch.eye(6).double())
    d = (basis.T @ matrix[s, s] @ basis).diagonal()
    expected = basis @ torch.diag(1 / (d + 0.1)) @ basis.T
    M, v = kv.EKFAC(F, 0.1), normal(F.partition.size)
    assert_close(M.dense()[s, s], expected, 1e-10)
    assert_close((M @ v)[s], expected @ v[s], 1e-10)


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("name", ["words", "two of a shape"])
def test_columns_of_spectral_and_smooth_are_eigenvectors_at_the_ends(name, rule):
    F = kv.capture(make(name), words(), likelihood="categorical")
    M = kv.KFAC(F, 0.1, rule)
    blocks = [torch.kron(M.factors.G[l], M.factors.dense_A(l)) for l in range(len(F.partition))]
    for space, largest in ((kv.coarse.spectral, True), (kv.coarse.smooth, False)):
        for count in (1, 5, 30):
            Z = space(M, count)
            for block, (W, U) in zip(blocks, Z.factors, strict=True):
                k = min(count, len(block))
                assert W.shape[1] == k
                columns = torch.einsum("ok,ik->oik", W, U).flatten(0, 1)
                d = (columns * (block @ columns)).sum(0)
                assert_close(columns.T @ columns, torch.eye(k).double(), 1e-11)
                assert float((block @ columns - columns * d).abs().max()) < 1e-12 * float(block.norm())
                ends = torch.linalg.eigvalsh(block).sort(descending=largest)[0][:k]
                assert float((d.sort(descending=largest)[0] - ends).abs().max()) < 1e-12 * float(block.norm())
    few, all_of = kv.coarse.spectral(F, total=7), kv.coarse.spectral(F, 30)
    assert few.size == 7 and all_of.size == sum(min(30, layer.size) for layer in F.partition.layers)


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["words", "two of a shape", "one position", "called twice"])
def test_the_kronecker_model_is_that_of_written_out_rows(name, convention):
    """A table stands at all of its positions, under either convention; what is reduced stands at each of them."""
    F = kv.capture(make(name), words(), likelihood="categorical")
    T, rows = max(a.shape[1] for a in F.a), []
    for a, g in zip(F.a, F.g, strict=True):
        if isinstance(a, OneHot):
            a = a.dense()
        elif convention == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        t = a.shape[1]
        a, g = (x.repeat_interleave(T, -2) / T**0.5 if t == 1 else x for x in (a, g))
        rows.append((a.flatten(0, 1) / (t**0.5 if t > 1 else 1), g.flatten(0, 2)))
    matrix = torch.cat([torch.cat([torch.kron(g.T @ h, a.T @ b) for b, h in rows], 1) for a, g in rows]) / F.N**2
    K, v = kv.KroneckerFisher(F, convention), normal(F.partition.size, 2)
    assert_close(K.dense(), matrix)
    assert_close(K @ v, matrix @ v)
    assert_close(K.block(0, len(rows) - 1), matrix[F.partition.slices[0], F.partition.slices[-1]])
    A, G = F.factors(0, len(rows) - 1, convention)
    assert_close(torch.kron(G, A), matrix[F.partition.slices[0], F.partition.slices[-1]])
    for Z in (kv.coarse.spectral(F, 3), kv.coarse.krylov(F.damped(0.1), kv.KFAC(F, 0.1), v[:, 0], 2)):
        assert_close(K.galerkin(Z), Z.dense().T @ matrix @ Z.dense(), 1e-11)


# ---- training ----------------------------------------------------------------------------------------

OPTIONS = {"likelihood": "categorical", "fisher": "exact", "damping": 0.1, "observe_every": 1, "refresh_every": 1,
           "per_layer": 2, "step_rule": "fixed", "lr": 0.05}  # fmt: skip


def train(model: nn.Module, opt: kv.TwoLevelKFAC, steps: int, first: int = 0, n: int = 8) -> list[float]:
    losses = []
    for i in range(first, first + steps):
        x = words(n, T=4 + i % 3, seed=i)
        opt.zero_grad()
        loss = kv.nll(model(x), x[:, 0] % 3, "categorical")
        loss.backward()
        opt.observe(x)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("convention", ["expand", "reduce"])
def test_averages_over_batches_stay_diagonals(convention):
    model = make("words")
    opt = kv.TwoLevelKFAC(model, **OPTIONS, convention=convention, decay=0.5)
    Fs = []
    for i in range(3):
        Fs.append(kv.capture(model, words(8, T=4 + i, seed=i), likelihood="categorical"))
        train(model, opt, 1, first=i)
    weights = torch.tensor([0.25, 0.5, 1.0]).double()
    expected = sum(w * counted(F, 0) for w, F in zip(weights / weights.sum(), Fs, strict=True))
    assert_close(opt.curvature.factors.A["table"], expected)
    assert_close(opt.preconditioner.M.factors.A[0], expected)


@pytest.mark.parametrize("options", [
    {}, {"rule": "factored"}, {"coarse": "krylov"}, {"coarse_operator": "kronecker", "correction": "additive"},
    {"coarse": "smooth", "convention": "reduce", "coarse_operator": "kronecker", "correction": "additive"},
])  # fmt: skip
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(options):
    options = OPTIONS | options
    model = make("padded")
    opt = kv.TwoLevelKFAC(model, **options)
    losses = train(model, opt, 3)
    T, g = opt.preconditioner, normal(opt.partition.size)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make("padded")
    other.load_state_dict(state["model"])
    again = kv.TwoLevelKFAC(other, **options)
    again.load_state_dict(state["opt"])
    assert isinstance(again.curvature.window.parts[0].F.a[0], OneHot)
    assert torch.equal(again.preconditioner @ g, T @ g)
    assert train(model, opt, 3, first=3) == train(other, again, 3, first=3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("index", [-1, 6])
def test_a_checkpoint_with_a_word_that_is_none_is_refused(index):
    model = make("words")
    opt = kv.TwoLevelKFAC(model, **OPTIONS)
    train(model, opt, 1)
    state = opened(opt.state_dict())
    state["curvature"]["window"][0]["a"][0]["index"][0, 0] = index
    with pytest.raises(ValueError, match="one-hot inputs of layer 'table' are not of 6 columns"):
        kv.TwoLevelKFAC(make("words"), **OPTIONS).load_state_dict(state)


def test_a_table_that_a_batch_does_not_use_adds_zeros():
    """Unused in one of two batches of the window, and in the first of all."""

    def call(s: Model, x: Tensor) -> Tensor:
        return s.head(torch.tanh(s.table(x) + (s.other(x) if int(x[0, 0]) == 0 else 0)).mean(1))

    torch.manual_seed(0)
    model = Model(call, table=nn.Embedding(6, 4), other=nn.Embedding(6, 4), head=nn.Linear(4, 3)).double()
    opt = kv.TwoLevelKFAC(model, **OPTIONS, coarse_window=2, coarse_examples=100)
    for first in (1, 0):
        x = words(8)
        x[0, 0] = first
        opt.zero_grad()
        kv.nll(model(x), x[:, 0] % 3, "categorical").backward()
        opt.observe(x)
        opt.step()
    F = opt.curvature.window.fisher()
    assert isinstance(F.a[1], OneHot) and F.N == 16
    assert float(F.g[1][:, :8].abs().max()) == 0 < float(F.g[1][:, 8:].abs().max())
    assert_close(opt.curvature.factors.A["other"], counted(kv.capture(model, x, likelihood="categorical"), 1))


@pytest.mark.parametrize("coarse", [{}, {"coarse_operator": "kronecker", "correction": "additive"}])
def test_a_table_that_is_a_matrix_in_one_of_the_batches_is_written_out(coarse):
    """In the second batch the words are multiplied with the same parameter as well."""

    def call(s: Model, x: Tensor) -> Tensor:
        h = torch.tanh(functional.embedding(x, s.table.T))
        also = torch.tanh(functional.one_hot(5 - x, 6).double() @ s.table.T) if int(x[0, 0]) == 0 else 0
        return s.head((h + also).mean(1))

    torch.manual_seed(0)
    model = Model(call, table=nn.Parameter(torch.randn(4, 6)), head=nn.Linear(4, 3)).double()
    opt = kv.TwoLevelKFAC(model, **OPTIONS | {"lr": 0.0} | coarse, coarse_window=2, coarse_examples=100, decay=1.0)
    Fs = []
    for first in (1, 0):
        x = words(8)
        x[0, 0] = first
        opt.zero_grad()
        kv.nll(model(x), x[:, 0] % 3, "categorical").backward()
        opt.observe(x)
        opt.step()
        Fs.append(kv.capture(model, x, likelihood="categorical"))
    assert [isinstance(F.a[0], OneHot) for F in Fs] == [True, False]
    assert_close(opt.curvature.window.fisher().dense(), (Fs[0].dense() + Fs[1].dense()) / 2)
    expected = (Fs[0].kronecker().dense_A(0) + Fs[1].kronecker().dense_A(0)) / 2
    assert_close(opt.preconditioner.M.factors.A[0], expected)


class Largest(TorchDispatchMode):
    """The number of entries in the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("rule", ["eigen", "factored"])
def test_nothing_grows_with_words_times_words_nor_with_words_times_tokens(rule):
    count, out = 3000, 4
    torch.manual_seed(0)
    model = Model(mean_of, table=nn.Embedding(count, out), head=nn.Linear(out, 3))
    opt = kv.TwoLevelKFAC(model, **OPTIONS | {"rule": rule})
    x = words(20, T=10, of=count)
    kv.nll(model(x), x[:, 0] % 3, "categorical").backward()
    largest = Largest()
    with largest:
        opt.observe(x)
        opt.step()
        kv.EKFAC(kv.capture(model, x, likelihood="categorical"), 0.1)
    assert largest.numel <= 4 * count * out, "two directions, or columns, at once"


# ---- one-hot rows by themselves -------------------------------------------------------------------------


def rows(*shape: int, seed: int = 0, features: int = 5) -> OneHot:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, features, shape, generator=generator)
    return OneHot.of(index, features, torch.float64) * 2.0


def test_products_of_one_hot_rows_are_those_of_the_dense_ones():
    a, b = rows(3, 4), rows(2, 6, seed=1, features=7)
    A, B = a.dense(), b.dense()
    assert a.shape == A.shape and float(A.sum()) > 0 and float(A[0].abs().sum(-1).min()) in (0.0, 2.0)
    V, left = normal(2, 5, 3), normal(2, 3, 12)
    assert_close(a @ V, torch.einsum("nti,kij->kntj", A, V))
    assert_close(a.add_product_(torch.zeros(2, 3, 5).double(), left, 0.5), 0.5 * left @ A.flatten(0, 1))
    assert_close(a.squares().diag(), A.flatten(0, 1).T @ A.flatten(0, 1))
    x, y, X, Y = a.flatten(0, 1), b.flatten(0, 1), A.flatten(0, 1), B.flatten(0, 1)
    for one, other in ((x, y), (x, Y), (X, y), (X, Y)):
        assert_close(cross(one, other), X.T @ Y)
    assert_close(inner(a, rows(3, 2, seed=2)), A @ rows(3, 2, seed=2).dense().mT)
    assert_close(a.scaled(normal(5)).dense(), A * normal(5))


def test_one_hot_rows_are_cut_and_joined_as_the_dense_ones_are():
    a, b = rows(3, 4), rows(3, 2, seed=1)
    A, B = a.dense(), b.dense()
    assert torch.equal(cat([a, b], -2).dense(), torch.cat([A, B], -2))
    assert torch.equal(cat([a, B], -2), torch.cat([A, B], -2))
    assert torch.equal(padded(a, 2).dense(), functional.pad(A, (0, 0, 0, 2)))
    assert torch.equal(a.index_select(-3, torch.tensor([2, 0])).dense(), A[[2, 0]])
    assert torch.equal(a.narrow(-2, 1, 2).dense(), A[:, 1:3])
    assert torch.equal((a / 4.0).dense(), A / 4) and a.to(torch.float32).dense().dtype == torch.float32


def test_words_that_stand_twice_in_an_example_are_merged():
    a, g = rows(3, 8, features=4), normal(2, 3, 8, 2)
    merged, sums = a.merged(g)
    scores = [torch.einsum("snto,nti->snoi", v, x.dense()) for x, v in ((a, g), (merged, sums))]
    assert_close(scores[1], scores[0])
    assert_close(torch.einsum("snto,nti->oi", sums.square(), merged.dense()), scores[0].square().sum((0, 1)))
