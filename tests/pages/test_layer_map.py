"""The playground of large networks: the same numbers as from whole matrices, where both can be had."""

import numpy as np
import pytest
import torch
from torch import nn

import kfac_viz as kv
from kfac_viz.pages.layer_map import Plot, blocks_missed, compute, few_enough_scores
from kfac_viz.studies.coarse_space import run_on
from kfac_viz.studies.common.setting import Setting, all_shares, at_best_length, kronecker_blocks, setting


@pytest.mark.parametrize("data", ["digits4", "attention", "planted"])
def test_what_directions_capture_is_what_whole_matrices_say(data):
    s = setting(data, (5, 4), 30, 0, 3)
    A = s.F.damped(0.01)
    directions = {"gradient": s.g, "kfac": kv.KFAC(s.F, 0.01) @ s.g, "exact": A.solve(s.g), "still": 0 * s.g}
    for system in (A, s.matrix.damped(0.01)):  # through the captured vectors, and from the matrix
        found = all_shares(system, s.g, directions)
        assert found.pop("still") == (0.0, 0.0, 0.0)
        for name, worth in found.items():
            v = directions[name]
            assert worth.captured == pytest.approx(kv.captured_decrease(A, s.g, v), rel=1e-9)
            assert worth.at_best_length == pytest.approx(kv.captured_decrease(A, s.g, at_best_length(A, s.g, v)))
            pieces = torch.block_diag(*(piece.reshape(-1, 1) for piece in A.partition.split(v)))
            c = torch.linalg.solve(pieces.T @ A.dense() @ pieces, pieces.T @ s.g)
            assert worth.at_layer_lengths == pytest.approx(kv.captured_decrease(A, s.g, pieces @ c), rel=1e-9)
        assert found["exact"] == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    with pytest.raises(ValueError, match="gradient is zero"):
        all_shares(A, 0 * s.g, directions)


@pytest.mark.parametrize("data", ["digits4", "attention", "planted"])
def test_what_kfac_misses_of_each_block(data):
    F = setting(data, (5, 4), 30, 0, 3).F
    error = F.dense() - kronecker_blocks(F)
    expected = torch.stack([error[s, s].norm() for s in F.partition.slices])
    torch.testing.assert_close(blocks_missed(F, F.norms().diagonal()), expected, rtol=1e-7, atol=1e-7)


def test_the_run_agrees_with_the_small_playground():
    s = setting("digits4", (5, 4), 30, 0, 0)
    large, small = run_on([s], compute)(damping=0.03), kv.studies.coarse_space.run(widths=(5, 4), n=30, damping=0.03)
    for name, found in large.shares.items():
        for kind in ("captured", "at_best_length", "at_layer_lengths"):
            assert getattr(found, kind) == pytest.approx(getattr(small, kind)[name], rel=1e-3, abs=2e-4)
    np.testing.assert_allclose(large.norms["fisher"], small.norms["fisher"], rtol=1e-3)
    assert large.size == small.size and "parameter space" in large.how
    table = large.table()
    assert set(table.quantity) >= {"effective dimension", "layer overlap", "norm of block", "eigenvalue", "captured"}
    figure = Plot(large).figure
    assert "K-FAC" in large.headline and "directions" in large.where
    assert large.headline in figure.get_label() and "Found in parameter space" in figure.get_label()


def test_explore_opens_on_a_network_too_large_for_matrices_and_tells_both_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 10))
    x, y = torch.randn(30, 20), torch.randint(10, (30,))
    panel = kv.explore(model, x, y, likelihood="categorical", fisher="mc")
    assert panel.error == "" and "sample space, 30 × 30" in panel.result.how
    before = panel.result
    panel.controls["damping"].value = panel.controls["damping"].options[3][1]
    assert panel.error == "" and panel.result.dimension != before.dimension
    regions = Plot(panel.result).regions(panel.result)
    assert len(regions) == 2 * 9 and "layers 1 (0: 20+1→60) and 2 (2: 60+1→40)" in regions[1][-1]
    assert "fisher='mc'" in panel.command


def test_too_many_parameters_and_scores_are_refused_in_words(monkeypatch):
    monkeypatch.setattr("kfac_viz.pages.layer_map.MOST_SCORES", 20)
    problem = kv.problems.digits((12,), 30, side=4)
    with pytest.raises(ValueError, match=r"has \d+ parameters and the batch 30 examples with 10 vectors .* Take fewer"):
        few_enough_scores(Setting(problem))
