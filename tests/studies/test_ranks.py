"""What many processes send: the table on paper is the formula, and the formula is what the optimizer counts."""

import pytest

import kfac_viz as kv
from kfac_viz.studies.common.measured import grouped, measured_rows
from kfac_viz.studies.speed import RANKS, SENT, WIDTHS, across_ranks, counted_across_ranks


def test_the_table_on_paper_is_the_formula():
    rows = grouped(measured_rows("ranks_counted.csv"), "width", "ranks")
    assert set(rows) == {(str(width), str(ranks)) for width in WIDTHS for ranks in RANKS}
    for (width, ranks), mine in rows.items():
        formula = counted_across_ranks(int(width), int(ranks))
        assert {row["quantity"]: row["value"] for row in mine} == {name: f"{x:.4g}" for name, x in formula.items()}


def test_what_ranks_have_counted_is_the_formula():
    """Summed and gathered by one rank a step, where the formula has what a ring makes it receive."""
    few = grouped(measured_rows("ranks_cpu.csv"), "ranks")
    for (ranks,), rows in few.items():
        found = {row["quantity"]: float(row["per_step"]) for row in rows}
        R, L, d, batch, observe, w = int(ranks), *(int(rows[0][name]) for name in ("depth", "width", "batch")), 5, 4
        if R == 1:
            assert "bytes summed" not in found
            continue
        factors = w * L * (d * (d + 1) + (d + 1) * (d + 2)) / 2
        assert found["bytes summed"] == pytest.approx(factors / observe, rel=1e-3)
        kept = -(-min(512 // 4, R * batch) // R)  # of the newest of four batches in the window
        vectors = w * kept * L * (2 * d + 1)
        assert found["bytes gathered"] == pytest.approx((vectors + 2 * 64 + 32 * L) / observe, rel=1e-3)


def test_a_coarse_level_adds_little_to_what_travels():
    """What the notebook says of the table."""
    for width in WIDTHS:
        for ranks in RANKS:
            found = counted_across_ranks(width, ranks)
            assert found["factors"] == pytest.approx(found["the gradient"] / 5, rel=3e-3)
            assert max(found[name] for name in SENT) == found["the gradient"]
            assert found["additive"] < found["a-def2"] < found["a-def1"] < found["balanced"]
            assert found["M v"] > found["inverting all factors"] > 0
    assert "COUNTED, not measured" in across_ranks() and "MEASURED" in across_ranks()
    assert kv.studies.speed.across_ranks is across_ranks
