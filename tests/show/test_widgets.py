"""Panels without a browser: every control, in any order, gives a new picture or a sentence."""

import asyncio
import base64
import gc
import io
import os
import re
import shlex
import threading
import traceback
import weakref
from pathlib import Path
from typing import Annotated, Literal

import ipywidgets
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kfac_viz as kv
from kfac_viz.command.main import plan
from kfac_viz.parameters import Range, read
from kfac_viz.studies import coarse_space
from kfac_viz.studies.common.result import share

SMALL = dict(widths=(5,), n=40, per_layer=2)
CONTROLS = [name for name in read(coarse_space.run) if name not in ("seed", "device")]


@pytest.fixture(scope="module")
def panel():
    return kv.panel(coarse_space.run, coarse_space.Plot, CONTROLS, **SMALL)


def picture(panel) -> bytes:
    return panel._picture.value


def test_damping_comes_first_and_the_size_second():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["coarse", "per_layer", "damping"], **SMALL)
    assert list(panel.controls) == ["damping", "per_layer", "coarse"]
    assert len(panel.controls["damping"].options) >= 60
    assert (panel.controls["damping"].value, panel.controls["per_layer"].value) == (1e-2, 2)


def test_every_control_has_a_name_and_a_hint(panel):
    for control in panel.controls.values():
        assert control.description and control.tooltip


def test_each_control_changes_picture_words_and_command(panel):
    moves = dict(damping=1e-3, per_layer=3, coarse="nicolaides", correction="additive", rule="factored",
                 fisher="mc", data="planted", widths="[4,4]", n=20, steps=5)  # fmt: skip
    assert set(moves) == set(CONTROLS)
    for name, value in moves.items():
        before = picture(panel), panel._below.value
        panel.controls[name].value = value
        assert panel.error == ""
        assert picture(panel) != before[0] and picture(panel)[:3] == b"\xff\xd8\xff"
        assert panel._below.value != before[1]
        assert panel.result.parameters[name] == ((4, 4) if name == "widths" else value)
        assert f"{name}={str(value)}" in panel.command


def test_the_command_makes_this_very_result(panel):
    words = shlex.split(panel.command)
    assert words[:5] == ["python", "-m", "kfac_viz", "figures", "coarse_space"]
    (job,) = plan(["coarse_space"], [word for word in words[5:] if word != "-p"])
    again = coarse_space.run(**job.values)
    assert again.captured == panel.result.captured
    assert again.parameters == panel.result.parameters


MOVES = st.tuples(st.sampled_from([name for name in CONTROLS if name not in ("n", "steps")]), st.floats(0, 1))


@settings(max_examples=40)
@given(MOVES)
def test_no_sequence_of_moves_reaches_an_invalid_state(panel, move):
    """The panel is one for all examples: each goes on where the last one stopped."""
    name, share = move
    control = panel.controls[name]
    if name == "widths":
        values = ["[1]", "3", "[2,7]", "5,5,5", "[12,12]"]
    elif name == "per_layer":
        values = range(control.max + 1)
    else:
        values = [option[1] for option in control.options]
    control.value = value = values[round(share * (len(values) - 1))]
    assert panel.error == "", f"{name}={value}: {panel.error}"
    assert panel.result.parameters["per_layer"] == panel.controls["per_layer"].value
    assert f"coarse dimension {panel.result.size}" in panel._below.value


def test_what_cannot_be_read_is_said_and_the_picture_stays():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, **SMALL)
    before = picture(panel)
    for text, words in (("[12", "a list like [12,12,12]"), ("[0]", "from 1 to 64"), ("[64,64,64]", "narrower layers")):
        panel.controls["widths"].value = text
        assert words in panel.error and 'role="alert"' in panel._alert.value
        assert picture(panel) == before
        assert panel.result.parameters["widths"] == (5,)
    panel.controls["widths"].value = "[6]"
    assert panel.error == "" and picture(panel) != before


def test_an_error_of_any_kind_is_shown():
    def run_fragile(*, damping: Annotated[float, Range(1, 10, steps=10)] = 1.0, mood: Literal["a", "b"] = "a"):
        if mood == "b":
            raise RuntimeError("out of memory <script>")
        return coarse_space.run(**SMALL)

    panel = kv.panel(run_fragile, coarse_space.Plot)
    panel.controls["mood"].value = "b"
    assert panel.error == "RuntimeError: out of memory <script>"
    assert "<script>" not in panel._alert.value
    panel.controls["mood"].value = "a"
    assert panel.error == "" and "RuntimeError" not in panel._alert.value


def test_a_late_picture_is_dimmed_until_the_newest_values_have_theirs():
    seen, waited = [], threading.Event()

    def run_slow(*, damping: Annotated[float, Range(1, 10, steps=10)] = 1.0):
        if damping > 1:
            for _ in range(100):
                seen.append(("kfac-late" in panel._picture._dom_classes, panel._alert.value))
                if seen[-1][0] or waited.wait(0.05):
                    break
        return coarse_space.run(**SMALL)

    panel = kv.panel(run_slow, coarse_space.Plot)
    panel.controls["damping"].index = 3
    assert seen[0] == (False, panel._alert.value) and seen[-1][0]
    assert "damping λ = 4: computing" in seen[-1][1]
    assert "kfac-late" not in panel._picture._dom_classes and "computing" not in panel._alert.value


def test_the_control_of_an_error_is_outlined():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, **SMALL)
    panel.controls["widths"].value = "[0]"
    outlined = {name for name, control in panel.controls.items() if "kfac-wrong" in control._dom_classes}
    assert outlined == {"widths"} and panel.children[3] is panel._alert  # between controls and picture
    panel.controls["widths"].value = "[6]"
    assert not any("kfac-wrong" in control._dom_classes for control in panel.controls.values())


def test_two_large_controls_and_the_rest_folded_away(panel):
    _, first, more, *_ = panel.children
    assert [control.description for control in first.children] == ["damping λ", "columns per layer"]
    assert more.selected_index is None and len(more.children[0].children) == len(CONTROLS) - 2
    assert more.titles == ("more controls",)


def test_a_slider_of_many_whole_numbers_is_logarithmic():
    panel = kv.panel(kv.studies.kfac.run, kv.studies.kfac.Plot, ["damping", "steps"], widths=(5,), n=40, steps=7)
    values = [value for _, value in panel.controls["steps"]._options_full]
    assert values[0] == 0 and values[-1] == 2000 and 7 in values and len(values) < 20
    assert panel.controls["steps"].value == 7


def test_the_objects_of_the_picture_are_at_hand():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, CONTROLS, **SMALL)  # not where other tests have left theirs
    T, result = panel.result.T, panel.result
    g = panel.result.gradient
    assert kv.captured_decrease(T.A, g, T @ g) == pytest.approx(result.captured[T.correction], abs=1e-3)


def test_moments_of_training_are_a_slider(tmp_path):
    problem = kv.problems.digits((5,), 40, side=4)
    states = [problem.trained(steps).model.state_dict() for steps in (0, 5, 10)]
    before = {name: p.clone() for name, p in problem.model.state_dict().items()}
    panel = kv.explore(problem.model, problem.inputs, problem.targets, likelihood="categorical", checkpoints=states)
    assert panel.controls["checkpoint"].description == "step of training"
    heads = {panel.result.headline}
    for i in (1, 2):
        panel.controls["checkpoint"].value = i
        heads.add(panel.result.headline)
        single = kv.explore(problem.trained(5 * i).model, problem.inputs, problem.targets, likelihood="categorical")
        assert panel.error == "" and panel.result.captured == single.result.captured
        assert f"states[{i}]" in panel.command
    assert len(heads) == 3
    for name, p in problem.model.state_dict().items():
        torch.testing.assert_close(p, before[name])
    with pytest.raises(ValueError, match="checkpoints are state dictionaries"):
        kv.explore(problem.model, problem.inputs, problem.targets, likelihood="categorical", checkpoints=[])
    panel.controls["checkpoint"].value = 0
    path = panel.save_page(tmp_path / "mine.html")
    assert path.stat().st_size < 5e6 and "K-FAC" in path.read_text()


def test_where_kfac_is_exact_nothing_is_missing():
    panel = kv.explore(torch.nn.Linear(3, 1), torch.ones(9, 3), likelihood="gaussian", per_layer=1)
    assert panel.result.errors == {"blocks": 0.0, "kfac": 0.0, "balanced": 0.0}
    assert not panel.result.missed.any() and not panel.result.added.any()


def test_a_control_takes_the_values_that_are_offered():
    offered = dict(per_layer=[8, 0, 4], damping=None, correction=["balanced", "additive"], widths=[(4,), (3, 3)])
    panel = kv.panel(coarse_space.run, coarse_space.Plot, offered, **SMALL)
    assert [value for _, value in panel.controls["per_layer"].options] == [0, 2, 4, 8]  # 2 is where it begins
    assert [text for text, _ in panel.controls["correction"].options] == ["balanced", "additive"]
    assert len(panel.controls["damping"].options) > 60
    panel.controls["widths"].value = (3, 3)
    panel.controls["per_layer"].value = 8
    assert panel.error == "" and panel.result.parameters["widths"] == (3, 3) and "per_layer=8" in panel.command
    with pytest.raises(ValueError, match="per_layer must be a whole number from 0 to 16; got 99"):
        kv.panel(coarse_space.run, coarse_space.Plot, {"per_layer": [4, 99]}, **SMALL)


def test_what_is_not_among_the_controls_cannot_be_large():
    for large in (["moments"], "damping"):
        with pytest.raises(ValueError, match="large must list controls, which are damping, per_layer; "):
            kv.panel(coarse_space.run, coarse_space.Plot, ["damping", "per_layer"], large=large, **SMALL)


def test_a_drop_down_may_come_from_nowhere():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["correction"], large=["correction"], **SMALL)
    panel.controls["correction"].value = None
    assert panel.error
    panel.controls["correction"].value = "additive"
    assert panel.error == ""


def test_a_picture_that_was_seen_before_is_shown_from_memory():
    runs = []

    def run(*, damping: Annotated[float, Range(1, 9, steps=9)] = 1.0, per_layer: Annotated[int, Range(0, 9)] = 5):
        runs.append((damping, per_layer))
        return coarse_space.run(damping=damping, per_layer=per_layer, widths=(5,), n=40)

    panel = kv.panel(run, coarse_space.Plot)
    shown = {}
    for size in (5, 6, 7, 6, 5):
        panel.controls["per_layer"].value = size
        shown.setdefault(size, (picture(panel), panel._below.value))
        assert shown[size] == (picture(panel), panel._below.value)
    assert runs == [(1.0, 5), (1.0, 6), (1.0, 7)] and len(set(shown.values())) == 3
    assert panel.result.parameters["per_layer"] == 5 and len(runs) == 4  # computed again
    fresh = kv.panel(run, coarse_space.Plot, per_layer=5)
    assert (picture(panel), panel._below.value) == (picture(fresh), fresh._below.value.replace(" -p per_layer=5", ""))


def test_few_pictures_are_remembered(monkeypatch):
    monkeypatch.setattr("kfac_viz.show.panel.KEPT", 3)
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["per_layer"], **SMALL)
    for size, kept in ((5, [2, 5]), (6, [2, 5, 6]), (2, [5, 6, 2]), (9, [6, 2, 9]), (5, [2, 9, 5])):
        panel.controls["per_layer"].value = size
        assert [dict(key)["per_layer"] for key in panel._seen] == kept  # the one that was wanted longest ago goes
        assert panel.error == "" and (f"per_layer={size}" in panel.command)


def pixels(data: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_a_picture_comes_in_two_strokes():
    """Where an event loop runs, as in a kernel: matrices and bars first, and the spectrum dimmed until it is there."""
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["damping"], **SMALL)
    before, words = picture(panel), panel._below.value
    spectrum = panel._live._late[0]  # its place in the picture

    async def move():
        panel.controls["damping"].index += 12
        first, then = picture(panel), panel._below.value
        assert "spectra" not in vars(panel._computed[1]), "the eigenvalues are not computed yet"
        await asyncio.sleep(0.2)
        return first, then, picture(panel), panel._below.value

    first, then, last, told = asyncio.run(move())
    assert then == words and told != words, "the words come with the whole picture"
    old, half, whole = map(pixels, (before, first, last))
    left, top, right, bottom = spectrum
    inside = numpy.zeros(old.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert numpy.abs(half - whole)[~inside].max() < 30, "all but the spectrum is there at once"  # JPEG: blocks of 8
    assert numpy.abs(half - old)[~inside].max() > 200
    assert 255 - half[inside].min() > 60, "axes"
    curves = (old[inside].max(1) - old[inside].min(1)) > 100  # coloured
    faded = 255 - half[inside][curves].mean(), 255 - old[inside][curves].mean()
    assert 0.2 < faded[0] / faded[1] < 0.4, "the last spectrum, dimmed"
    fresh = kv.panel(coarse_space.run, coarse_space.Plot, ["damping"], **panel._values)
    assert (last, told) == (picture(fresh), fresh._below.value), "as if it had been drawn at once"


def test_a_newer_value_cancels_the_second_stroke():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["damping"], **SMALL)
    put, results, moved = [], [], panel.controls["damping"]
    panel._put, original = lambda view: (put.append(panel._values["damping"]), original(view)), panel._put

    async def move():
        for _ in range(4):
            moved.index += 1
            results.append(panel._computed[1])
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)

    asyncio.run(move())
    assert put == [moved.value] and f"damping={moved.value}" in panel.command
    assert ["spectra" in vars(result) for result in results] == [False, False, False, True]
    assert [dict(key)["damping"] for key in panel._seen][1:] == [moved.value], "half a picture is not remembered"


def test_who_reads_a_panel_gets_what_belongs_to_its_controls():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["damping"], **SMALL)

    async def move():
        for name in ("command", "result", "error"):
            panel.controls["damping"].index += 1
            found, value = getattr(panel, name), panel.controls["damping"].value
            assert panel._values["damping"] == value
            assert {"command": f"damping={value}" in str(found), "error": found == ""}.get(name, True)
            assert name != "result" or found.parameters["damping"] == value

    asyncio.run(move())


def test_what_fails_in_the_second_stroke_is_said_and_the_last_good_picture_comes_back(monkeypatch):
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["damping", "widths"], **SMALL)
    before = picture(panel), panel._below.value

    def fails(S):
        raise ValueError("No eigenvalues.")

    async def move():
        panel.controls["damping"].index += 3
        assert picture(panel) != before[0]
        await asyncio.sleep(0.2)
        assert panel._error == "No eigenvalues." and (picture(panel), panel._below.value) == before
        panel.controls["damping"].index += 1
        panel.controls["widths"].value = "[0]"  # refused, while a second stroke is due
        await asyncio.sleep(0.2)
        assert "from 1 to 64" in panel._error and (picture(panel), panel._below.value) == before

    monkeypatch.setattr("kfac_viz.studies.coarse_space._eigenvalues", fails)
    asyncio.run(move())


def test_a_panel_computes_on_one_thread_and_leaves_the_others_alone():
    before, seen = torch.get_num_threads(), []

    class Plot(coarse_space.Plot):
        def finish(self, result):
            seen.append(torch.get_num_threads())
            super().finish(result)

    def run(*, damping: Annotated[float, Range(1, 9, steps=9)] = 1.0):
        seen.append(torch.get_num_threads())
        return coarse_space.run(damping=damping, **SMALL)

    try:
        torch.set_num_threads(2)
        panel = kv.panel(run, Plot)
        panel.controls["damping"].index += 1
        assert torch.get_num_threads() == 2 and set(seen) == {1} and len(seen) >= 4
    finally:
        torch.set_num_threads(before)


def test_a_command_that_cannot_be_made_changes_nothing():
    def reproduce(values):
        if values["per_layer"] == 3:
            raise ValueError("No command for three.")
        return f"size {values['per_layer']}"

    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["per_layer"], reproduce=reproduce, **SMALL)
    before = picture(panel), panel._below.value, panel.result.size
    panel.controls["per_layer"].value = 3
    assert panel.error == "No command for three."
    assert (picture(panel), panel._below.value, panel.result.size) == before and panel.command == "size 2"


def test_an_interrupt_is_said():
    panel = kv.panel(coarse_space.run, coarse_space.Plot, ["per_layer"], **SMALL)
    panel.run = lambda **_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        panel.controls["per_layer"].value = 8
    assert panel.error == "Interrupted." and "kfac-late" not in panel._picture._dom_classes


def test_words_under_the_picture_are_its_alternative_text(panel):
    label = panel._repr_mimebundle_()[0]["text/plain"]
    for found in (panel.result.at_best_length, panel.result.captured):
        assert share(found["kfac"]) in label
    assert re.search(r'data-alt="([^"]+)"', panel._below.value)[1].startswith(label[:20])
    titles = re.findall(r'title="([^"]+)"', panel._below.value)
    assert len(titles) == 5 * len(panel.result.partition) ** 2
    assert all("Frobenius norm" in title for title in titles)


def test_a_page_without_a_kernel_shows_the_picture(panel):
    data, metadata = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert metadata["image/png"]["alt"] == data["text/plain"]


def test_unknown_controls_and_values_are_refused():
    with pytest.raises(ValueError, match="has no parameter dampng; it has damping"):
        kv.panel(coarse_space.run, coarse_space.Plot, ["dampng"])
    with pytest.raises(ValueError, match="damping must be a number from"):
        kv.panel(coarse_space.run, coarse_space.Plot, damping=1e9)


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
class TestExplore:
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        )

    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    def test_own_model_without_targets_is_left_as_it_is(self, likelihood):
        model, x = self.model().train(), torch.randn(20, 3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        panel = kv.explore(model, x, likelihood=likelihood)
        assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        old = picture(panel)
        panel.controls["damping"].value = next(x for _, x in panel.controls["damping"].options if x > 0.5)
        assert panel.error == "" and picture(panel) != old

    @pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    def test_the_lines_under_the_picture_make_its_preconditioner(self, fisher, likelihood):
        model, x = self.model().double(), torch.randn(20, 3).double()
        y = torch.arange(20) % 2 if likelihood == "categorical" else (torch.randn(20, 2) > 0).double()
        problem = kv.problems.Problem(model, x, y, likelihood)
        panel = kv.explore(model, x, y, likelihood=likelihood, fisher=fisher, damping=0.1, per_layer=2)
        for coarse in ("spectral", "krylov", "optimal"):
            panel.controls["coarse"].value = coarse
            assert panel.error == "" and panel.result.parameters["coarse"] == coarse
            names = dict(kv=kv, model=model, inputs=x, targets=y)
            exec(panel.command, names)
            assert "g" not in names or torch.allclose(names["g"], problem.gradient(), rtol=1e-10, atol=1e-14)
            found = kv.captured_decrease(names["A"], problem.gradient(), names["T"] @ problem.gradient())
            assert found == pytest.approx(panel.result.captured["balanced"], rel=1e-3)

    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    def test_the_lines_draw_the_labels_that_the_panel_drew(self, likelihood):
        model, x = self.model().double(), torch.randn(20, 3).double()
        panel = kv.explore(model, x, likelihood=likelihood, coarse="krylov", damping=0.1, per_layer=2)
        names = dict(kv=kv, model=model, inputs=x)
        exec(panel.command, names)
        found = kv.captured_decrease(names["A"], names["g"], names["T"] @ names["g"])
        assert found == pytest.approx(panel.result.captured["balanced"], rel=1e-3)

    def test_inputs_may_be_a_tuple(self):
        class Sum(torch.nn.Sequential):
            def forward(self, x, y):
                return super().forward(x + y)

        model, x, y = self.model(), torch.randn(20, 3), torch.randn(20, 3)
        for targets in (None, torch.arange(20) % 2):
            panel = kv.explore(Sum(*model), (x, y), targets, likelihood="categorical", per_layer=2)
            same = kv.explore(model, x.double() + y.double(), targets, likelihood="categorical", per_layer=2)
            assert panel.result.captured == same.result.captured

    @pytest.mark.parametrize(
        ("inputs", "targets", "options", "error", "words"),
        [
            (torch.randn(5, 3).numpy(), None, {}, TypeError, "inputs must be tensors; got ['ndarray']"),
            (torch.full((5, 3), torch.nan), None, {}, ValueError, "inputs of the model hold NaN"),
            (torch.randn(0, 3), None, {}, ValueError, "The batch is empty"),
            (torch.randn(5, 3), None, {"likelihood": "poisson"}, ValueError, "poisson"),
            (torch.randn(5, 3), None, {"fisher": "true"}, ValueError, "true"),
            (torch.randn(5, 3), None, {"fisher": "empirical"}, ValueError, "needs the true labels as targets"),
            (torch.randn(5, 3), torch.zeros(5, 2).numpy(), {}, TypeError, "targets must be a tensor; got ndarray"),
        ],
    )
    def test_what_capture_refuses_is_said_in_its_words(self, inputs, targets, options, error, words):
        with pytest.raises(error) as caught:
            kv.explore(self.model(), inputs, targets, **{"likelihood": "gaussian"} | options)
        assert words in str(caught.value)
        assert len(traceback.extract_tb(caught.tb)) == 2  # this line, and the door

    def test_what_the_model_itself_raises_keeps_its_way(self):
        class Broken(torch.nn.Linear):
            def forward(self, x):
                raise ValueError("of the model")

        with pytest.raises(ValueError, match="of the model") as caught:
            kv.explore(Broken(3, 2), torch.randn(5, 3), likelihood="gaussian")
        assert traceback.extract_tb(caught.tb)[-1].name == "forward"

    def test_small_layers_give_what_they_have(self):
        panel = kv.explore(torch.nn.Linear(1, 1), torch.randn(9, 1), likelihood="gaussian")
        for space in kv.coarse.SPACES:
            panel.controls["coarse"].value = space
            panel.controls["per_layer"].value = 16
            assert panel.error == "" and panel.result.size <= 2, space

    def test_layers_at_different_numbers_of_positions(self):
        nn = torch.nn
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 4)).double()
        x = torch.randn(30, 1, 8, 8).double()
        panel = kv.explore(model, x, likelihood="categorical")
        for _, space in panel.controls["coarse"].options:
            panel.controls["coarse"].value = space
            assert panel.error == ""
        F = kv.capture(model, x, likelihood="categorical")
        kept = torch.block_diag(*(torch.kron(G, A) for A, G in (F.factors(l, l) for l in range(2))))
        assert torch.allclose(panel.result.blocks, kept, rtol=1e-12, atol=0)

    def test_too_large_a_model_and_batch_are_refused(self, monkeypatch):
        monkeypatch.setattr("kfac_viz.pages.layer_map.MOST_SCORES", 400)
        with pytest.raises(ValueError, match="has 10100 parameters and the batch 5 examples with 100 vectors each"):
            kv.explore(torch.nn.Linear(100, 100), torch.randn(5, 100), likelihood="gaussian")


def test_the_page_is_whole_small_and_needs_nothing(tmp_path):
    choices = {name: parameter.default for name, parameter in read(coarse_space.run).items()} | SMALL
    first, again = (kv.pages.save_page(coarse_space.run, "page", tmp_path / name, **choices) for name in "ab")
    text = first.read_text(encoding="utf-8")
    assert text == again.read_text(encoding="utf-8")
    assert "{{" not in text and text.count("<script") == text.count("</script>") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import|https?://', text)
    assert text.count('type="range"') == 2 and 'lang="en"' in text
    published = Path(kv.__file__).parents[1] / "figures" / "00_playground.html"
    assert not published.exists() or published.stat().st_size < 3e6


def test_the_moving_picture_is_small_and_moves(tmp_path):
    path = kv.pages.save_moving(coarse_space.run, "moving", tmp_path, **SMALL)
    with Image.open(path) as moving:
        assert moving.n_frames == 6 and moving.size == (1000, 560)
        frames = []
        for i in (0, 5):
            moving.seek(i)
            frames.append(moving.convert("RGB").tobytes())
    assert frames[0] != frames[1] and path.stat().st_size < 1.5e6
    assert kv.pages.save_moving(coarse_space.run, "moving", "", **SMALL) is None


def test_closing_frees_figure_result_and_widgets():
    """Also of a reader's own network, whose matrices the caches of the experiment would keep."""
    panels, gone = [], []
    registry = ipywidgets.widgets.widget._instances
    before = len(registry)
    for _ in range(3):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        panel = kv.explore(model, torch.randn(20, 3), likelihood="categorical", per_layer=2)
        panel.controls["damping"].index += 1
        gone += map(weakref.ref, (panel.result, panel.result.missed, panel._live, panel._live.plot.figure))
        panels.append(panel)
    for panel in panels:
        panel.close()
        panel.close()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)  # although `panels` still holds the panels
    assert len(registry) == before
    panel.controls["damping"].index += 1  # a move on its way
    assert panel.error == ""


def test_a_panel_that_cannot_be_made_leaves_no_widgets():
    before = len(ipywidgets.widgets.widget._instances)
    with pytest.raises(ValueError, match="narrower layers"):
        kv.panel(coarse_space.run, coarse_space.Plot, widths=(64, 64, 64))
    assert len(ipywidgets.widgets.widget._instances) == before


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = coarse_space.run(**SMALL)
    saved = kv.save(coarse_space.Plot.draw(result), result, "shown", "")
    assert saved.paths == () and saved.png[:4] == b"\x89PNG" and saved.alt
    assert kv.pages.save_page(coarse_space.run, "page", "", **result.parameters) is None
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_a_figure_is_taken_away_first_and_comes_last(tmp_path, monkeypatch):
    result, replace = coarse_space.run(**SMALL), os.replace
    figure = coarse_space.Plot.draw(result)
    paths = kv.save(figure, result, "x", tmp_path).paths
    for kept in range(4):
        done = []

        def stop(source, target):
            if len(done) == kept:  # noqa: B023
                raise KeyboardInterrupt
            done.append(replace(source, target))  # noqa: B023

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stop)
            kv.save(figure, result, "x", tmp_path)
        assert not (tmp_path / "x.json").exists()
    assert kv.save(figure, result, "x", tmp_path).paths == paths
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # and nothing half made beside them
