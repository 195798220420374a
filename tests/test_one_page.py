"""The method on a page takes the steps of the optimizer, and imports nothing of the package."""

import inspect

import pytest
import torch
from helpers import assert_close, normal
from torch import nn

import kfac_viz as kv
from kfac_viz import one_page
from kfac_viz.one_page import OnePage

EVERY_STEP = {"observe_every": 1, "refresh_every": 1, "coarse_every": None, "coarse_window": 1}


def model(widths=(6, 8, 8, 4)) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1]).double()


@pytest.mark.parametrize("per_layer", [0, 4])
@pytest.mark.parametrize("kl_clip", [5e-4, 1e3])
def test_ten_steps_of_the_page_are_ten_steps_of_the_optimizer(per_layer, kl_clip):
    page, full = model(), model()
    paged = OnePage(page, λ=0.05, columns=per_layer, lr=0.2, momentum=0.9, decay=0.95, kl_clip=kl_clip)
    opt = kv.TwoLevelKFAC(
        full, likelihood="categorical", lr=0.2, damping=0.05, rule="factored", coarse="spectral", per_layer=per_layer,
        correction="balanced", coarse_operator="captured", fisher="mc", samples=1, decay=0.95, coarse_examples=64,
        momentum=0.9, weight_decay=0.0, step_rule="kl_clip", kl_clip=kl_clip, seed=0, **EVERY_STEP,
    )  # fmt: skip
    X, Y = normal(10, 40, 6), torch.arange(40) % 4
    start = [p.clone() for p in full.parameters()]
    for k, x in enumerate(X):
        loss = paged.step(x, Y, generator=torch.Generator().manual_seed(k))
        opt.zero_grad()
        expected = kv.nll(full(x), Y, "categorical")
        expected.backward()
        opt.observe(x)
        opt.step()
        assert loss == pytest.approx(float(expected), rel=1e-12)
        for mine, theirs in zip(page.parameters(), full.parameters(), strict=True):
            assert_close(mine, theirs, 1e-12)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(start, page.parameters(), strict=True))


def test_it_is_one_page_of_plain_pytorch():
    source = inspect.getsource(one_page)
    assert len(source.splitlines()) <= 80
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports and all(line.split()[1].split(".")[0] == "torch" for line in imports)
    assert "import" not in "".join(line for line in source.splitlines() if line not in imports)
