"""The random tries find nothing, and find every fault that is planted."""

import contextlib
import functools
import re

import fuzz
import pytest
import torch

import kfac_viz as kv
from kfac_viz.method import checks, decompositions, fisher, kfac, krylov, operator, two_level
from kfac_viz.scores import capture as capturing
from kfac_viz.train import curvature, optimizer
from kfac_viz.train import update as updating

TRIES = {"training": 400, "states": 200}  # of each other kind 600


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_the_package_has_no_failure(kind):
    report = fuzz.Report()
    for outcome in fuzz.run(range(TRIES.get(kind, 600)), kind):
        report.add(outcome)
    count = report.counts[kind]
    assert count["accepted"] > (0.02 if kind == "arguments" else 0.2) * count["tries"] < 50 * count["refused"]
    assert not report.failures, f"{report}"


SEEDS = {"states": range(120), "training": range(500)}  # for planted faults; of each other kind 300


@functools.cache
def sound(kind, seed):
    return set(fuzz.attempt(kind, seed).failures)


def scaled(function, factor=1.05):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


def without_the_last_layer(M, v, original=kfac.KFAC._apply):
    out = original(M, v).clone()
    out[..., M.partition.slices[-1]] = 0
    return out


def breaks(*_, **__):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def borrowed(*_, **__):
    raise ValueError("a sentence, but of somebody else")


def refuses(*_, **__):
    checks.check_choice("this", "that", ())


def dirty_gradient(opt, original=optimizer.TwoLevelKFAC._gradient):
    for p in opt.model.parameters():
        p.data += 1.0
    g = original(opt)
    for p in opt.model.parameters():
        p.data -= 1.0
    return g


def half_converged(*args, original=kv.pcg, **kwargs):
    s = original(*args, **kwargs)
    return krylov.Solution(0.5 * s.solution, s.residuals, s.residual, s.converged)


def forgetful(opt, original=optimizer.TwoLevelKFAC.state_dict):
    saved = original(opt)
    return saved | {"state": {}}


def nan_inside(T, original=two_level.TwoLevel.dense):
    matrix = original(T)
    matrix[0, 0] = torch.nan
    return matrix


PLANTED = {
    # name: (kind, what is replaced, by what, the failure that has to be reported)
    "product": ("operators", (fisher.Fisher, "_apply"), scaled(fisher.Fisher._apply), "Fisher @ v is wrong"),
    "captured product": ("capture", (fisher.Fisher, "_apply"), scaled(fisher.Fisher._apply), "F @ v is wrong"),
    "matrix": ("capture", (fisher.Fisher, "dense"), scaled(fisher.Fisher.dense), r"\(bare\): F.dense\(\) is wrong"),
    "one block": ("operators", (fisher.Fisher, "block"), scaled(fisher.Fisher.block), "Fisher.block is wrong"),
    "sampled labels": (
        "capture", (capturing, "output_vectors"), scaled(capturing.output_vectors), "score belongs to no label",
    ),
    "a layer lost": ("operators", (kfac.KFAC, "_apply"), without_the_last_layer, "KFAC eigen @ v is wrong"),
    "a layer lost by two levels": (
        "twolevel", (kfac.KFAC, "_apply"), without_the_last_layer, "TwoLevel additive @ v is wrong",
    ),
    "raw error": ("operators", (kfac.KFAC, "_damp"), breaks, "raw RuntimeError in preconditioner.Preconditioner._init"),
    "somebody else's sentence": ("operators", (kfac.KFAC, "_damp"), borrowed, "raw ValueError"),
    "refusal": ("operators", (decompositions, "check_invertible"), refuses, "an ordinary case is refused"),
    "solve": ("operators", (operator.Damped, "solve"), scaled(operator.Damped.solve), "damped.solve is wrong"),
    "NaN": ("twolevel", (two_level.TwoLevel, "dense"), nan_inside, r"dense\(\) holds NaN or inf"),
    "correction": (
        "twolevel", (two_level.TwoLevel, "_apply"), scaled(two_level.TwoLevel._apply), "TwoLevel balanced @ v is wrong",
    ),
    "coarse damping": (
        "twolevel", (two_level.CoarseOperator, "_damp"),
        lambda E, λ, original=two_level.CoarseOperator._damp: original(E, 2 * checks.check_damping(λ)),
        "TwoLevel balanced.*is wrong",
    ),
    "convergence": ("worth", (kv, "pcg"), half_converged, "pcg converged, and the residual is large"),
    "share": ("worth", (kv, "captured_decrease"), scaled(kv.captured_decrease), "captured_decrease is wrong"),
    "spectrum": ("worth", (kv, "spectrum"), scaled(kv.spectrum), "spectrum is wrong"),
    "direction": ("worth", (kv, "exact_direction"), scaled(kv.exact_direction), "exact_direction is wrong"),
    "loss": ("losses", (kv, "nll"), scaled(kv.nll), "nll gaussian is wrong"),
    "packing": ("partitions", (kv.Partition, "pack"), scaled(kv.Partition.pack), "Partition.pack is wrong"),
    "training flags": (
        "capture", (capturing, "evaluation"), lambda model: contextlib.nullcontext(model.eval()), "training flags",
    ),
    "any damping": (
        "twolevel", (operator, "check_damping"), lambda *_: 1.0, "accepted the damping nan",
    ),
    "a longer step": (
        "training", (optimizer, "update"),
        lambda v, *rest, original=optimizer.update, **kw: original(1.05 * v, *rest, **kw),
        "a fixed step is wrong",
    ),
    "a layer that stands still": (
        "training", (optimizer, "update"),
        lambda v, last, model, *rest, original=optimizer.update, **kw: original(
            still_first(model.F, v), last, model, *rest, **kw
        ),
        r"a Linear with a gradient is not moved \(stack\)",
    ),
    "a quadratic step": (
        "training", (updating, "best_coefficients"), scaled(updating.best_coefficients), "a quadratic step is wrong",
    ),
    "half a step": (
        "training", (optimizer.TwoLevelKFAC, "_gradient"), dirty_gradient, "step raised and changed parameters",
    ),
    "curvature": (
        "training", (curvature, "capture_layers"),
        lambda *args, original=curvature.capture_layers, **kw: twice(*original(*args, **kw)),
        "A is not the mean Fisher",
    ),
    "a state without momentum": (
        "states", (optimizer.TwoLevelKFAC, "state_dict"), forgetful, "goes on differently",
    ),
}  # fmt: skip


def still_first(F, v):
    v = v.clone()
    v[F.partition.slices[0]] = 0
    return v


def twice(F, seen):
    return kv.Fisher(F.partition, list(F.a), [1.1 * g for g in F.g], likelihood=F.likelihood, flavour=F.flavour), seen


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(monkeypatch, name):
    kind, place, fault, expected = PLANTED[name]
    found = set()
    for seed in SEEDS.get(kind, range(300)):
        with monkeypatch.context() as patch:
            patch.setattr(*place, fault)
            planted = fuzz.attempt(kind, seed).failures
        new = {f"{sort} {what}" for sort, what in set(planted) - sound(kind, seed)} if planted else set()
        if any(re.search(expected, text) for text in new):
            return
        found |= new
    pytest.fail(f"no failure says {expected!r}: {sorted(found)}")


def test_a_try_that_hangs_is_a_failure(monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    monkeypatch.setitem(fuzz.KINDS, "losses", lambda t: t.call(lambda: [None for _ in iter(int, 1)]))
    (outcome,) = fuzz.run(range(1), "losses")
    assert outcome.failures == [("raw", "Hanging in no frame of the package")]


def test_one_seed_is_one_case():
    assert fuzz.attempt("twolevel", 7) == fuzz.attempt("twolevel", 7)
    assert {fuzz.drawn_kind(seed) for seed in range(200)} == set(fuzz.KINDS)


def test_the_command_reports_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(kv, "nll", scaled(kv.nll))
    assert fuzz.main(["--tries", "50", "--only", "losses", "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert "losses" in printed and re.search(r"--only losses --seed \d+ --tries 1", printed)
