"""One step of Adam, Shampoo, SOAP and Muon, from the scores and from gradients of batches, W and b apart."""

import pytest
import torch
from helpers import ZOO, assert_close, captured, targets_for
from torch import nn

import kfac_viz as kv
from kfac_viz.studies.common.batches import directions, of_batches, parts_of

SIZE, N, EPSILON = 4, 12, 1e-8
MODELS = {
    "mlp": lambda: ZOO["tanh"].make(N),
    "convolution": lambda: ZOO["conv"].make(N),
    "positions": lambda: ZOO["sequence"].make(N),
    "norm": lambda: ZOO["batch norm, dropout"].make(N),
    "transformer": lambda: ((problem := kv.problems.attention(4, N)).model.eval(), problem.inputs),
}


def root(X, exponent):
    d, U = torch.linalg.eigh(X + EPSILON * torch.eye(len(X), dtype=X.dtype))
    return (U * d.clamp_min(EPSILON) ** exponent) @ U.T


def gradients(model, inputs, targets):
    """Of every parameter, by PyTorch; a kernel as a matrix, and a packed attention weight in three."""
    model.zero_grad()
    kv.nll(model(inputs), targets, "categorical").backward()
    found = {}
    for name, p in model.named_parameters():
        cut = 3 if "in_proj" in name else 1
        for i, part in enumerate(p.grad.chunk(cut)):
            found[name, i] = (part.flatten(1) if part.ndim > 1 else part[:, None]).clone()
    model.zero_grad()
    return found


def plain(V, batches):
    """The papers' formulas for one parameter, from its gradient V and those of the batches."""
    squares = torch.stack([X.square() for X in batches]).mean(0)
    L, R = (torch.stack(each).mean(0) for each in ([X @ X.T for X in batches], [X.T @ X for X in batches]))
    adam = V / (squares.sqrt() + EPSILON)
    if V.shape[1] == 1:
        return {"adam": adam, "shampoo": root(L, -1 / 2) @ V, "soap": adam, "muon": adam}
    U, W = (torch.linalg.eigh(X)[1] for X in (L, R))
    rotated = torch.stack([(U.T @ X @ W).square() for X in batches]).mean(0)
    left, d, right = torch.linalg.svd(V, full_matrices=False)
    within = d > 1e-10 * d[0]
    return {
        "adam": adam,
        "shampoo": root(L, -1 / 4) @ V @ root(R, -1 / 4),
        "soap": U @ ((U.T @ V @ W) / (rotated.sqrt() + EPSILON)) @ W.T,
        "muon": left[:, within] @ right[within],
    }


def in_layout(model, partition, steps):
    """A dictionary of :func:`gradients` as a vector over the layers."""
    for name, p in model.named_parameters():
        parts = [steps[name, i] for i in range(3 if "in_proj" in name else 1)]
        p.grad = torch.cat(parts).view(p.shape)
    v = partition.pack_grad(model)
    model.zero_grad()
    return v


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_a_plain_implementation(name):
    model, x = MODELS[name]()
    y = targets_for(model(x).detach(), "categorical")
    F = kv.capture(model, x, y, likelihood="categorical", fisher="empirical")
    whole = gradients(model, x, y)
    batches = [gradients(model, x[s : s + SIZE], y[s : s + SIZE]) for s in range(0, N, SIZE)]
    expected = {key: plain(V, [b[key] for b in batches]) for key, V in whole.items()}
    found = directions(F, in_layout(model, F.partition, whole), SIZE)
    for rule, v in found.items():
        close = in_layout(model, F.partition, {key: steps[rule] for key, steps in expected.items()})
        if rule != "soap":
            assert_close(v, close, 1e-4 if rule == "shampoo" else 1e-8)
    for l, rows, columns in parts_of(F.partition):  # eigenvectors of a value that several share are anybody's
        if columns.stop - columns.start == 1:
            mine, theirs = (F.partition.matrices(v)[l][rows, columns] for v in (found["soap"], found["adam"]))
            assert_close(mine, theirs)


def test_soap_is_adam_in_the_eigenvectors_of_shampoo():
    """In a layer whose matrices have no eigenvalue twice, so that its eigenvectors are known."""
    F = captured("tanh", 40, fisher="empirical")
    g = F.pull(torch.full((1, 40), 1 / 40, dtype=F.dtype))
    found = directions(F, g, 2)["soap"]
    batches = of_batches(F, 2)
    for k, (l, rows, columns) in enumerate(parts_of(F.partition)):
        if columns.stop - columns.start > 1:
            each = torch.einsum("nto,nti->noi", batches.g[k][0], batches.a[k])
            expected = plain(F.partition.matrices(g)[l][rows, columns], list(each))["soap"]
            mine = F.partition.matrices(found)[l][rows, columns]
            if l == 0:  # the softmax leaves the last layer's L singular
                assert_close(mine, expected, 1e-6)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_the_fisher_of_batches_has_their_gradients_in_its_scores(size):
    F = captured("conv", 12, fisher="empirical")
    batches = of_batches(F, size)
    expected = torch.stack([
        F.pull(torch.eye(12, dtype=F.dtype)[None, k : k + size].sum(1) / size) for k in range(0, 12, size)
    ])  # fmt: skip
    rows = batches.pull(torch.eye(12 // size, dtype=F.dtype)[:, None])
    for v, b in zip(expected, rows, strict=True):
        for (l, top, left), V in zip(parts_of(F.partition), batches.partition.matrices(b), strict=True):
            assert_close(V, F.partition.matrices(v)[l][top, left])


def test_muon_is_shampoo_of_one_batch():
    """``(V Vᵀ)^(-1/4) V (Vᵀ V)^(-1/4)`` is ``U Wᵀ``, too."""
    F = captured("tanh", 12, fisher="empirical")
    g = F.pull(torch.full((1, 12), 1 / 12, dtype=F.dtype))
    found = directions(F, g, 12, epsilon=1e-14)
    for l, rows, columns in parts_of(F.partition):
        if columns.stop - columns.start > 1:
            muon, shampoo = (F.partition.matrices(found[name])[l][rows, columns] for name in ("muon", "shampoo"))
            assert_close(shampoo, muon, 1e-5)


def test_what_has_no_batches_is_refused():
    F = captured("tanh", 12, fisher="empirical")
    for wrong, sentence in (
        (lambda: of_batches(captured("tanh", 12), 4), "got the exact one"),
        (lambda: of_batches(F, 5), "12 examples are not a whole number of batches of 5"),
        (lambda: of_batches(F, 0), "size must be a whole number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong()
    model = nn.Sequential(nn.Conv1d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.ones(4, 2, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    grouped = kv.capture(model, x, y, likelihood="categorical", fisher="empirical")
    with pytest.raises(ValueError, match="Layer '0' has groups"):
        of_batches(grouped, 2)
