"""What the playground shows, against the objects that it is about."""

import pytest
import torch

import kfac_viz as kv
from kfac_viz.studies import coarse_space
from kfac_viz.studies.common.result import rounded
from kfac_viz.studies.common.setting import setting

SMALL = dict(widths=(5, 4), n=40, steps=5)


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("correction", ["additive", "a-def1", "a-def2", "balanced"])
@pytest.mark.parametrize(("coarse", "per_layer"), [("spectral", 3), ("krylov", 2), ("nicolaides", 0)])
def test_result_agrees_with_the_objects(rule, correction, coarse, per_layer):
    damping = 3e-3
    result = coarse_space.run(damping=damping, per_layer=per_layer, coarse=coarse, correction=correction, rule=rule,
                              **SMALL)  # fmt: skip
    s = setting("digits4", (5, 4), 40, 0, 5)
    A, M = s.F.damped(damping), kv.KFAC(s.F, damping, rule)
    Z = kv.coarse.krylov(A, M, s.g, per_layer) if coarse == "krylov" else getattr(kv.coarse, coarse)(s.F, per_layer)
    T = kv.TwoLevel(A, M, Z, correction)
    inverse = torch.linalg.inv(A.dense())
    scale = float(inverse.abs().max())
    assert float((result.missed - (inverse - M.dense())).abs().max()) < 1e-10 * scale
    assert float((result.added - (T.dense() - M.dense())).abs().max()) < 1e-10 * scale
    assert list(result.spectra) == [{"eigen": "kfac", "factored": "factored"}[rule], correction]
    torch.testing.assert_close(result.spectra[result.first], kv.spectrum(A, M), rtol=6e-4, atol=0)
    torch.testing.assert_close(result.spectra[correction], kv.spectrum(A, T), rtol=6e-4, atol=0)
    for name in ("additive", "a-def1", "a-def2", "balanced"):
        decrease = kv.captured_decrease(A, s.g, T.with_correction(name) @ s.g)
        assert result.captured[name] == pytest.approx(decrease, rel=6e-4)
    for name, one in (("kfac", "eigen"), ("factored", "factored")):  # both, whichever the columns correct
        decrease = kv.captured_decrease(A, s.g, kv.KFAC(s.F, damping, one) @ s.g)
        assert result.captured[name] == pytest.approx(decrease, rel=6e-4)
    assert f"K-FAC {result.at_best_length['kfac']:.2f}" in result.headline or not per_layer
    assert f"factored {result.at_best_length['factored']:.2f}" in result.headline
    assert ("factored" in result.where) == (rule == "factored")
    assert result.captured["exact"] == 1
    assert all(result.at_best_length[name] >= value - 1e-3 for name, value in result.captured.items())
    for name in ("fisher", "missed", "added"):
        total = sum(norm**2 for row in result.norms[name] for norm in row) ** 0.5
        assert total == pytest.approx(float(getattr(result, name).norm()), rel=1e-3, abs=1e-12)


def test_rounded_rounds_every_entry():
    x = torch.tensor([0.0, 1.23456789e-7, -98765.4321, 1.0], dtype=torch.float64)
    assert rounded(x).tolist() == pytest.approx([0.0, 1.235e-7, -98770.0, 1.0], rel=1e-12)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at most 2500"):
        coarse_space.run(widths=(64, 64), n=40)
    with pytest.raises(ValueError, match="steps must be one of 0, 1, 2, 5"):
        coarse_space.run(steps=3)


def test_the_live_picture_is_the_figure():
    """Every artist that moves is animated: after an update the blitted picture is that of a fresh figure."""
    import numpy as np

    from kfac_viz.show.live import Live

    first, second = (
        coarse_space.run(**SMALL),
        coarse_space.run(damping=1.0, per_layer=1, correction="additive", **SMALL),
    )
    live = Live(coarse_space.Plot(first))
    live.texts = []  # matplotlib's glyphs in both pictures
    start = np.asarray(live.picture(first), dtype=float)
    moved = np.asarray(live.picture(second), dtype=float)
    fresh = np.asarray(coarse_space.Plot(second).figure.canvas.buffer_rgba(), dtype=float)[..., :3]

    def differing(x, y):
        return float((abs(x - y).max(axis=2) > 60).mean())

    assert differing(moved, fresh) < 5e-4
    assert differing(start, fresh) > 1e-2
