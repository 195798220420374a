"""The study of costs reads committed measurements, and the counted limit is a count."""

import pytest
from helpers import benchmark

import kfac_viz as kv


def test_the_committed_measurements_are_read_and_drawn():
    result = kv.studies.speed.run()
    for quantity in ("width", "depth", "batch", "per_layer", "autoencoder"):
        measured, counted = result.of(quantity), result.of(f"{quantity}, counted")
        assert measured and set(counted) <= set(measured)
        for name, limit in counted.items():
            assert (limit.y < measured[name].y).all(), "faster than the products that are needed"
    assert len(result.table()) == sum(len(c.x) for c in result.curves.values())
    label = kv.studies.speed.Plot.draw(result).get_label()
    assert result.machine in label and "one-level K-FAC" in label


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="make bench"):
        kv.studies.speed.run(device="mps")


def test_counted_products():
    speed = benchmark("speed")
    needed = speed.counted((3, 5, 2), batch=7)
    P, first = 4 * 5 + 6 * 2, 4 * 5
    assert needed["gradient"] == 2 * 7 * (3 * P - first)
    assert needed["apply"] == 2 * (5 * 5 * 4 + 5 * 4 * 4) + 2 * (2 * 2 * 6 + 2 * 6 * 6)
    assert needed["refresh"] * speed.REFRESH == pytest.approx(4**3 + 5**3 + 6**3 + 2**3)
