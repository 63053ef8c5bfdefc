"""A real series with gaps, forecast a year ahead with an uncertainty band: carbon dioxide at Mauna Loa, week by week.

Data: statsmodels' `co2`, 2,284 weeks from 1958 to 2001, 59 of them without a value. The years before 1985 are for
training (scaling included), 1985 to 1989 for validation. Then every week of 1990 to 2000 is the start of a test
forecast.

Model: a GRU reads two years and gives the mean and the log variance of each of the next 52 weeks. A week without a
value is False in `Batch.mask`, so the network never sees it, and as a target it does not count. Several members are
trained at once, by one `fit`. The forecast is their mixture. The band is its mean ± as many standard deviations as held
90 % of the weeks of the validation part; the script says what it holds of the test part.

Comparison: the mean absolute error over all 52 weeks, for the network and for three baselines. These are persistence;
the weeks of last year plus the rise of last year (seasonal naive with drift); and trend and harmonics that are fitted
to the same training years and shifted to meet the last eight weeks. The validation part chooses the epoch of each
member.

Exit status: 0 if the error is below that of the best baseline by at least `--margin` ppm,
1 if not; with `--quick` always 0.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from statsmodels.datasets import co2

from jaxrnn import GRU, Dropout, Linear, Pool, Stack, scan
from jaxrnn.analysis import STYLE
from jaxrnn.training import Arrays, Batch, Mean, fit, make_loss, mean, train_state
from jaxrnn.training.series import Scaler, windows

PAST, AHEAD = 104, 52
BAND = 0.9  # the share of weeks that it is to hold


class Weeks(NamedTuple):
    """N stretches of the series, values in ppm, NaN where there is none; past (N, PAST) and future (N, AHEAD)."""

    past: np.ndarray
    future: np.ndarray
    past_time: np.ndarray
    future_time: np.ndarray


class Result(NamedTuple):
    """The test part, forecasts of its future by name, and half the width of the network's band, (N, AHEAD)."""

    test: Weeks
    forecasts: dict[str, np.ndarray]
    band: np.ndarray

    def errors(self) -> dict[str, np.ndarray]:
        """Mean absolute errors by weeks ahead, (AHEAD,)."""
        return {name: np.nanmean(abs(ys - self.test.future), axis=0) for name, ys in self.forecasts.items()}

    def coverage(self) -> np.ndarray:
        """The share of weeks within the band, by weeks ahead, (AHEAD,)."""
        error = abs(self.forecasts["network"] - self.test.future)
        return np.mean(error < self.band, axis=0, where=~np.isnan(error))

    def gain(self) -> float:
        """By how much the network's error is below that of the best baseline."""
        errors = {name: each.mean() for name, each in self.errors().items()}
        return float(min(errors[name] for name in errors if name != "network") - errors["network"])


def load() -> tuple[Weeks, Weeks, Weeks]:
    """The parts for training, validation and test; all weeks of a training or validation future lie in its years."""
    series = co2.load()["data"]["co2"]
    value, time = windows(series.to_numpy(), PAST, AHEAD), windows(years(series.index), PAST, AHEAD)
    weeks = Weeks(value[0], value[1], time[0], time[1])

    def part(start, end):
        rows = (weeks.future_time[:, 0] >= start) & (weeks.future_time[:, -1] < end)
        return Weeks(*(leaf[rows] for leaf in weeks))

    return part(1900, 1985), part(1985, 1990), part(1990, 2100)


def years(dates) -> np.ndarray:
    return np.asarray(dates.year + (dates.day_of_year - 1) / 365.25)


def average(values: np.ndarray) -> np.ndarray:
    """The mean of each row, (N, 1), NaN left out."""
    return np.nanmean(values, axis=1, keepdims=True)


def waves(time: np.ndarray, count: int) -> np.ndarray:
    """Sines and cosines of the year and its first fractions, (..., 2 count)."""
    return np.stack([wave(2 * np.pi * k * time) for k in range(1, count + 1) for wave in (np.sin, np.cos)], axis=-1)


def baselines(training: Weeks, test: Weeks) -> dict[str, np.ndarray]:
    """Forecasts of the test part, (N, AHEAD)."""

    def terms(time):
        powers = np.stack([((time - 1970) / 10) ** k for k in range(3)], axis=-1)
        return np.concatenate([powers, waves(time, 3)], axis=-1)

    seen = ~np.isnan(training.future)
    weights = np.linalg.lstsq(terms(training.future_time[seen]), training.future[seen])[0]
    shift = average((test.past - terms(test.past_time) @ weights)[:, -8:])
    rise = average(test.past[:, -AHEAD:]) - average(test.past[:, :AHEAD])
    return {
        "persistence": np.repeat(test.past[:, -1:], AHEAD, axis=1),
        "seasonal naive with drift": test.past[:, -AHEAD:] + rise,
        "trend and harmonics, shifted": terms(test.future_time) @ weights + shift,
    }


def gaussian_nll(ys: jax.Array, targets: jax.Array, mask: jax.Array | None = None) -> Mean:
    """−log N(target | μ, σ²) of ys = (μ, log σ²), averaged over the targets that are not NaN."""
    mu, log_variance = jnp.split(ys, 2, axis=-1)
    seen = ~jnp.isnan(targets)
    error = jnp.where(seen, targets - mu, 0)
    return mean((error**2 * jnp.exp(-log_variance) + log_variance + np.log(2 * np.pi)) / 2, seen)


def forecast(parts: tuple[Weeks, Weeks, Weeks], args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The forecast of the test part and half the width of its band, (N, AHEAD), in ppm."""
    levels = [average(part.past[:, -AHEAD:]) for part in parts]  # every stretch is told from its own last year
    scaler = Scaler.fit((parts[0].past - levels[0]).ravel())

    def batch(part, level):
        past, future = (scaler.transform(each - level).astype(np.float32) for each in (part.past, part.future))
        xs = np.concatenate([past[..., None], waves(part.past_time, 2).astype(np.float32)], axis=-1)
        return Batch(xs, future, mask=~np.isnan(past))

    training, validation, test = map(batch, parts, levels)
    size, count, epochs, rows = (16, 2, 5, 16) if args.quick else (32, 4, 20, 64)
    if args.quick:
        training = jax.tree.map(lambda leaf: leaf[::8], training)
    model = Stack((Pool(GRU(5, size)), Dropout(0.1), Linear(size, 2 * AHEAD)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2 if args.quick else 4e-3))

    def member(key):
        init, noise = jax.random.split(key)
        return train_state(model.init(init), optimizer, noise)

    init, order = jax.random.split(jax.random.key(args.seed))
    state, _ = fit(
        make_loss(model, gaussian_nll),
        jax.vmap(member)(jax.random.split(init, count)),
        Arrays(training, rows, key=order, drop_last=True),
        optimizer=optimizer,
        epochs=epochs,
        validation=[validation],
    )
    assert state.best is not None
    members = state.best.params

    def mixture(batch, level):
        """Mean and standard deviation."""
        ys = jax.vmap(lambda params: scan(model, params, None, batch.xs, mask=batch.mask, time_axis=1)[1])(members)
        means, variances = np.split(np.asarray(ys, np.float64), 2, axis=-1)
        variances = np.exp(variances).mean(0) + means.var(0)
        return scaler.inverse(means.mean(0)) + level, scaler.inverse_scale(np.sqrt(variances))

    ys, deviation = mixture(validation, levels[1])
    width = np.nanquantile(abs(ys - parts[1].future) / deviation, BAND)
    ys, deviation = mixture(test, levels[2])
    return ys, width * deviation


def run(args: argparse.Namespace) -> Result:
    parts = training, _, test = load()
    ys, band = forecast(parts, args)
    return Result(test, {"network": ys} | baselines(training, test), band)


def picture(result: Result) -> Figure:
    """Above, a forecast from each turn of the year; below, errors and coverage against weeks ahead."""
    figure = Figure(figsize=(7, 5))
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    axes, test, ys = figure.add_subplot(grid[0, :]), result.test, result.forecasts["network"]
    measured = (np.append(leaf[:-1, 0], leaf[-1]) for leaf in (test.future_time, test.future))
    axes.plot(*measured, ".", color="0.4", markersize=3, label="measured, held out")
    shown = f"its band, which holds {result.coverage().mean():.0%} of all weeks"
    for k, row in enumerate(range(0, len(ys), AHEAD)):
        time, low, high = test.future_time[row], *(ys[row] + sign * result.band[row] for sign in (-1, 1))
        axes.fill_between(time, low, high, color="C0", alpha=0.25, lw=0, label=None if k else shown)
        axes.plot(time, ys[row], color="C0", label=None if k else "forecast, a year at a time")
    axes.set(ylabel="CO$_2$ at Mauna Loa, ppm")
    axes.legend(loc="upper left")

    below, right, ahead = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1]), np.arange(1, AHEAD + 1)
    for name, error in result.errors().items():
        below.plot(ahead, error, lw=2 if name == "network" else 1, label=name)
    below.set(xlabel="weeks ahead", ylabel="mean absolute error, ppm", ylim=(0, 1.6))
    below.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=2, fontsize=7)
    right.plot(ahead, 100 * result.coverage(), label="on the test part")
    right.axhline(90, color="0.5", ls="--", lw=0.8, label="90 %, as on the validation part")
    right.set(xlabel="weeks ahead", ylabel="% of weeks within the band", ylim=(50, 100))
    right.legend()
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, dropout and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.03, help="wanted gain in ppm (default: %(default)s)")
    parser.add_argument("--out", default="forecast.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("mean absolute error, ppm", *(f"{k} weeks" for k in (1, 13, 26, 52)), "all weeks")
    for name, error in result.errors().items():
        table.add_row(name, *(f"{value:.3f}" for value in (*error[[0, 12, 25, 51]], error.mean())))
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    gain = result.gain()
    held = result.coverage().mean()
    print(f"the band, which held {BAND:.0%} of the validation part, holds {held:.0%} of the test part")
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain {gain:.3f} ppm, wanted at least {args.margin}; picture in {args.out}")
    return 0 if gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
