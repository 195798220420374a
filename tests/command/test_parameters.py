"""Parameters are read from signatures; what is accepted is exactly what they say."""

import math
import shlex
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kfac_viz.parameters import Device, Range, Repeats, Seed, Widths, check, command, parse, read, take, to_text


def run_example(
    *,
    damping: Annotated[float, Range(1e-8, 1e2, log=True, steps=81)] = 1e-3,
    widths: Annotated[tuple[int, ...], Range(1, 64)] = (12, 12),
    spaces: tuple[Literal["nicolaides", "spectral"], ...] = ("spectral",),
    correction: Literal["additive", "balanced"] = "balanced",
    bias: bool = True,
    clip: Annotated[float | None, Range(0, 1)] = None,
    scale: float = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    table: str = "",
) -> None:
    """An example.

    Args:
        damping: the λ of A = F + λI.
    """


def test_read_understands_every_kind_of_annotation():
    found = read(run_example)
    assert list(found) == ["damping", "widths", "spaces", "correction", "bias", "clip", "scale", "seed", "device",
                           "table"]  # fmt: skip
    assert found["damping"].range == Range(1e-8, 1e2, log=True, steps=81)
    assert found["damping"].help == "the λ of A = F + λI."
    assert (found["widths"].kind, found["widths"].many, found["widths"].range) == (int, True, Range(1, 64))
    assert (found["spaces"].choices, found["spaces"].many) == (("nicolaides", "spectral"), True)
    assert found["clip"].optional and found["clip"].kind is float
    assert {name: parameter.default for name, parameter in found.items()} == run_example.__kwdefaults__


def test_what_most_experiments_have_is_said_once():
    def run_common(*, widths: Widths = (12,), repeats: Repeats = 5, seed: Seed = 0, device: Device = "cpu"):
        """Common.

        Args:
            seed: of the first network.
        """

    found = read(run_common)
    assert found["widths"].help == "of the hidden layers." and found["widths"].many
    assert found["repeats"].range == Range(1, 20) and "seeds, from" in found["repeats"].help
    assert found["seed"].help == "of the first network." and found["seed"].range.low == 0
    assert found["device"].choices == ("cpu", "cuda", "mps") and found["device"].help == "where to compute."


def test_own_defaults_pass_their_own_check():
    assert check(run_example, run_example.__kwdefaults__) == run_example.__kwdefaults__


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("damping", 1, 1.0),
        ("damping", np.float32(0.5), 0.5),
        ("bias", np.bool_(False), False),
        ("widths", [3, 4], (3, 4)),
        ("widths", [np.int64(3)], (3,)),
        ("widths", [], ()),
        ("spaces", ["spectral", "nicolaides"], ("spectral", "nicolaides")),
        ("clip", "none", None),
        ("clip", 1, 1.0),
        ("damping", 1e-8, 1e-8),
        ("damping", 100, 100.0),
        # as papermill hands over what was typed after -p, -r or -y
        ("widths", 12, (12,)),
        ("widths", "12", (12,)),
        ("widths", "12,14", (12, 14)),
        ("widths", "[12, 14]", (12, 14)),
        ("widths", "(12, 14)", (12, 14)),
        ("widths", "(12,)", (12,)),
        ("widths", " [ ] ", ()),
        ("widths", ["12", 14.0], (12, 14)),
        ("spaces", "spectral", ("spectral",)),
        ("spaces", "['spectral', \"nicolaides\"]", ("spectral", "nicolaides")),
        ("damping", "1e-3", 1e-3),
        ("damping", " 1 ", 1.0),
        ("scale", "-2.5e0", -2.5),
        ("scale", -3, -3.0),
        ("seed", "1e3", 1000),
        ("seed", 1000.0, 1000),
        ("bias", "True", True),
        ("bias", "no", False),
        ("clip", "None", None),
        ("clip", "null", None),
        ("clip", "0.5", 0.5),
        ("correction", "'additive'", "additive"),
        ("correction", " additive ", "additive"),
        ("table", "a, b (1).csv", "a, b (1).csv"),
        ("table", " ", " "),
        ("table", '"2024"', "2024"),
    ],
)
def test_values_are_coerced(name, value, expected):
    (result,) = check(run_example, {name: value}).values()
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"dampng": 1.0}, ValueError, "no parameter dampng (did you mean damping?); there are damping, widths"),
        ({"damping": "high"}, TypeError, "damping must be a number from 1e-08 to 100.0; got high"),
        ({"damping": True}, TypeError, "got true"),
        ({"damping": [1.0]}, TypeError, "damping must be a number"),
        ({"damping": math.nan}, ValueError, "got nan"),
        ({"damping": 0}, ValueError, "from 1e-08 to 100.0; got 0"),
        ({"damping": 10**400}, ValueError, "damping must be"),
        ({"scale": 10**400}, ValueError, "scale must be a number"),
        ({"scale": math.inf}, ValueError, "got inf"),
        ({"seed": 10**5000}, ValueError, "seed must be a whole number from 0 to 2147483647; got a very long int"),
        ({"widths": 65}, ValueError, "a list like [12,12], each a whole number from 1 to 64; got 65"),
        ({"widths": None}, TypeError, "got none. It is written -y 'widths: [12, 12]' for papermill, and -p 'widths=["),
        ({"widths": ""}, TypeError, "; "),
        ({"widths": "[12,,12]"}, TypeError, "got [12,,12]"),
        ({"widths": "[[12]]"}, TypeError, "got [[12]]"),
        ({"widths": "[12"}, TypeError, "got [12"),
        ({"widths": "12 12"}, TypeError, "got 12 12"),
        ({"widths": [12, True]}, TypeError, "got [12,true]"),
        ({"widths": {"a": 1}}, TypeError, "widths must be a list"),
        ({"spaces": "spectral,smooth"}, ValueError, "one of nicolaides, spectral; got spectral,smooth"),
        ({"damping": "0.1,1"}, TypeError, "got 0.1,1. It is written -p damping 0.001 for papermill, and -p damping="),
        ({"damping": "[0.1]"}, TypeError, "got [0.1]"),
        ({"damping": "inf"}, ValueError, "got inf"),
        ({"seed": "9" * 5000}, TypeError, "seed must be a whole number"),
        ({"seed": "2.5"}, TypeError, "got 2.5. It is written -p seed 0 for papermill, and -p seed=0 for python -m"),
        ({"seed": "-1"}, ValueError, "got -1"),
        ({"seed": math.inf}, TypeError, "got inf"),
        ({"bias": "maybe"}, TypeError, "true or false; got maybe. It is written -p bias true for papermill"),
        ({"clip": "any"}, TypeError, "or none; got any. It is written -p clip 0 for papermill, and -p clip=0 for"),
        ({"table": 2024}, TypeError, """a text; got 2024. It is written -p table '"2024"' for papermill, and -p '"""),
        ({"widths": [12, 65]}, ValueError, "got [12,65]"),
        ({"widths": [12.5]}, TypeError, "got [12.5]"),
        ({"spaces": ["smooth"]}, ValueError, "one of nicolaides, spectral"),
        ({"correction": "adaptive"}, ValueError, "one of additive, balanced; got adaptive"),
        ({"bias": 1}, TypeError, "true or false"),
        ({"correction": None}, TypeError, "got none"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0"),
    ],
)
def test_what_is_refused_says_what_is_possible(values, error, words):
    with pytest.raises(error) as caught:
        check(run_example, values)
    assert words in str(caught.value)


def test_a_refused_text_is_written_as_the_refusal_says():
    """The line for papermill, read as papermill reads it, and the line for the command."""
    from papermill.cli import _resolve_type

    mistakes = {"widths": "x", "damping": "x", "seed": "x", "bias": "x", "clip": "x", "correction": 1, "table": 7}
    for name, value in mistakes.items():
        with pytest.raises(TypeError) as caught:
            check(run_example, {name: value})
        words = shlex.split(str(caught.value).partition("It is written ")[2])
        if words[0] == "-y":
            typed = yaml.safe_load(words[1])
        else:
            typed = {words[1]: _resolve_type(words[2])}
        ours, _, text = words[words.index("-p", 1) + 1].partition("=")
        assert check(run_example, typed) == check(run_example, {ours: parse(text)[0]})


def test_a_notebook_takes_what_papermill_assigned():
    names = {"damping": "1e-3", "widths": "[3, 4]", "seed": 2, "other": "1e-3"}
    take(run_example, names)
    assert names == {"damping": 1e-3, "widths": (3, 4), "seed": 2, "other": "1e-3"}
    with pytest.raises(ValueError, match="seed must be"):
        take(run_example, names | {"seed": -1})


@pytest.mark.parametrize(("device", "backend"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_that_is_not_there_is_refused(device, backend, monkeypatch):
    monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"PyTorch finds no {device} here. Take device=cpu"):
        check(run_example, {"device": device})
    monkeypatch.setattr(backend, "is_available", lambda: True)
    assert check(run_example, {"device": device}) == {"device": device}


@given(st.floats(allow_nan=True) | st.integers())
def test_range_is_what_the_signature_says(value):
    try:
        assert check(run_example, {"damping": value}) == {"damping": float(value)}
        assert 1e-8 <= value <= 1e2
    except ValueError:
        assert not 1e-8 <= value <= 1e2


scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["spectral", "a-def1", "x y"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


@given(st.lists(values, min_size=1, max_size=4))
def test_parse_is_the_inverse_of_to_text(alternatives):
    result = parse(",".join(map(to_text, alternatives)))
    assert result == alternatives
    assert list(map(type, result)) == list(map(type, alternatives))


@pytest.mark.parametrize("text", ["", "1,", ",1", "[1", "1]", "[1]]", "]1[", "1,,2", "[1,]"])
def test_text_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="cannot be read"):
        parse(text)


def test_positions_stay_in_range_and_survive_typing():
    for parameter in read(run_example).values():
        if parameter.range and parameter.range.steps:
            positions = parameter.range.positions
            assert len(positions) == parameter.range.steps == len(set(positions))
            assert (positions[0], positions[-1]) == (parameter.range.low, parameter.range.high)
            assert [parameter.check(parse(to_text(x))[0]) for x in positions] == positions


def test_ranges_and_annotations_that_make_no_sense():
    for wrong in [(1, 1), (2, 1), (0, 1, True), (math.nan, 1)]:
        with pytest.raises(ValueError, match="low < high"):
            Range(*wrong)

    def run_dict(*, x: dict = {}): ...  # noqa: B006

    def run_bare(*, x=1): ...

    for run in (run_dict, run_bare):
        with pytest.raises(TypeError, match="x"):
            read(run)


def test_command_can_be_pasted():
    assert command("10_depth", {}) == "python -m kfac_viz figures 10_depth"
    assert command("10_depth", {"widths": (1, 2)}).endswith("-p 'widths=[1,2]'")


@pytest.mark.parametrize(
    "text, expected",
    [
        ('["a, b", c]', ("a, b", "c")),
        ("['a]', \"(b\"]", ("a]", "(b")),
        ("a, b", ("a", "b")),
        ("(a,)", ("a",)),
        ("[]", ()),
    ],
)
def test_an_element_in_quotes_may_hold_commas_and_brackets(text, expected):
    def run(*, names: tuple[str, ...] = ()): ...

    assert check(run, {"names": text}) == {"names": expected}


@pytest.mark.parametrize("text", ['["a" b]', "[a,,b]", "[[a]]", '["a]', ""])
def test_a_list_that_cannot_be_read_is_refused(text):
    def run(*, names: tuple[str, ...] = ()): ...

    with pytest.raises(TypeError, match="names must be a list"):
        check(run, {"names": text})
