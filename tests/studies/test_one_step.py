"""The geometry of one step: along and astray against captured decreases, and the plane against losses one by one."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kfac_viz as kv
from kfac_viz.studies import one_step
from kfac_viz.studies.common.setting import setting
from kfac_viz.studies.one_step import ALONG, ASTRAY, Place, _plane

SMALL = dict(widths=(5, 4), n=40)


@pytest.mark.parametrize("data", ["digits4", "autoencoder4", "attention"])
@pytest.mark.parametrize("steps", [0, 5])
def test_places_say_what_a_step_captures(data, steps):
    result = one_step.run(**SMALL, data=data, steps=steps)
    other = kv.studies.coarse_space.run(**SMALL, data=data, steps=steps)
    for name, place in result.places.items():
        assert place.captured == pytest.approx(other.captured[name], rel=1e-3, abs=5e-3)
        assert place.at_best_length == pytest.approx(other.at_best_length[name], rel=1e-3, abs=5e-3)
    assert result.places["exact"] == (1.0, 0.0)


@given(st.floats(-3, 3), st.floats(0, 3), st.floats(0.01, 10))
def test_only_the_angle_counts_at_the_best_length(along, astray, factor):
    one, other = Place(along, astray), Place(factor * along, factor * astray)
    assert one.at_best_length == pytest.approx(other.at_best_length, abs=1e-9)
    assert one.captured <= max(one.at_best_length, 0) + 1e-9


@pytest.mark.parametrize("data", ["digits4", "planted", "attention"])
def test_the_gain_is_that_of_the_real_loss(data):
    result = one_step.run(**SMALL, data=data, damping=0.1)
    network = setting(data, (5, 4), 40, 0, 0)
    exact, off = _plane(network, 0.1, "eigen")
    A, g = network.F.damped(0.1), network.g
    assert float(exact @ (A @ off)) == pytest.approx(0, abs=1e-9)
    assert float(off @ (A @ off)) == pytest.approx(float(g @ exact), rel=1e-9)
    before = float(network.problem.loss())
    for i, j in ((0, 0), (11, 2), (11, 12), (20, 7)):
        model = copy.deepcopy(network.problem.model)
        network.F.partition.add_(model, ALONG[j] * exact + ASTRAY[i] * off, alpha=-1.0)
        after = float(kv.nll(model(*network.problem.arguments), network.problem.targets, network.problem.likelihood))
        assert result.gain[i, j] == pytest.approx((before - after) / (0.5 * float(g @ exact)), rel=2e-3, abs=1e-6)


def test_where_lambda_is_all_the_loss_is_linear_and_falls_by_twice_what_is_promised():
    """The promise, ``gᵀv − ½ vᵀ(F + λI)v``, counts a penalty that the loss does not have."""
    result = one_step.run(**SMALL, damping=10.0)
    still = result.gain[np.abs(ASTRAY).argmin(), np.abs(ALONG).argmin()]
    assert abs(still) < 1e-6
    there = result.gain[np.abs(ASTRAY).argmin(), np.abs(ALONG - 1).argmin()]
    assert there == pytest.approx(2.0, abs=0.1)
    kfac = result.places["kfac"]
    torch.testing.assert_close(torch.tensor(kfac.along), torch.tensor(1.0), atol=0.05, rtol=0)


def test_a_step_beyond_the_picture_is_hollow_at_its_border():
    result = one_step.run(**SMALL)
    plot = one_step.Plot(result)
    for place, at, style in (
        ((1.5, 0.5), (1.5, 0.5), "full"), ((4.0, 1.0), (2.0, 0.5), "none"), ((1.0, 2.2), (0.5, 1.1), "none"),
        ((-0.4, 0.1), (-0.2, 0.05), "none"), ((0.0, 0.0), (0.0, 0.0), "full"), ((0.0, 2.2), (0.0, 1.1), "none"),
    ):  # fmt: skip
        plot.move(replace(result, places=result.places | {"kfac": Place(*place)}))
        dot, line = plot.dots["kfac"], plot.real["kfac"]
        assert np.ravel(dot.get_data()) == pytest.approx(at) and dot.get_fillstyle() == style
        assert not dot.get_clip_on() and line.get_clip_on()
