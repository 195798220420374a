"""What others train networks of differential equations with: identities, and references by dense matrices."""

import pytest
import torch

import kfac_viz as kv
from kfac_viz.studies.pde import rivals, terms
from kfac_viz.studies.pde.rivals import Rival, training
from kfac_viz.train.search import LENGTHS_TRIED, line_search


def problem(dim=2, points=12, boundary=12, **options):
    return kv.problems.poisson(dim, (6, 5), points, boundary, **options)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("build", [
    problem, lambda: problem(3, 9, 4), lambda: kv.problems.heat(1, (5, 4), 10, 6),
    lambda: kv.problems.burgers((5,), 9, 3),
])  # fmt: skip
def test_one_pass_gives_residuals_and_their_jacobian(build):
    p = build()
    both = terms.both_terms(p, p.inputs)
    J, r = terms.jacobian(both)
    kinds = p.inputs[:, -1]
    inside, boundary = (1 - kinds).sum() ** -0.5, kinds.sum() ** -0.5 / p.model.weight
    weights = torch.where(kinds > 0, boundary, inside)
    torch.testing.assert_close(r, p.model(p.inputs).detach()[:, 0] * weights, rtol=1e-11, atol=1e-12)
    reference = []
    for n in range(len(p.inputs)):
        p.model.zero_grad()
        (p.model(p.inputs)[n, 0] * weights[n]).backward()
        reference.append(p.partition.pack_grad(p.model))
    torch.testing.assert_close(J, torch.stack(reference), rtol=1e-10, atol=1e-11)
    assert terms.loss(p, p.inputs) == pytest.approx(0.5 * float(r @ r), rel=1e-12)
    torch.testing.assert_close(terms.gradient(both), J.T @ r)
    D = randn(3, J.shape[1])
    torch.testing.assert_close(terms.along(both, D), D @ J.T)


def test_engd_w_is_this_projects_exact_step():
    p = problem(boundary=7, term_weights=(1.0, 1.0))
    J, r = terms.jacobian(terms.both_terms(p, p.inputs))
    assert float(p.loss()) == pytest.approx(terms.loss(p, p.inputs), rel=1e-12)
    v = rivals.engd_w(J, r, 1e-3)
    torch.testing.assert_close(v, p.capture().damped(1e-3).solve(p.gradient()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(v, rivals.engd(J, r, 1e-3), rtol=1e-8, atol=1e-10)


def test_spring_minimises_residuals_and_the_way_from_its_last_step():
    J, r, φ = randn(9, 30), randn(9, seed=1), randn(30, seed=2)
    new = rivals.spring(J, r, 1e-2, 0.7, φ)
    assert float((J.T @ (J @ new - r) + 1e-2 * (new - 0.7 * φ)).norm()) < 1e-11
    torch.testing.assert_close(rivals.spring(J, r, 1e-2, 0.0, φ), rivals.engd_w(J, r, 1e-2))


def test_nystrom_solves_with_the_sketched_matrix_and_exactly_with_a_whole_sketch():
    J, r = randn(8, 20), randn(8, seed=1)
    whole = rivals.nystrom(J, r, 0.1, randn(8, 8, seed=2))
    torch.testing.assert_close(whole, rivals.engd_w(J, r, 0.1), rtol=1e-5, atol=1e-6)
    Ω, K = randn(8, 3, seed=2), J @ J.T + rivals.SHIFT * torch.eye(8, dtype=J.dtype)
    approximate = K @ Ω @ torch.linalg.solve(Ω.T @ K @ Ω, Ω.T @ K)
    expected = J.T @ torch.linalg.solve(approximate + 0.1 * torch.eye(8, dtype=J.dtype), r)
    torch.testing.assert_close(rivals.nystrom(J, r, 0.1, Ω), expected, rtol=1e-9, atol=1e-10)


def test_a_kronecker_sum_is_inverted_jointly():
    def definite(n, seed):
        X = randn(n, n + 2, seed=seed)
        return X @ X.T

    A, B, C, D = definite(3, 0), definite(4, 1), definite(3, 2), definite(4, 3)
    X = randn(3, 4, seed=4)
    expected = torch.linalg.solve(torch.kron(A, B) + torch.kron(C, D), X.flatten()).view(3, 4)
    torch.testing.assert_close(rivals.KroneckerSum((A, B), (C, D)) @ X, expected, rtol=1e-10, atol=1e-12)


def test_kfac_for_pinns_adds_a_pair_for_each_term_with_damping_in_every_factor():
    p = problem()
    both = terms.both_terms(p, p.inputs)
    pairs = [rivals.factors(term) for term in both]
    g = terms.gradient(both)
    blocks = []
    for layer in zip(*pairs, strict=True):
        blocks.append(sum(torch.kron(*(X + 1e-2 * torch.eye(len(X), dtype=X.dtype) for X in pair)) for pair in layer))
    expected = torch.linalg.solve(torch.block_diag(*blocks), g)
    torch.testing.assert_close(rivals.kfac_pinns(pairs, g, 1e-2), expected, rtol=1e-9, atol=1e-10)
    alone = kv.problems.poisson(2, (6, 5), points=1, boundary=1)  # on the boundary one point has one position
    (_, a) = terms.both_terms(alone, alone.inputs)
    J, _ = terms.jacobian([a])
    product = torch.block_diag(*(torch.kron(*pair) for pair in rivals.factors(a)))
    sizes = [len(G) * len(A) for G, A in rivals.factors(a)]
    mask = torch.block_diag(*(torch.ones(n, n, dtype=J.dtype) for n in sizes))
    torch.testing.assert_close(product, (J.T @ J) * mask)


def test_averages_start_from_the_identity():
    new = [[(randn(2, 2), randn(3, 3))]]
    ((pair,),) = rivals.averaged(None, new, 0.9)
    torch.testing.assert_close(pair[1], 0.9 * torch.eye(3, dtype=torch.float64) + 0.1 * new[0][0][1])
    ((pair,),) = rivals.averaged(new, new, 0.4)
    torch.testing.assert_close(pair[0], new[0][0][0])


@pytest.mark.parametrize("rival", [
    Rival("engd-w", 1e-6), Rival("engd", 1e-6), Rival("spring", 1e-6, momentum=0.5), Rival("nystrom", 1e-2, rank=6),
])  # fmt: skip
def test_a_search_on_the_grid_never_goes_up_and_ends_where_its_length_says(rival):
    p = problem()
    P, losses = p.partition, [terms.loss(p, p.inputs)]
    before = P.pack(p.model)
    for _, length in zip(range(4), training(p, rival, lambda _: p.inputs), strict=False):
        losses.append(terms.loss(p, p.inputs))
        assert length == 0 or length in LENGTHS_TRIED
        assert bool((P.pack(p.model) == before).all()) == (length == 0)
        before = P.pack(p.model)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_spring_without_momentum_is_engd_w_and_a_grid_where_all_is_worse_stays():
    one, other = problem(), problem()
    pairs = zip(training(one, Rival("spring", 1e-6), lambda _: one.inputs),
                training(other, Rival("engd-w", 1e-6), lambda _: one.inputs), strict=True)  # fmt: skip
    for _, (length, same) in zip(range(3), pairs, strict=False):
        assert length == same
        x, y = (p.partition.pack(p.model) for p in (one, other))
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    (worse, _), (broken, _) = (line_search(at, 1.0, "least") for at in (lambda t: 1.0 + t, lambda t: float("nan")))
    assert worse == broken == 0


def test_kfac_for_pinns_takes_the_best_of_direction_and_last_step():
    p = problem()
    P, rival, x = p.partition, Rival("kfac-pinns", 1e-2, average=0.5), []
    steps = training(p, rival, lambda _: p.inputs)
    averages = None
    for k in range(3):
        x.append(P.pack(p.model))
        both = terms.both_terms(p, p.inputs)
        averages = rivals.averaged(averages, [rivals.factors(term) for term in both], 0.5)
        J, r = terms.jacobian(both)
        v = rivals.kfac_pinns(averages, J.T @ r, 1e-2)
        next(steps)
        step = P.pack(p.model) - x[-1]
        if k == 0:
            torch.testing.assert_close(step, -rivals.FIRST_LENGTH * v, rtol=1e-6, atol=1e-12)
            continue
        D = torch.stack([v, x[-1] - x[-2]])
        left = D @ (J.T @ r + J.T @ (J @ step) + 1e-2 * step)  # the model's slope along both is zero at its least
        scale = D.norm(dim=1) * (J.T @ r).norm()
        assert float((left / scale).abs().max()) < 1e-6
