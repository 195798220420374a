"""What may be passed to an experiment: read from the signature of its ``run_x`` and from nowhere else.

Widget bounds, the command line and papermill all use what stands there::

    def run_x(*, damping: Annotated[float, Range(1e-8, 1e2, log=True, steps=81)] = 1e-3,
              coarse: Literal["nicolaides", "spectral"] = "spectral",
              widths: Annotated[tuple[int, ...], Range(1, 64)] = (12, 12), seed: Seed = 0,
              device: Device = "cpu") -> XResult:

A parameter is a bool, int, float or str, one of a ``Literal``, a ``tuple[..., ...]`` of those (range and
choices then hold for each element), or any of these ``| None``. A text is read as the parameter's kind wherever it can
mean one thing only: papermill hands over ``"[12, 12]"``, and YAML reads ``1e-3`` as a text.
"""

import difflib
import inspect
import math
import re
import shlex
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, both included; ``steps`` is the number of slider positions, log-spaced or not."""

    low: float
    high: float
    log: bool = False
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"A range needs low < high, and low > 0 where it is logarithmic; got {self}.")

    @property
    def positions(self) -> list[float]:
        """The slider's positions, rounded to 6 digits so that they can be typed again.

        >>> Range(0.01, 10, log=True, steps=4).positions
        [0.01, 0.1, 1.0, 10.0]
        """
        if self.steps is None or self.steps < 2:
            raise ValueError(f"{self} has no positions: it needs steps=2 or more.")
        to, back = (math.log, math.exp) if self.log else (float, float)
        low, high, n = to(self.low), to(self.high), self.steps - 1
        return [float(f"{back(low + (high - low) * i / n):.6g}") for i in range(self.steps)]


# What most experiments have; a text is the help where the docstring's Args say nothing else.
Seed = Annotated[int, Range(0, 2**31 - 1), "of data and weights."]
Repeats = Annotated[int, Range(1, 20), "seeds, from ``seed`` upwards; a band shows the lowest and the highest."]
Widths = Annotated[tuple[int, ...], Range(1, 64), "of the hidden layers."]
Examples = Annotated[int, Range(10, 1797), "examples."]
Steps = Annotated[int, Range(0, 2000), "full-batch Adam steps before the picture is taken."]
Rtol = Annotated[float, Range(1e-12, 1e-1, log=True), "relative residual at which the iterations stop."]
Device = Annotated[Literal["cpu", "cuda", "mps"], "where to compute."]

DEEPEST = 20  # lists in lists, on a command line
_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# One element of a list that was typed: in quotes, or without commas and brackets; and the comma after it.
_ELEMENT = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,\[\]()"']*[^,\[\]()"'\s])\s*(?:,|$)""")
_ABSTRACT = {bool: bool, int: Integral, float: Real, str: str}  # numpy's scalars are welcome


@dataclass(frozen=True)
class Parameter:
    """One parameter: ``kind`` is the type of the value, or of each element where ``many``."""

    name: str
    kind: type
    default: Any
    many: bool = False
    optional: bool = False
    choices: tuple | None = None
    range: Range | None = None
    help: str = ""

    @property
    def allowed(self) -> str:
        """The allowed values, as an error message names them.

        >>> Parameter("widths", int, (4,), many=True, range=Range(1, 64)).allowed
        'a list like [4], each a whole number from 1 to 64'
        """
        text = "one of " + ", ".join(map(to_text, self.choices)) if self.choices else _NOUNS[self.kind]
        if self.range:
            text += f" from {to_text(self.range.low)} to {to_text(self.range.high)}"
        if self.many:
            text = f"a list like {to_text(self.default or ())}, each {text}"
        return text + " or none" * self.optional

    def check(self, value: Any) -> Any:
        """``value``, or what a text says, as the experiment expects it; TypeError or ValueError with what is possible.

        >>> widths = Parameter("widths", int, (4,), many=True)
        >>> widths.check("[12, 12]"), widths.check("12,12"), widths.check(12), Parameter("x", float, 1.0).check("1e-3")
        ((12, 12), (12, 12), (12,), 0.001)
        """
        if self.optional and (value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))):
            return None
        if not self.many:
            return self._element(value, value)
        elements = self._split(value) if isinstance(value, str) else value
        elements = elements if isinstance(elements, (list, tuple)) else [elements]
        return tuple(self._element(element, value) for element in elements)

    def _split(self, text: str) -> list[str]:
        """The elements of a list that was typed, with or without brackets or parentheses."""
        bare = text.strip()
        enclosed = bare[:1] + bare[-1:] in ("[]", "()")
        inner = bare[1:-1].strip() if enclosed else bare
        pieces, at = [], 0
        while at < len(inner) or not (inner or enclosed):
            found = _ELEMENT.match(inner, at)
            if found is None:
                raise self._wrong(TypeError, text)
            pieces.append(found[1])
            at = found.end()
        return pieces

    def _typed(self, text: str) -> Any:
        """What a text says as a value of this kind; the text itself where it says none."""
        bare = text.strip()
        quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
        bare = bare[1:-1] if quoted else bare
        if self.kind is str:
            return bare if quoted or self.choices or self.many else text
        if self.kind is bool:
            return _TRUTH.get(bare.lower(), text)
        for kind in (int, float):
            try:
                return kind(bare)
            except ValueError:
                pass
        return text

    def _element(self, element: Any, value: Any) -> Any:
        if self.kind is bool and type(element).__module__ == "numpy":
            element = element.item()
        if isinstance(element, str):
            element = self._typed(element)
        if self.kind is int and isinstance(element, Real) and not isinstance(element, Integral):
            element = int(element) if float(element).is_integer() else element
        if not isinstance(element, _ABSTRACT[self.kind]) or (isinstance(element, bool) and self.kind is not bool):
            raise self._wrong(TypeError, value)
        try:
            element = self.kind(element)
        except OverflowError:
            raise self._wrong(ValueError, value) from None
        outside = self.range and not self.range.low <= element <= self.range.high
        unknown = self.choices and element not in self.choices
        if outside or unknown or (self.kind is float and not math.isfinite(element)):
            raise self._wrong(ValueError, value)
        return element

    def _wrong(self, error: type[Exception], value: Any) -> Exception:
        return error(f"{self.name} must be {self.allowed}; got {_shown(value)}.")


def read(run: Callable) -> dict[str, Parameter]:
    """The parameters of an experiment, in the order of its signature; the docstring's Args help, or the annotation.

    Raises:
        TypeError: where an annotation is none of those that the module's docstring lists, or a default is missing.
    """
    hints = get_type_hints(run, include_extras=True)
    doc = inspect.getdoc(run) or ""
    parameters = {}
    for name, argument in inspect.signature(run).parameters.items():
        if name not in hints or argument.default is argument.empty:
            raise TypeError(f"Parameter {name} of {run.__name__} needs an annotation and a default.")
        found = re.search(rf"^\s+{name}: *(.+)", doc, re.MULTILINE)
        about = _understand(hints[name], f"{run.__name__}({name})") | ({"help": found[1]} if found else {})
        parameters[name] = Parameter(name, default=argument.default, **about)
    return parameters


def _understand(hint: Any, where: str) -> dict[str, Any]:
    about: dict[str, Any] = {}
    while hint not in _NOUNS:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            hint, *extras = arguments
            about |= {"help" if isinstance(extra, str) else "range": extra for extra in extras}
        elif origin is Literal:
            about["choices"], hint = arguments, type(arguments[0])
        elif origin is tuple and len(arguments) == 2 and arguments[1] is ...:
            about["many"], hint = True, arguments[0]
        elif origin in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is types.NoneType:
            about["optional"], hint = True, arguments[0]
        else:
            raise TypeError(f"{where} is annotated {hint}; see kfac_viz.parameters for what is possible.")
    return {"kind": hint, **about}


def check(run: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` for ``run(**values)``: ints become floats and lists tuples where those are expected.

    Raises:
        ValueError: for an unknown name, a value out of range, NaN, a choice that does not exist, or a device
            that this machine does not have.
        TypeError: for a value of another type. Every message lists what is possible.
    """
    parameters = read(run)
    for name in values:
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            raise ValueError(
                f"There is no parameter {name}{f' (did you mean {close[0]}?)' if close else ''}; "
                f"there are {', '.join(parameters)}."
            )
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = parameters[name].check(value)
        except TypeError as error:
            raise TypeError(f"{error} {_how_to_write(parameters[name], value)}") from None
    if (device := checked.get("device", "cpu")) in ("cuda", "mps"):
        import torch  # here, as the command line must not wait for it

        backend = {"cuda": torch.cuda, "mps": torch.backends.mps}[device]
        if not backend.is_available():
            raise ValueError(f"device must be one that exists; PyTorch finds no {device} here. Take device=cpu.")
    return checked


def take(run: Callable, names: dict[str, Any]) -> None:
    """Check what a notebook's parameters cell has assigned in its namespace ``names``, and put the values back there in
    the types of ``run``, since papermill hands over texts. Errors: those of :func:`check`."""
    names.update(check(run, {name: names[name] for name in read(run) if name in names}))


def _how_to_write(parameter: Parameter, value: Any) -> str:
    """How a value of this kind is typed for papermill, and for this package's command."""
    example = parameter.range.low if parameter.default is None and parameter.range else parameter.default
    if parameter.kind is str and not parameter.choices and not parameter.many:
        example = f'"{_shown(value)}"'
    text = to_text(example)
    given = shlex.quote(f"{parameter.name}={text}")
    for_papermill = f"-p {parameter.name} {shlex.quote(text)}"
    if parameter.many:
        for_papermill = f"-y {shlex.quote(f'{parameter.name}: {text}'.replace(',', ', '))}"
    return f"It is written {for_papermill} for papermill, and -p {given} for python -m kfac_viz figures."


def parse(text: str) -> list[Any]:
    """The alternatives in the text of a command line: a comma outside brackets separates them.

    >>> parse("0.01,1"), parse("[12,12]"), parse("spectral"), parse("[nicolaides,spectral],[]")
    ([0.01, 1], [[12, 12]], ['spectral'], [['nicolaides', 'spectral'], []])
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if not 0 <= depth <= DEEPEST:
            break
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth or not all(piece.strip() for piece in pieces):
        raise ValueError(f"{_shown(repr(text))} cannot be read: write 0.1, or 0.1,1 for a grid, or [12,12] for a list.")
    return [_value(piece.strip()) for piece in pieces]


def _shown(value: Any) -> str:
    """The value in an error message: not all of it where it is long."""
    try:
        text = to_text(value)
    except (ValueError, RecursionError):  # Python does not print whole numbers of more than 4,300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return parse(text[1:-1]) if text[1:-1].strip() else []
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def to_text(value: Any) -> str:
    """The inverse of :func:`parse`.

    >>> to_text((12, 12)), to_text(True), to_text(1e-3), to_text("spectral"), to_text(None)
    ('[12,12]', 'true', '0.001', 'spectral', 'none')
    """
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(to_text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def number(x: float, digits: int = 3) -> str:
    """A number for a reader: few digits, a proper minus sign, powers of ten as such.

    >>> number(-0.54321), number(1e-5), number(-53200), number(12)
    ('−0.543', '10⁻⁵', '−5.32·10⁴', '12')
    """
    x = float(x)
    if not math.isfinite(x) or x == 0 or 1e-3 <= abs(x) < 1e4:
        return f"{float(f'{x:.{digits}g}'):g}".replace("-", "−")
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = f"{float(mantissa):g}".replace("-", "−")
    return {"1": power, "−1": f"−{power}"}.get(mantissa, f"{mantissa}·{power}")


def command(notebook: str, values: Mapping[str, Any]) -> str:
    """The line for a terminal that makes the notebook's figure with these values.

    >>> command("07_coarse_space", {"damping": 0.01, "widths": (12, 12)})
    "python -m kfac_viz figures 07_coarse_space -p damping=0.01 -p 'widths=[12,12]'"
    """
    pairs = (shlex.quote(f"{name}={to_text(value)}") for name, value in values.items())
    return " -p ".join([f"python -m kfac_viz figures {notebook}", *pairs])
