"""The exact, Monte Carlo and empirical Fisher against scores formed one example at a time by autodiff."""

import math

import pytest
import torch
from helpers import (
    DEVICES,
    LIKELIHOODS,
    ZOO,
    assert_close,
    blocks,
    captured,
    empirical_fisher,
    error,
    exact_fisher,
    mlp,
    normal,
    targets_for,
)
from torch import nn

import kfac_viz as kv
from kfac_viz.method import fisher as fisher_module
from kfac_viz.scores.likelihood import output_vectors

pytestmark = pytest.mark.filterwarnings("ignore:Outside the Fisher")


def assert_all_forms_agree(F, expected, tol=1e-12):
    """``F @ I``, dense, blocks put together, diagonal, scores: one matrix."""
    matrix = F.dense()
    assert_close(matrix, expected, tol)
    assert torch.equal(matrix, matrix.T)
    assert_close(F @ F.eye(), expected, tol)
    assert_close(F.diagonal(), expected.diagonal(), tol)
    names = F.partition.names
    assert_close(torch.cat([torch.cat([F.block(l, m) for m in names], 1) for l in names]), expected, tol)
    J = F.scores(F.eye()).flatten(1).T
    assert_close(J.T @ J / F.N, expected, tol)
    s = normal(2, F.S, F.N).to(F.device, F.dtype)
    assert_close(F.pull(s), s.flatten(1) @ J, tol)
    assert_close(F.pull(s[0]), s[0].flatten() @ J, tol)
    v = normal(F.shape[0]).to(F.device, F.dtype)
    assert_close(F @ v, expected @ v, tol)
    assert (F @ v[:, None][:, :0]).shape == (F.shape[0], 0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ZOO)
def test_exact_fisher_is_the_mean_of_per_example_ggns(case, likelihood):
    model, inputs = ZOO[case].make()
    F = kv.capture(model, inputs, likelihood=likelihood)
    assert_all_forms_agree(F, exact_fisher(model, inputs, likelihood, F.partition.names))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ZOO)
def test_empirical_fisher_is_the_mean_of_gradient_outer_products(case, likelihood):
    model, inputs = ZOO[case].make()
    targets = targets_for(model(inputs).detach(), likelihood)
    F = kv.capture(model, inputs, targets, likelihood=likelihood, fisher="empirical")
    assert F.S == 1
    assert_all_forms_agree(F, empirical_fisher(model, inputs, targets, likelihood, F.partition.names))


@pytest.mark.parametrize("case", ["tanh", "positions, T² > S", "positions, T² ≤ S", "conv", "called twice"])
def test_chunks_of_examples_change_nothing(case, monkeypatch):
    F = captured(case, n=7)
    whole, diagonal = F.dense(), F.diagonal()
    product = F @ normal(F.shape[0], 5)
    monkeypatch.setattr(fisher_module, "_CHUNK", 1)
    again, pieces, chunks = captured(case, n=7), [], kv.Fisher._chunks
    monkeypatch.setattr(kv.Fisher, "_chunks", lambda *a: (pieces.append(1) or piece for piece in chunks(*a)))
    assert_close(again.dense(), whole, 1e-14)
    assert_close(again.diagonal(), diagonal, 1e-14)
    assert_close(again @ normal(F.shape[0], 5), product, 1e-14)
    assert len(pieces) >= 7  # example by example


def test_both_branches_of_a_block_with_positions_are_reached():
    """Four position pairs against three vectors, and against five."""
    few, many = captured("positions, T² > S"), captured("positions, T² ≤ S")
    assert few.a[0].shape[1] ** 2 > few.S and many.a[0].shape[1] ** 2 <= many.S


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ["tanh", "sequence"])
def test_monte_carlo_converges_at_the_rate_one_over_root_samples(case, likelihood):
    model, inputs = ZOO[case].make(20)
    exact = kv.capture(model, inputs, likelihood=likelihood).dense()
    generator = torch.Generator().manual_seed(0)
    counts, deviations = (16, 64, 256, 1024), []
    for samples in counts:
        tries = [
            kv.capture(model, inputs, likelihood=likelihood, fisher="mc", samples=samples, generator=generator).dense()
            for _ in range(6)
        ]
        deviations.append(math.sqrt(sum(float((F - exact).square().sum()) for F in tries) / len(tries)))
    x, y = torch.tensor(counts).log(), torch.tensor(deviations).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert abs(slope + 0.5) < 0.05, (slope, deviations)
    assert deviations[-1] < 0.03 * float(exact.norm())


def test_monte_carlo_is_not_the_empirical_fisher():
    """Negative control: with labels that the model finds unlikely the two are far apart."""
    model, inputs = ZOO["tanh"].make(20)
    exact = kv.capture(model, inputs, likelihood="categorical").dense()
    unlikely = model(inputs).argmin(1)
    empirical = kv.capture(model, inputs, unlikely, likelihood="categorical", fisher="empirical").dense()
    assert error(empirical, exact) > 0.3


def test_sampled_vectors_are_residuals_of_possible_labels():
    outputs = normal(6, 4)
    vectors = output_vectors(outputs, "categorical", "mc", samples=3, generator=torch.Generator().manual_seed(1))
    labels = outputs.softmax(1) - vectors * math.sqrt(3)
    assert_close(labels, nn.functional.one_hot(labels.argmax(-1), 4).double(), 1e-14)
    bits = outputs.sigmoid() - output_vectors(outputs, "bernoulli", "mc", generator=torch.Generator().manual_seed(1))
    assert_close(bits, bits.round(), 1e-14)
    assert set(bits.round().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_vectors_at_saturated_outputs(likelihood):
    """No cancellation: at logits of ±30 the variance is the tiny number that it is, not zero."""
    outputs = torch.tensor([[30.0, -30.0, 0.5]], dtype=torch.float64)
    vectors = output_vectors(outputs, likelihood, "exact")[:, 0]
    found = (vectors.T @ vectors).diagonal()
    e = torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    tiny = e / (1 + e) ** 2
    expected = {
        "gaussian": torch.ones(3, dtype=torch.float64),
        "bernoulli": torch.stack([tiny, tiny, outputs[0, 2].sigmoid() * (-outputs[0, 2]).sigmoid()]),
        "categorical": outputs[0].softmax(0) * torch.stack([(outputs[0, 2] - 30).exp(), e * 0 + 1, e * 0 + 1]),
    }[likelihood]
    assert float(((found - expected) / expected).abs().max()) < 1e-10


def test_samples_come_from_the_generator_that_is_passed():
    model, inputs = ZOO["tanh"].make()

    def draw(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return kv.capture(model, inputs, likelihood="gaussian", fisher="mc", generator=generator).dense()

    assert torch.equal(draw(4), draw(4)) and torch.equal(draw(), draw(0))
    assert not torch.equal(draw(4), draw(5))
    generator = torch.Generator().manual_seed(4)
    first, second = (
        kv.capture(model, inputs, likelihood="gaussian", fisher="mc", generator=generator).dense() for _ in range(2)
    )
    assert torch.equal(first, draw(4)) and not torch.equal(first, second)


def test_capturing_twice_gives_the_same_bits():
    assert torch.equal(captured("residual").dense(), captured("residual").dense())


def test_mean_over_examples():
    """Twice the same batch is the same Fisher; a batch is the mean of its examples."""
    model, inputs = ZOO["residual"].make(4)
    F = kv.capture(model, inputs, likelihood="categorical").dense()
    assert_close(kv.capture(model, inputs.repeat(2, 1), likelihood="categorical").dense(), F)
    singles = [kv.capture(model, x[None], likelihood="categorical").dense() for x in inputs]
    assert_close(torch.stack(singles).mean(0), F)


def test_positive_semi_definite_and_of_rank_at_most_s_n():
    F = captured("tanh", n=3)
    d = torch.linalg.eigvalsh(F.dense())
    assert float(d[0]) > -1e-14 and int((d > 1e-12).sum()) == 6  # categorical: C − 1 per example


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_those_of_the_model(dtype, device):
    model, inputs = ZOO["residual"].make()
    exact = exact_fisher(model, inputs, "categorical", ("body.one", "body.two.0", "head"))
    F = kv.capture(model.to(device, dtype), inputs.to(device, dtype), likelihood="categorical")
    assert F.dtype == dtype and F.device.type == device
    matrix = F.dense()
    assert matrix.dtype == dtype and matrix.device.type == device
    assert_close(matrix.cpu().double(), exact, 1e-12 if dtype == torch.float64 else 1e-5)


def test_half_precision_is_kept_in_float32():
    model, inputs = ZOO["tanh"].make()
    model, inputs = model.bfloat16(), inputs.bfloat16()
    F = kv.capture(model, inputs, likelihood="categorical")
    rounded = kv.capture(model.double(), inputs.double(), likelihood="categorical")
    assert F.dtype == torch.float32
    assert_close(F.dense().double(), rounded.dense(), 0.03)
    assert kv.KFAC(F, 1e-2).dense().dtype == torch.float32


def test_blocks_by_number_and_by_name():
    F = captured("residual")
    for l, row in enumerate(blocks(F.partition, F.dense())):
        for m, block in enumerate(row):
            assert_close(F.block(l, m), block, 1e-14)
            assert torch.equal(F.block(F.partition.names[l], m - len(row)), F.block(l, m))


def test_several_inputs_and_integer_inputs():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, i, x):
            return self.head(self.table(i) * x)

    model = TwoInputs().double()
    i, x = torch.tensor([1, 5, 5]), normal(3, 4)
    F = kv.capture(model, (i, x), likelihood="gaussian")
    expected = kv.capture(model.head, model.table(i).detach() * x, likelihood="gaussian").dense()
    assert_close(F.block("head", "head"), expected)


def test_chosen_layers_are_a_principal_part():
    model, inputs = ZOO["residual"].make()
    whole = kv.capture(model, inputs, likelihood="categorical")
    some = kv.capture(model, inputs, likelihood="categorical", layers=["head", "body.one"])
    first, _, last = whole.partition.slices
    keep = torch.cat([torch.arange(s.start, s.stop) for s in (first, last)])
    assert_close(some.dense(), whole.dense()[keep][:, keep])


def test_a_frozen_layer_is_left_out_and_changes_nothing_else():
    model, inputs = ZOO["tanh"].make()
    whole = kv.capture(model, inputs, likelihood="gaussian")
    model[0].requires_grad_(False)
    F = kv.capture(model, inputs, likelihood="gaussian", layers=["2"])
    assert_close(F.dense(), whole.block("2", "2"))


def test_a_layer_that_does_not_reach_the_outputs_has_zero_blocks():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.dead, self.alive = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            self.dead(x)
            return self.alive(x)

    F = kv.capture(Dead().double(), normal(5, 4), likelihood="gaussian")
    assert not F.block("dead", "dead").any() and F.block("alive", "alive").any()
    assert torch.isfinite(kv.KFAC(F, 1e-3, rule="factored").dense()).all()


def test_repr_tells_what_it_is():
    F = captured("sigmoid, some bias", fisher="mc", samples=2)
    for words in ("mc categorical", "5 examples × 2 vectors", "float64 on cpu", "(15 + 6 + 9)"):
        assert words in repr(F)
    assert "0.001·I" in repr(F.damped(1e-3))


def test_damped_operator():
    F = captured("residual")
    A, matrix = F.damped(0.3), F.dense() + 0.3 * torch.eye(F.shape[0], dtype=torch.float64)
    assert_close(A.dense(), matrix)
    assert_close(A @ A.eye(), matrix)
    assert_close(A.diagonal(), matrix.diagonal())
    for l, row in enumerate(blocks(F.partition, matrix)):
        for m, block in enumerate(row):
            assert_close(A.block(l, m), block)
    r = normal(F.shape[0], 2)
    assert_close(A.solve(r), torch.linalg.solve(matrix, r), 1e-11)
    assert_close(A.solve(r[:, 0]), torch.linalg.solve(matrix, r[:, 0]), 1e-11)
    assert_close(A.with_damping(7.0).dense(), F.dense() + 7 * torch.eye(F.shape[0], dtype=torch.float64))
    assert A.damping == 0.3


def test_eigenvectors_are_shared_by_every_damping(monkeypatch):
    many, few = captured("residual", n=40).damped(1.0), captured("residual").damped(1.0)
    many.solve(normal(many.shape[0]))
    few.effective_dimension()
    for name in ("eigh", "eigvalsh", "cholesky_ex"):
        monkeypatch.setattr(torch.linalg, name, None)
    for A, space in ((many, "parameter space"), (few, "sample space")):
        other, r = A.with_damping(0.1), normal(A.shape[0])
        assert repr(A.operator.solver).startswith(space)
        assert_close(other @ other.solve(r), r, 1e-11)
    other = many.with_damping(0.1)
    assert_close((other.eigen.U * other.eigen.d) @ other.eigen.U.T, other.dense(), 1e-13)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_has_the_scale_of_the_fisher(likelihood):
    """``kv.nll`` is the mean of summed losses: its Hessian by the outputs, times N, is the output-side Fisher."""
    outputs = normal(4, 3)
    targets = targets_for(outputs, likelihood)
    H = torch.autograd.functional.hessian(lambda f: kv.nll(f, targets, likelihood), outputs)
    vectors = output_vectors(outputs, likelihood, "exact")
    expected = torch.einsum("sna,snb,nm->namb", vectors, vectors, torch.eye(4, dtype=torch.float64)) / 4
    assert_close(H, expected, 1e-13)


def test_gradient_of_a_gaussian_problem_lies_in_the_range_of_its_fisher():
    """g = Jᵀ(f − y)/N, with the same J and the same 1/N as F."""
    problem = kv.problems.planted(depth=2, width=3, n=30)
    F = problem.capture()
    residual = (problem.model(problem.inputs) - problem.targets).detach()
    assert_close(F.pull(residual.T) / F.N, problem.gradient(), 1e-12)


def test_one_exact_natural_gradient_step_solves_linear_regression():
    problem = kv.problems.planted(depth=1, activation=None, n=60)
    A = problem.capture().damped(0.0)
    A.operator.partition.add_(problem.model, A.solve(problem.gradient()), alpha=-1.0)
    assert float(problem.gradient().norm()) < 1e-13


def test_a_single_parameter():
    model, x = mlp((1, 1), bias=False), normal(3, 1)
    F = kv.capture(model, x, likelihood="gaussian")
    assert_close(F.dense(), (x**2).mean().view(1, 1))


class Attention(nn.Module):
    """Three layers that meet in an attention over positions."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.head((q @ k.mT / 6**0.5).softmax(-1) @ v).mean(1)


class Recurrent(nn.Module):
    """A linear layer in a loop over time beside a cell that is none of ours."""

    def __init__(self):
        super().__init__()
        self.inner, self.cell, self.head = nn.Linear(4, 4), nn.GRUCell(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h = self.cell(self.inner(x[:, t]), h)
        return self.head(h)


def between(*modules):
    return nn.Sequential(nn.Linear(4, 6), *modules, nn.Linear(6, 3)), (4,)


def after_convolution(*modules, features):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *modules, nn.Flatten(), nn.Linear(features, 3)), (2, 4, 4)


ARCHITECTURES = {
    **{name: (lambda name=name: between(getattr(nn, name)())) for name in (
        "GELU", "SiLU", "ELU", "Softplus", "LeakyReLU", "Hardtanh", "PReLU", "Mish",
    )},
    "softmax": lambda: between(nn.Softmax(1)),
    "layer norm": lambda: between(nn.LayerNorm(6)),
    "max pooling": lambda: after_convolution(nn.MaxPool2d(2), features=16),
    "adaptive pooling": lambda: after_convolution(nn.AdaptiveAvgPool2d(1), features=4),
    "group norm": lambda: after_convolution(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), features=64),
    "grouped convolution between": lambda: after_convolution(nn.Conv2d(4, 4, 3, groups=2), features=16),
    "reflected padding": lambda: after_convolution(nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), features=32),
    "attention": lambda: (Attention(), (3, 4)),
    "recurrent": lambda: (Recurrent(), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whatever_lies_between_the_layers(name):
    torch.manual_seed(0)
    model, shape = ARCHITECTURES[name]()
    model, inputs = model.double().eval(), normal(4, *shape)
    F = kv.capture(model, inputs, likelihood="categorical")
    assert_all_forms_agree(F, exact_fisher(model, inputs, "categorical", F.partition.names))


def test_numbers_so_large_that_a_sum_overflows_are_still_finite():
    model, inputs = ZOO["tanh"].make()
    inputs = inputs.sign() * 1e308
    assert not torch.isfinite(inputs.abs().sum())
    assert torch.isfinite(kv.capture(model, inputs.abs(), likelihood="gaussian", layers=["2"]).dense()).all()
