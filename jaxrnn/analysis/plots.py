"""A figure for each analysis, of one result or of several side by side: `plot_...({"LSTM": a, "GRU": b})`.

The figures are `matplotlib.figure.Figure`s in `STYLE`, sized for a column of a paper: `figure.savefig("flow.pdf")`.
They leave matplotlib's settings as they were; it is imported only when a figure is drawn. With `axes` (one Axes, or one
for each panel) they draw there, and return the figure of these axes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import numpy as np

from jaxrnn.analysis.footprint import TrainingMemory
from jaxrnn.analysis.gates import Saturation
from jaxrnn.analysis.gradient import GradientFlow
from jaxrnn.analysis.jacobian import JacobianSpectrum, LyapunovSpectrum
from jaxrnn.analysis.memory import MemoryLength
from jaxrnn.typing import Named, PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

    from jaxrnn.training.history import History

# Okabe & Ito 2008: told apart by the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#808080"
COLUMN, PAGE = 3.5, 7.0  # inches
# Settings of matplotlib for figures of a paper, as `matplotlib.rc_context` and `matplotlib.style.use` take them.
STYLE: dict[Any, Any] = {
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.titlesize": 9,
    "font.size": 8,
    "image.cmap": "Blues",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "xtick.labelsize": 8,
    "xtick.major.width": 0.8,
    "ytick.labelsize": 8,
    "ytick.major.width": 0.8,
}
# Where to draw in place of a new figure: one of matplotlib's Axes, or one for each panel.
Panels = Any
P = ParamSpec("P")
R = TypeVar("R")


def _in_style(plot: Callable[P, R]) -> Callable[P, R]:
    """Draws with `STYLE`, and says what is missing where matplotlib is not installed."""

    @functools.wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError('plots need matplotlib: pip install "jaxrnn[plot]"') from error
        with rc_context(STYLE):
            return plot(*args, **kwargs)

    return drawn


@_in_style
def plot_gradient_flow(flows: GradientFlow | Mapping[PyTree, GradientFlow], *, axes: Panels = None) -> Figure:
    """Plots ‖∂L/∂c_t‖ over time, on a logarithmic axis: the median of the rows, and a band for their 10 to 90 %.

    For a dict, there is one line for the total of each result; for one result, one line for each leaf of the carry.
    Zeros are left out.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.analysis import gradient_flow, plot_gradient_flow
      >>> cell = jaxrnn.MGU(3, 4)
      >>> params = cell.init(jax.random.key(0))
      >>> flow = gradient_flow(cell, params, None, jnp.ones((20, 3)), lambda carry, ys: ys[-1].sum())
      >>> figure = plot_gradient_flow({"before training": flow})
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['before training']
    """
    if isinstance(flows, GradientFlow):
        norms = jax.tree_util.tree_leaves_with_path(flows.norms)
        series = {_path(path) or "carry": leaf for path, leaf in norms}
    else:
        series = {label: flow.total for label, flow in _several("flows", flows, GradientFlow).items()}
    figure, (ax,) = _figure(COLUMN, 2.5, given=axes)
    for k, (label, values) in enumerate(series.items()):
        _median_line(ax, k, np.asarray(values), label=str(label))
    _finish(ax, "time step $t$", r"gradient norm $\|\partial L/\partial c_t\|$", log=True, legend=len(series) > 1)
    return figure


@_in_style
def plot_singular_values(
    spectra: JacobianSpectrum | Mapping[PyTree, JacobianSpectrum], *, axes: Panels = None
) -> Figure:
    """Plots the greatest, median and least singular value of J_t over time, with a panel for each result.

    The lines show the median of the rows. The dark band holds the middle half of the singular values. Above the dashed
    line, at 1, a step stretches.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.analysis import JacobianSpectrum, plot_singular_values
      >>> spectrum = JacobianSpectrum(singular_values=np.ones((9, 4)), valid=np.ones(9, bool))
      >>> plot_singular_values({"GRU": spectrum}).axes[0].get_title()
      'GRU'
    """
    results = _several("spectra", spectra, JacobianSpectrum)
    figure, axes = _figure(COLUMN if len(results) == 1 else PAGE, 2.4, len(results), sharey=True, given=axes)
    for k, (ax, (label, spectrum)) in enumerate(zip(axes, results.items(), strict=True)):
        values, color = np.asarray(spectrum.singular_values), COLORS[k % len(COLORS)]
        values = values.reshape(len(values), -1, values.shape[-1])
        valid = np.asarray(spectrum.valid).reshape(values.shape[:2])
        rows = _over_rows(values, valid, np.median)
        rows = np.where(rows > 0, rows, np.nan)
        time, size = np.arange(len(rows)), rows.shape[1]
        ax.fill_between(time, rows[:, -1], rows[:, 0], color=color, alpha=0.15, linewidth=0)
        ax.fill_between(time, rows[:, -(-3 * size // 4) - 1], rows[:, size // 4], color=color, alpha=0.3, linewidth=0)
        columns = {"greatest": (0, "-"), "median": (size // 2, "--"), "least": (size - 1, ":")}
        for name, (column, line) in columns.items():
            ax.plot(time, rows[:, column], line, color=color, linewidth=1.2, label=name)
        _finish(ax, "time step $t$", r"singular values of $J_t$" if k == 0 else "", log=True)
        ax.axhline(1, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
        ax.set_title(str(label))
    for line in _legend_above(figure, *axes[0].get_legend_handles_labels()).get_lines():
        line.set_color("black")
    return figure


@_in_style
def plot_lyapunov_exponents(
    spectra: LyapunovSpectrum | Mapping[PyTree, LyapunovSpectrum], *, axes: Panels = None
) -> Figure:
    """Plots the Lyapunov exponents in their order: the mean of the rows, with their standard deviation as error bars.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.analysis import LyapunovSpectrum, plot_lyapunov_exponents
      >>> spectrum = LyapunovSpectrum(exponents=np.array([-0.1, -0.5]), steps=np.array(9))
      >>> plot_lyapunov_exponents(spectrum).axes[0].get_xlabel()
      'index $k$'
    """
    results = _several("spectra", spectra, LyapunovSpectrum)
    figure, (ax,) = _figure(COLUMN, 2.5, given=axes)
    for k, (label, spectrum) in enumerate(results.items()):
        rows = np.asarray(spectrum.exponents)
        rows = rows.reshape(-1, rows.shape[-1])[np.ravel(spectrum.steps) > 0]
        index, spread = np.arange(1, rows.shape[-1] + 1), rows.std(0) if len(rows) > 1 else None
        ax.errorbar(index, rows.mean(0), spread, label=str(label), elinewidth=0.8, **_look(k, marker=True))
    _finish(ax, "index $k$", r"exponent $\lambda_k$ (nats per step)", legend=len(results) > 1)
    ax.axhline(0, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    ax.locator_params(axis="x", integer=True)
    return figure


@_in_style
def plot_gate_saturation(saturations: Any, *, axes: Panels = None) -> Figure:
    """Plots how often each unit is low and how often it is high, with a panel for each gate and a point for each unit.

    A unit near the origin is in its linear range, one near the diagonal is a switch, and one at the ends of the
    diagonal is stuck.

    Args:
      saturations: The result of `gate_saturation`, also for a composition, or a dict from labels to such results.
      axes: The axes to draw in, one for each panel; None for a new figure.

    Examples:
      >>> import numpy as np, jaxrnn
      >>> from jaxrnn.analysis import Saturation, plot_gate_saturation
      >>> gates = jaxrnn.MGUGates(f=np.array([0.1, 0.3]), n=np.array([0.0, 0.5]))
      >>> figure = plot_gate_saturation(Saturation(low=gates, high=gates))
      >>> [ax.get_title() for ax in figure.axes]
      ['f', 'n']
    """
    series = {}
    for label, tree in (saturations if isinstance(saturations, Mapping) else {"": saturations}).items():
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Saturation)):
            series[f"{label} {_path(path)}".strip()] = node
    if not series or not all(isinstance(node, Saturation) for node in series.values()):
        raise TypeError(f"saturations: expected what gate_saturation returns, got {saturations!r}")
    gates = list(dict.fromkeys(name for node in series.values() for name in node.low._fields))
    columns = min(len(gates), 4)
    figure, axes = _figure(max(COLUMN, 1.75 * columns), 2.3, len(gates), columns, sharey=True, given=axes)
    handles = {}
    for gate, ax in zip(gates, axes, strict=True):
        ax.plot([0, 1], [1, 0], color=GREY, linestyle="--", linewidth=0.8, zorder=0)
        for k, (label, node) in enumerate(series.items()):
            if gate in node.low._fields:
                low, high = (np.ravel(getattr(side, gate)) for side in node)
                look = {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "linewidths": 0}
                handles[label] = ax.scatter(low, high, s=14, alpha=0.6, clip_on=False, **look)
        _finish(ax, "fraction low", "fraction high" if ax in axes[::columns] else "")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        ax.set_title(gate)
    if len(handles) > 1:
        _legend_above(figure, [handles[label] for label in series], list(series))
    return figure


@_in_style
def plot_memory_length(memories: MemoryLength | Mapping[PyTree, MemoryLength], *, axes: Panels = None) -> Figure:
    """Plots the influence of the input k steps back on a logarithmic axis, with the mean lag as a mark.

    The lines are drawn as in `plot_gradient_flow`.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.analysis import MemoryLength, plot_memory_length
      >>> figure = plot_memory_length({"GRU": MemoryLength(0.5 ** np.arange(20), np.array(1.0))})
      >>> figure.axes[0].get_yscale()
      'log'
    """
    results = _several("memories", memories, MemoryLength)
    figure, (ax,) = _figure(COLUMN, 2.5, given=axes)
    for k, (label, memory) in enumerate(results.items()):
        lag = float(np.mean(memory.mean_lag))
        middle = _median_line(ax, k, np.asarray(memory.influence), label=f"{label}, mean lag {lag:.3g}".strip(", "))
        height = np.interp(lag, np.arange(len(middle)), middle)
        ax.plot([lag], [height], "o", color=COLORS[k % len(COLORS)], markersize=4.5, markeredgecolor="white")
    _finish(ax, "lag $k$ (steps)", r"influence $\|\partial y_T/\partial x_{T-k}\|$", log=True, legend=True)
    return figure


@_in_style
def plot_training_memory(memories: TrainingMemory | Mapping[PyTree, TrainingMemory], *, axes: Panels = None) -> Figure:
    """Plots the memory of a training step as bars: estimated (residuals and recomputed) beside measured.

    For a dict, there is a group of bars for each result; keys that are integers or None are values of `remat_every`.

    Examples:
      >>> from jaxrnn.analysis import TrainingMemory, plot_training_memory
      >>> figure = plot_training_memory({None: TrainingMemory(64, 8192, 0, 8192, 9000)})
      >>> figure.axes[0].get_ylabel()
      'memory (KiB)'
    """
    results = _several("memories", memories, TrainingMemory)
    figure, (ax,) = _figure(COLUMN, 2.5, given=axes)
    residuals, recomputed, measured = (
        np.array([getattr(memory, name) or 0 for memory in results.values()], float)
        for name in ("residuals", "recomputed", "measured")
    )
    power = min(int(np.log2(max((residuals + recomputed).max(), measured.max(), 1)) // 10), 4)
    unit, scale, at, width = ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024.0**power, np.arange(len(results)), 0.36
    blue, light, orange = COLORS[0], COLORS[5], COLORS[1]
    left, right = at - width / 2 - 0.02, at + width / 2 + 0.02
    ax.bar(left, residuals / scale, width, color=blue, label="residuals (estimated)")
    if recomputed.any():
        ax.bar(left, recomputed / scale, width, residuals / scale, color=light, label="recomputed (estimated)")
    ax.bar(right, measured / scale, width, color=orange, label="measured")
    numbers = all(label is None or isinstance(label, int) for label in results)
    _finish(ax, "remat_every" if numbers else "", f"memory ({unit})", legend=True)
    ax.set_xticks(at, ["none" if label is None else str(label) for label in results])
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.25)
    return figure


@_in_style
def plot_history(history: History, *, axes: Panels = None) -> Figure:
    """A panel for each metric of training: every step, the mean over each epoch, and the validations.

    Of many members the median is drawn, and their 10 to 90 % as a band.

    Examples:
      >>> import numpy as np, jaxrnn
      >>> from jaxrnn.analysis import plot_history
      >>> from jaxrnn.training import squared_error, train
      >>> xs = np.ones((6, 3, 1), np.float32)
      >>> trained = train(jaxrnn.GRU(1, 1), (xs, xs), squared_error, epochs=2, progress=False)
      >>> plot_history(trained.history).axes[0].get_ylabel()
      'loss'
    """
    from jaxrnn.training.history import History, in_order  # which imports Optax

    if not isinstance(history, History):
        hint = "; pass its .history" if hasattr(history, "history") else ""
        raise TypeError(f"history: expected what fit returns, got {type(history).__name__}{hint}")

    names = [name for name in in_order(history.train) if name != "gradient_norm"]
    if not names:
        raise ValueError("history: expected at least one step of training, got none")
    figure, panels = _figure(COLUMN if len(names) == 1 else PAGE, 2.4, len(names), given=axes)
    for ax, name in zip(panels, names, strict=True):
        epochs, held_out = history.epoch.get(name, np.zeros(0)), history.validation.get(name, np.zeros(0))
        ax.plot(history.step, _middle(history.train[name]), color=COLORS[0], alpha=0.3, linewidth=0.8, label="step")
        for k, (label, at, rows) in enumerate(
            (("epoch", history.epoch_step, epochs), ("validation", history.validation_step, held_out))
        ):
            if len(rows):
                ax.plot(at, _middle(rows), label=label, **_look(k, marker=True))
            if np.ndim(rows) > 1:
                low, high = np.nanquantile(rows, (0.1, 0.9), axis=1)
                ax.fill_between(at, low, high, color=COLORS[k], alpha=0.2, linewidth=0)
        _finish(ax, "training step", name)
    _legend_above(figure, *panels[0].get_legend_handles_labels())
    return figure


def _middle(rows: np.ndarray) -> np.ndarray:
    """The median of the members, if there are such."""
    return np.nanmedian(rows, axis=1) if np.ndim(rows) > 1 else rows


def _several(name: str, results: PyTree, kind: type) -> dict:
    """Returns the results as a dict by label."""
    results = {"": results} if isinstance(results, kind) else results
    if not isinstance(results, Mapping) or not results or not all(isinstance(r, kind) for r in results.values()):
        raise TypeError(f"{name}: expected {kind.__name__} or a dict of label to {kind.__name__}, got {results!r}")
    return dict(results)


def _figure(
    width: float,
    height: float,
    panels: int = 1,
    columns: int | None = None,
    *,
    sharey: bool = False,
    given: Panels = None,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure and its panels, in rows of `columns` panels and the given height; or uses the panels given."""
    if given is not None:
        axes = list(np.ravel(np.asarray(given, object)))
        if len(axes) != panels:
            raise ValueError(f"axes: expected {panels}, one for each panel, got {len(axes)}")
        return axes[0].get_figure(), axes
    from matplotlib.figure import Figure

    columns = columns or panels
    rows = -(-panels // columns)
    figure = Figure(figsize=(width, height * rows))
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]  # what a notebook shows
    axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())
    for ax in axes[panels:]:
        ax.remove()
    return figure, axes[:panels]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _finish(ax: Axes, xlabel: str, ylabel: str, *, log: bool = False, legend: bool = False) -> None:
    if log:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if legend:
        ax.legend()


def _legend_above(figure: Figure, handles: list, labels: list[str]) -> Legend:
    place = "outside upper center" if figure.get_layout_engine() else "upper center"
    return figure.legend(handles, labels, loc=place, ncols=4)


def _look(k: int, marker: bool = False) -> Named:
    look: Named = {"color": COLORS[k % len(COLORS)], "linestyle": LINES[k % len(LINES)]}
    return look | ({"marker": MARKERS[k % len(MARKERS)]} if marker else {})


def _median_line(ax: Axes, k: int, values: np.ndarray, *, label: str) -> np.ndarray:
    """Draws the median of the rows of (T, *batch) that are not 0, and a band for 10 to 90 %; returns the median."""
    rows = values.reshape(len(values), -1)[..., None]
    time, seen = np.arange(len(rows)), rows[..., 0] > 0
    middle = _over_rows(rows, seen, np.median)[:, 0]
    if rows.shape[1] > 1:
        low, high = (
            _over_rows(rows, seen, lambda x, axis, q=q: np.quantile(x, q, axis=axis))[:, 0] for q in (0.1, 0.9)
        )
        ax.fill_between(time, low, high, color=COLORS[k % len(COLORS)], alpha=0.2, linewidth=0)
    alone = np.isfinite(middle).sum() == 1  # a line through one point is not seen
    ax.plot(time, middle, label=label, **_look(k, marker=bool(alone)), markersize=4)
    return middle


def _over_rows(values: np.ndarray, chosen: np.ndarray, summary: Any) -> np.ndarray:
    """Applies `summary` to the chosen rows of each step of (T, R, N); NaN where none is chosen."""
    nothing = np.full(values.shape[2:], np.nan)
    steps = zip(values, chosen, strict=True)
    return np.array([summary(step[flags], axis=0) if flags.any() else nothing for step, flags in steps])


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
