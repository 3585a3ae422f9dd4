"""The plots of a report, drawn with matplotlib's Agg and SVG backends (no display needed)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from commcomp.telemetry.runs import Run, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: told apart in every kind of colour vision; the blue is lighter, for dark grounds.
COLORS = ("#2585C7", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#7F7F7F")
_INK = {"light": "#1f2328", "dark": "#e6edf3"}
_PANEL_SIZE = (6.0, 3.8)  # inches

Draw = Callable[["Axes", Sequence[Run]], None]


def draw_loss_by_step(axes: Axes, runs: Sequence[Run]) -> None:
    """Training loss (thin, smoothed) and held-out loss (marked) against optimizer steps."""
    for run, color in zip(runs, _colors(runs)):
        axes.plot(range(1, run.steps + 1), smoothed(run.train_loss), color=color, linewidth=1, alpha=0.7)
        axes.plot(*_held_out(run, 0), color=color, marker="o", markersize=3.5, linewidth=1.8, label=run.name)
    axes.set_xlabel("step")
    _finish_loss(axes, "Loss against step")


def draw_loss_by_seconds(axes: Axes, runs: Sequence[Run]) -> None:
    """The same losses against seconds of training (evaluation and checkpoints excluded)."""
    for run, color in zip(runs, _colors(runs)):
        axes.plot(run.elapsed_seconds, smoothed(run.train_loss), color=color, linewidth=1, alpha=0.7)
        axes.plot(*_held_out(run, 1), color=color, marker="o", markersize=3.5, linewidth=1.8, label=run.name)
    axes.set_xlabel("seconds of training")
    _finish_loss(axes, "Loss against time")


def draw_step_time(axes: Axes, runs: Sequence[Run]) -> None:
    """Median seconds of a step, one bar a run."""
    _bars(axes, runs, [run.median_step_seconds for run in runs], lambda value: f"{value:.3g} s")
    axes.set_xlabel("seconds")
    axes.set_title("Median step time")


def draw_bytes(axes: Axes, runs: Sequence[Run]) -> None:
    """Bytes that a rank sends in a step, one bar a run, on a logarithmic axis."""
    _bars(axes, runs, [run.wire_bytes_per_step / 1e6 for run in runs], lambda value: format_bytes(value * 1e6))
    positive = [run.wire_bytes_per_step / 1e6 for run in runs if run.wire_bytes_per_step > 0]
    if positive:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 3, max(positive) * 6)  # room for the numbers behind the bars
    axes.set_xlabel("MB sent by a rank")
    axes.set_title("Bytes a step")


PANELS: dict[str, Draw] = {
    "Loss against step": draw_loss_by_step,
    "Loss against seconds of training": draw_loss_by_seconds,
    "Median step time": draw_step_time,
    "Bytes a step": draw_bytes,
}
"""Every panel of a report by its description."""


def png_of_all(runs: Sequence[Run]) -> bytes:
    """Return one PNG with all panels."""
    with _style("light"):
        figure = _new_figure((2 * _PANEL_SIZE[0], 2 * _PANEL_SIZE[1]))
        for axes, draw in zip(figure.subplots(2, 2).flat, PANELS.values()):
            draw(axes, runs)
        return _rendered(figure, "png", facecolor="white", dpi=110)


def svg_of(draw: Draw, runs: Sequence[Run], theme: str) -> bytes:
    """Return one panel as SVG with transparent ground, its ink fit for `theme` (light or dark)."""
    with _style(theme):
        figure = _new_figure(_PANEL_SIZE)
        draw(figure.subplots(), runs)
        return _rendered(figure, "svg", transparent=True, metadata={"Date": None})


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with the bias of its start removed."""
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def _held_out(run: Run, column: int) -> tuple[list[float], list[float]]:
    return [point[column] for point in run.held_out], [point[2] for point in run.held_out]


def _finish_loss(axes: Axes, title: str) -> None:
    axes.set_ylabel("loss (nats a byte)")
    axes.set_title(f"{title} (dots: held-out, thin: training)")
    axes.legend()


def _bars(axes: Axes, runs: Sequence[Run], values: Sequence[float], label: Callable[[float], str]) -> None:
    bars = axes.barh(range(len(runs)), values, color=_colors(runs), height=0.6)
    axes.set_yticks(range(len(runs)), [textwrap.fill(run.name, 18) for run in runs])
    axes.grid(False, axis="y")
    axes.bar_label(bars, [label(value) for value in values], padding=4)
    axes.invert_yaxis()  # first run on top, as in the table
    axes.margins(x=0.2)


def _colors(runs: Sequence[Run]) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(len(runs))]


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


@contextmanager
def _style(theme: str) -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need the package matplotlib; install it with: pip install matplotlib") from error
    ink = _INK[theme]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, ink),
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": ink, "grid.alpha": 0.15, "font.size": 10, "axes.titlesize": 10.5,
        "legend.frameon": False, "svg.hashsalt": "commcomp",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def _rendered(figure: Figure, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, **options)
    return buffer.getvalue()
