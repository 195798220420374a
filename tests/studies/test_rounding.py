"""Studies give the same within their tolerances where sums round otherwise: inputs moved in a last bit, and a GPU."""

import pytest
import torch
from test_default_device import STUDIES

from kfac_viz.problems.rounding import VARIABLE
from kfac_viz.show import Tolerance
from kfac_viz.show.panel import _forget

ROUNDINGS = [
    "moved",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", STUDIES)
def test_other_rounding_gives_the_same_within_the_tolerances(name, rounding, monkeypatch):
    run, choices = STUDIES[name]
    _forget()  # caches know nothing of the environment
    published = run(**choices)
    if rounding == "moved":
        monkeypatch.setenv(VARIABLE, "1")
    _forget()
    made = run(**choices, device="cpu" if rounding == "moved" else rounding)
    monkeypatch.undo()
    _forget()
    old, new = published.table(), made.table()
    keys = [column for column in old if column not in made.values]
    assert old[keys].equals(new[keys]) and len(old)
    for (_, here), (_, there) in zip(new.iterrows(), old.iterrows(), strict=True):
        tolerance = made.tolerances.get(here.get("quantity", ""), Tolerance())
        for column in made.values:
            used = tolerance.used(float(here[column]), float(there[column]))
            assert used <= 1, (*here[keys], column, here[column], there[column])
