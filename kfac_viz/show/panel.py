"""Live panels: any run with its plot under sliders, in JupyterLab, Notebook 7 and Voila.

A panel calls the same two functions as a regenerated figure. Its picture is one image widget, encoded in the
kernel; comm callbacks may run in a thread beside a busy cell, so there is no pyplot here, and a lock.

A picture is drawn in two strokes, where a part of it takes long to compute: the rest is shown at once, and that part
when the event loop of the kernel has had the time to take a newer value, which then comes first. Finished pictures are
remembered.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import html
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
from IPython.display import HTML, display

from .. import parameters
from ..parameters import Parameter, Range, to_text
from .live import Live, View
from .plot import Plot
from .threads import one_thread

LARGE = ("damping", "damping_share", "per_layer")  # where a run has them
MANY = 200  # positions from which a slider of whole numbers is logarithmic
PACKAGE = Path(__file__).parents[1]
LATE = 0.25  # seconds after which a picture that has not come is dimmed
MOVING = 0.3  # seconds between two values, within which a control is being moved on and on
PAUSE = 0.04  # seconds in which the next value can then come before the second stroke
KEPT = 150  # pictures that a panel remembers, of 80 to 170 kB each
LABELS = {
    "damping": "damping λ", "per_layer": "columns per layer", "coarse": "kind of columns",
    "rule": "K-FAC's damping", "fisher": "Fisher", "data": "network and data", "widths": "hidden widths",
    "n": "examples", "steps": "training steps", "damping_share": "λ / λ_max", "samples": "labels drawn",
    "repeats": "seeds", "rtol": "tolerance", "at_step": "steps taken", "checkpoint": "step of training",
}  # fmt: skip
_CSS, _JS = (Path(__file__).with_name(f"panel.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
# Where JupyterLab does not find the model of the panel, its output, which follows that of the picture, has the class
# "jupyter-widgets" itself: then the picture stands in its place.
_LAB, _LOST = "[data-jp-theme-light]", "> .jupyter-widgets"
_MINE = f"{_LAB} :has(> * > .kfac-asleep)"
_ASLEEP = (
    f".kfac-asleep, {_LAB} .kfac-still, {_MINE}:not(:has(+ * {_LOST})), {_MINE} + :has({_LOST}) {{ display: none; }} "
    f"{_MINE}:has(+ * {_LOST}) .kfac-asleep {{ display: block; }}"
)
_PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def refused_outside(function: Callable) -> Callable:
    """What this package refuses inside of the call is raised where the caller called, without the way to it; other
    errors keep theirs."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            refused = Path(last.filename).is_relative_to(PACKAGE) and last.line.startswith("raise ")
            raise error.with_traceback(None if refused else error.__traceback__)  # noqa: B904

    return called


class _Moved(NamedTuple):
    """Values that were asked for: all of them, the command for them, and the control that was moved."""

    values: dict[str, Any]
    command: str
    control: widgets.Widget


class Panel(widgets.VBox):
    """A run under sliders: two large controls, the others folded away, a line that says what is being computed or went
    wrong, the picture, its words, and the command for the view. A picture that is late is dimmed until the newest
    values have theirs, and so is the part of it that takes long to compute.

    Args:
        run: keyword parameters with ranges and defaults (see :mod:`kfac_viz.parameters`) to a result, the same one
            whenever it is called with the same values. It is called on one thread of PyTorch and of NumPy.
        plot: how it is drawn.
        controls: names of the parameters to move, all by default; or by name the values that each can take, None for
            all of its range: ``{"damping": None, "per_layer": [0, 4, 16]}``.
        large: those of them that come first and are not folded away. Where there is none the first two come first.
        notebook: whose figure the command makes; by default the one that is called like the module of ``run``.
        reproduce: from all values to the line that makes this figure again, in place of that command.
        fixed: values of the others, and first values of these.

    Attributes:
        controls: the control of each parameter, by name; set their ``value`` to move the panel.
        result: what the picture shows; its objects are at hand, such as ``panel.result.T``. It is computed again
            where only its picture was remembered. Reading it, ``error`` or ``command`` finishes the picture first.
        error: the sentence in the error line, empty where all is well.
        command: the line that makes this figure again.

    Raises:
        ValueError, TypeError: an unknown name, or a value out of its range.
    """

    @refused_outside
    def __init__(
        self,
        run: Callable,
        plot: type[Plot],
        controls: Sequence[str] | Mapping[str, Sequence | None] | None = None,
        *,
        large: Sequence[str] = LARGE,
        notebook: str | None = None,
        reproduce: Callable[[dict[str, Any]], str] | None = None,
        **fixed: Any,
    ) -> None:
        self.run, self._plot_type, self._lock, self._busy = run, plot, threading.RLock(), True
        self._live: Live | None = None
        self._computed: tuple[dict | None, Any] = (None, None)  # the last result, after its values
        self._seen: OrderedDict[tuple, View] = OrderedDict()  # the one that was wanted longest ago first
        self._half: _Moved | None = None  # what the first stroke is shown of
        self._when = 0.0  # the last move came, in seconds
        self._telling, self._computing = threading.Lock(), False
        self._known = known = parameters.read(run)
        self._values = {name: p.default for name, p in known.items()} | parameters.check(run, fixed)
        names = list(known if controls is None else controls)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{run.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(known)}.")
        if large is not LARGE and (isinstance(large, str) or any(name not in names for name in large)):
            raise ValueError(f"large must list controls, which are {', '.join(names)}; got {large!r}.")
        names.sort(key=lambda name: large.index(name) if name in large else len(large))
        notebook = notebook or run.__module__.rpartition(".")[2]
        self._reproduce = reproduce or (lambda values: parameters.command(notebook, self._changed(values)))
        self._compute(self._values)
        self._command, self._error = self._reproduce(self._values), ""
        offered = controls if isinstance(controls, Mapping) else {}
        self.controls = {name: _control(known[name], self._values[name], offered.get(name)) for name in names}
        self._picture = widgets.Image(format="jpeg")
        self._below, self._alert = widgets.HTML(), widgets.HTML()
        for control in self.controls.values():
            control.observe(self._moved, "value")
        self._busy = False
        self._put(self._view(self._values))
        self._tell("")
        W, H = (str(round(inches * self._live.plot.figure.dpi)) for inches in plot.size)
        few = [name for name in names if name in large] or names[:2]
        style = widgets.HTML(f"<style>{_CSS.replace('WIDTH', W).replace('HEIGHT', H)}</style>")
        rows = [_row([self.controls[name] for name in few])]
        if others := [name for name in names if name not in few]:
            rows.append(widgets.Accordion([_row([self.controls[name] for name in others])], titles=("more controls",)))
        frame = widgets.Box([self._picture]).add_class("kfac-frame")
        super().__init__([style, *rows, self._alert, frame, self._below])
        self.add_class("kfac-panel")

    @property
    def result(self) -> Any:
        with self._lock:
            self._finish()
            return self._compute(self._values)

    @property
    def error(self) -> str:
        with self._lock:
            self._finish()
            return self._error

    @property
    def command(self) -> str:
        with self._lock:
            self._finish()
            return self._command

    def close(self) -> None:
        """Free all that the panel holds, widgets, figure and result, and what runs keep for speed."""
        if self.comm is None:  # closed before, or never opened
            return
        with self._lock:
            self._busy = True  # for a move that is on its way
            for widget in _parts(self):
                widget.unobserve_all()
                (super() if widget is self else widget).close()
            self.run, self._reproduce, self._live, self._half = None, None, None, None
            self._computed, self._seen = (self._values, None), OrderedDict()
        _forget()

    def _moved(self, change: dict[str, Any]) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                late = threading.Timer(LATE, self._dim, [change["owner"]])
                late.daemon = True
                late.start()
                try:
                    self._update(change["owner"])
                finally:
                    self._busy = False
                    late.cancel()

    def _dim(self, control: widgets.Widget) -> None:
        """Say what is being computed, from a thread of its own, unless it has come to its end."""
        with self._telling:
            if self._computing:
                now = html.escape(f"{control.description} = {_told(control.value)}: computing …")
                self._alert.value = f'<div class="kfac-alert" role="status">{now}</div>'
                self._picture.add_class("kfac-late")

    def _update(self, moved: widgets.Widget) -> None:
        """Read the controls and show the picture: one that is remembered, or a new one in one or two strokes."""
        self._computing, self._half = True, None
        before, self._when = self._when, time.monotonic()
        moving = self._when - before < MOVING

        def show() -> None:
            read = {name: self._known[name].check(control.value) for name, control in self.controls.items()}
            values = self._values | read
            asked = _Moved(values, self._reproduce(values), moved)
            loop = None if tuple(values.items()) in self._seen else _running_loop()
            if loop is not None:
                result = self._compute(values)
                if self._live.two_strokes:
                    self._picture.value, self._half = self._live.first_stroke(result), asked
                    loop.call_later(PAUSE if moving else 0.0, self._finish, asked)
                    return
            self._show(asked)

        self._attempt(show, moved)

    def _finish(self, asked: _Moved | None = None) -> None:
        """The second stroke, where one is due: of these values, as a newer one cancels it, or of any."""
        with self._lock:
            half = self._half
            if half is not None and (asked is None or asked is half):
                self._half = None
                self._attempt(lambda: self._show(half), half.control)

    def _show(self, asked: _Moved) -> None:
        """Show the whole picture, its words and the command."""
        view = self._view(asked.values)
        self._values, self._command = asked.values, asked.command
        self._put(view)

    def _attempt(self, step: Callable[[], None], moved: widgets.Widget) -> None:
        """Do this; what goes wrong is said in the panel, and the last good picture stays."""
        try:
            step()
            self._tell("")
        except (ValueError, TypeError) as error:
            self._tell(str(error), moved)
        except Exception as error:  # Jupyter would write it into a hidden log
            self._tell(f"{type(error).__name__}: {error}", moved)
        except BaseException:
            self._tell("Interrupted.", moved)
            raise

    def _compute(self, values: dict[str, Any]) -> Any:
        """The result for these values, and a figure that can show it."""
        if self._computed[0] != values:
            with one_thread():
                result = self.run(**values)
                self._live, self._computed = Live.of(self._plot_type, result, self._live), (values, result)
        return self._computed[1]

    def _view(self, values: dict[str, Any]) -> View:
        """The whole picture for these values, drawn or remembered."""
        key = tuple(values.items())
        if key not in self._seen:
            result = self._compute(values)
            with one_thread():
                self._seen[key] = self._live.show(result)
            if len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]

    def _put(self, view: View) -> None:
        alt = html.escape(view.words)
        spans = (
            f'<span style="left:{100 * x:.2f}%;top:{100 * y:.2f}%;width:{100 * w:.2f}%;height:{100 * h:.2f}%" '
            f'title="{html.escape(words)}"></span>'
            for x, y, w, h, words in view.regions
        )
        self._picture.value = self._whole = view.picture
        self._below.value = (
            f'<div class="kfac-regions"><div>{"".join(spans)}</div></div>'
            f'<div class="kfac-words" role="status">{alt}</div>'
            f"To make this figure again: <code>{html.escape(self.command)}</code>"
            f'<img src="{_PIXEL}" alt="" data-alt="{alt}" onload="{html.escape(_JS)}">'
        )

    def _changed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value != self._known[name].default}

    def _tell(self, words: str, wrong: widgets.Widget | None = None) -> None:
        """The sentence of an error, and the control that it came from outlined; or that all is well."""
        if words:
            self._picture.value = self._whole
        with self._telling:
            self._computing, self._error = False, words
            self._picture.remove_class("kfac-late")
            for control in self.controls.values():
                if control is wrong:
                    control.add_class("kfac-wrong")
                else:
                    control.remove_class("kfac-wrong")
            text = html.escape(words + " The picture shows the last values that worked.") if words else ""
            self._alert.value = f'<div class="kfac-alert kfac-error" role="alert">{text}</div>'

    def _ipython_display_(self) -> None:
        """The live view, after a picture that JupyterLab shows in its place where its kernel is gone."""
        data, metadata = self._repr_mimebundle_()
        alt = html.escape(data["text/plain"])
        picture = base64.b64encode(self._picture.value).decode()
        display(HTML(
            f"<style>{_ASLEEP}</style><p class='kfac-still'>In JupyterLab this picture has sliders.</p>"
            f"<div class='kfac-asleep'><p>Run this cell to move it: the kernel that drew this "
            f"picture has ended.</p><img src='data:image/jpeg;base64,{picture}' alt='{alt}'></div>"
        ))  # fmt: skip
        display(data, metadata=metadata, raw=True)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict, dict]:
        """The live view, and the picture for pages without a kernel."""
        data = super()._repr_mimebundle_(**options)
        with self._lock, one_thread():
            result = self.result
            picture, alt, _ = self._live.show(result, "PNG")
        return {**data, "image/png": base64.b64encode(picture).decode(), "text/plain": alt}, {"image/png": {"alt": alt}}


panel = Panel


def _control(parameter: Parameter, value: Any, offered: Sequence | None = None) -> widgets.Widget:
    """A slider or a list of what is offered, or else of all where it reaches no value that is not allowed; or a line
    of text."""
    name = LABELS.get(parameter.name, parameter.name.replace("_", " "))
    about = {"description": name, "tooltip": parameter.help or parameter.allowed,
             "style": {"description_width": "initial"}}  # fmt: skip
    span = parameter.range
    wide = {"width": "48%", "min_width": "20em"}
    plain = not (parameter.many or parameter.optional)
    if offered is not None:
        offered = list(dict.fromkeys([*map(parameter.check, offered), value]))
    elif parameter.choices and not parameter.many:
        offered = [*parameter.choices, *[None] * parameter.optional]
    if offered and plain and parameter.kind in (int, float):
        options = [(_told(x), x) for x in sorted(offered)]
        return widgets.SelectionSlider(options=options, value=value, **about, layout=wide)
    if offered:
        options = [(to_text(x), x) for x in offered]
        return widgets.Dropdown(options=options, value=value, **about, layout={"width": "auto"})
    if plain and parameter.kind is float and span:
        steps = span if span.steps else Range(span.low, span.high, span.log, steps=61)
        options = [(f"{x:.3g}", x) for x in sorted({*steps.positions, value})]
        return widgets.SelectionSlider(options=options, value=value, **about, layout=wide)
    if plain and parameter.kind is int and span and span.high - span.low <= MANY:
        return widgets.IntSlider(value, span.low, span.high, **about, layout=wide)
    if plain and parameter.kind is int and span and span.high - span.low <= 2000:  # logarithmic: 1, 2, 5, 10, 20, …
        marks = {digit * 10**k for digit in (1, 2, 5) for k in range(4)}
        options = sorted({span.low, *(x for x in marks if span.low < x < span.high), span.high, value})
        return widgets.SelectionSlider(options=options, value=value, **about, layout=wide)
    return widgets.Text(to_text(value), continuous_update=False, **about, layout={"width": "14em"})


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of this thread, as a kernel has one; None where none is running."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _row(controls: list[widgets.Widget]) -> widgets.Box:
    return widgets.Box(controls, layout=widgets.Layout(flex_flow="row wrap", width="100%"))


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _parts(widget: widgets.Widget) -> list[widgets.Widget]:
    """The widget and all that is made for it; closing a box leaves its children, layouts and styles open."""
    parts = [widget, widget.layout, *([widget.style] if hasattr(widget, "style") else [])]
    return parts + [part for child in getattr(widget, "children", ()) for part in _parts(child)]


def _forget() -> None:
    """Empty the caches of the package, which hold networks and their matrices; they fill again where needed."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kfac_viz."):
            for thing in list(vars(module).values()):
                getattr(thing, "cache_clear", lambda: None)()
