"""Sequence to sequence: dates as people write them into ISO form, against a parser written by hand.

    python examples/translate_dates.py                     # an encoder, and a decoder with attention
    python examples/translate_dates.py --no-attention      # the decoder sees the encoder's last state and no other

An encoder reads "tue 3rd of mrach, 1987" in both directions, and a decoder writes "1987-03-03". In training the decoder
reads the right characters before each one (teacher forcing); in the test it reads its own (free running). Its attention
is a cell of this file. The encoder's states, which are constant over the sequence that the decoder writes, are in the
params of this cell.

The script writes every day of a century twice, in one of eight styles, with a spelling mistake in one letter of six.
Separate days choose the epoch and make the test. A date is right if all ten characters are. The baseline knows the
formats of all styles: each word is replaced by the most similar known one (difflib), and `strptime` parses the text.

Exit status: 0 if the network beats it by --margin of the dates, 1 if not, 2 for an unusable flag. With `--quick`
never 1.

What it needs beside the package: pip install -e ".[plot]"
"""

import argparse
import difflib
import re
import sys
from calendar import day_abbr, day_name, month_abbr, month_name
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, accuracy, cross_entropy, fit, train_state

# As for strftime; {d} and {m} are numbers without zeros in front, {th} is the ordinal ending of the day.
STYLES = "{d}{th} of %B, %Y|%B {d}, %Y|%A {d} %B %Y|%a {d} %b %y|%b {d}{th} '%y|%d/%m/%Y|{d}.{m}.%y|%Y%m%d"
WIDTH, LETTERS, ISO = 34, " ',./0123456789abcdefghijklmnopqrstuvwxyz", "0123456789-"
START = len(ISO)  # what the decoder reads first
WORDS = "of", "st", "nd", "rd", "th", *map(str.lower, [*day_name, *day_abbr, *month_name[1:], *month_abbr[1:]])
Dates = list[tuple[str, str]]  # what was written, and what it means in ISO form


def write(days: np.ndarray, rng: np.random.Generator) -> Dates:
    """Each day once. A slip drops, doubles, swaps or mistakes a letter."""
    dates = []
    for day in days.tolist():
        th = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
        text = day.strftime(STYLES.split("|")[rng.integers(8)]).format(d=day.day, m=day.month, th=th).lower()
        for k in np.flatnonzero(rng.random(len(text)) < 1 / 6)[::-1]:
            a, b, wrong = text[k], text[k + 1 : k + 2], chr(ord("a") + rng.integers(26))
            if a.isalpha():
                slips = b, a + a + b, b + a if b.isalpha() else a + b, wrong + b
                text = text[:k] + slips[rng.integers(4)] + text[k + 2 :]
        dates.append((text[:WIDTH], day.isoformat()))
    return dates


def encode(dates: Dates) -> Batch:
    texts = np.array([[LETTERS.index(c) for c in text.ljust(WIDTH)] for text, _ in dates])
    meanings = np.array([[ISO.index(c) for c in meaning] for _, meaning in dates])
    return Batch(texts, meanings, np.array([len(text) for text, _ in dates]))


def mend_and_parse(text: str) -> str:
    """The baseline: known words, and what the first format that fits says."""
    text = re.sub("[a-z]+", lambda word: difflib.get_close_matches(word[0], WORDS, 1, 0)[0], text)
    text = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", text)
    for style in STYLES.split("|"):
        with suppress(ValueError):
            return datetime.strptime(text, style.format(d="%d", m="%m", th="")).date().isoformat()
    return ""


class AttendParams(NamedTuple):
    """The weights, and what was read: `states` (B, S, H), of which the decoder may look at `visible` (B, S)."""

    gru: jaxrnn.GRUParams
    w: jax.Array
    states: Any = None
    visible: Any = None


class AttendCarry(NamedTuple):
    """The carry of the GRU, and where the decoder looked, a (B, S)."""

    gru: jaxrnn.GRUCarry
    a: jax.Array


class Attend(jaxrnn.Cell):
    """A GRU that looks at what was read before each step.

    a = softmax_s(states_s · (h w) / √H),  c = Σ_s a_s states_s
    h' = GRU(h, [x, c]),  y = [h', c]
    """

    gru: jaxrnn.GRU

    def init(self, key, dtype=jnp.float32):
        return AttendParams(self.gru.init(key, dtype), jnp.eye(self.gru.hidden_size, dtype=dtype))

    def initial_carry(self, params, batch_shape=()):
        return AttendCarry(self.gru.initial_carry(params.gru, batch_shape), jnp.zeros(params.states.shape[:-1]))

    def step(self, params, carry, x, noise=None):
        scores = jnp.einsum("bsh,bh->bs", params.states, carry.gru.h @ params.w) / self.gru.hidden_size**0.5
        a = jax.nn.softmax(scores, where=params.visible)
        c = jnp.einsum("bs,bsh->bh", a, params.states)
        gru, h = self.gru.step(params.gru, carry.gru, jnp.concatenate([x, c], -1))
        return AttendCarry(gru, a), jnp.concatenate([h, c], -1)


class Translator(NamedTuple):
    """Encoder and decoder; their params are a pair."""

    encoder: jaxrnn.Stack
    decoder: jaxrnn.Stack
    attention: bool

    def read(self, params: Any, batch: Batch) -> Any:
        """The decoder's params, with what was read."""
        encoder, (embed, attend, out) = params
        _, states = jaxrnn.scan(self.encoder, encoder, None, batch.xs, lengths=batch.lengths, time_axis=1)
        place, length = jnp.arange(WIDTH), batch.lengths[:, None]
        visible = place < length if self.attention else place == length - 1
        return embed, attend._replace(states=states, visible=visible), out

    def loss(self, params: Any, batch: Batch, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Teacher forcing: each character after the right ones."""
        before = jnp.pad(batch.targets[:, :-1], ((0, 0), (1, 0)), constant_values=START)
        _, logits = jaxrnn.scan(self.decoder, self.read(params, batch), None, before, time_axis=1)
        loss = cross_entropy(logits, batch.targets)
        return loss.value, {"loss": loss, "accuracy": accuracy(logits, batch.targets)}

    def translate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Free running: each character after its own, (10, B), and where the decoder looked, (10, B, S)."""

        def feedback(out, key):
            return out.y.argmax(-1), (out.y.argmax(-1), out.carry[1].a)

        cell, start = jaxrnn.EmitCarry(self.decoder), jnp.full(len(batch.xs), START)
        return jaxrnn.rollout(cell, self.read(params, batch), None, start, 10, feedback=feedback)[1]


class Result(NamedTuple):
    """The test; shares of its dates that are right, and of the network's characters; where it looked (N, 10, S)."""

    test: Dates
    network: float
    baseline: float
    characters: float
    attention: np.ndarray


def run(args: argparse.Namespace) -> Result:
    first, end, held, size, rows, epochs, rate = "1969-01-01", "2069-01-01", 1024, 96, 128, 2, 4e-3
    if args.quick:
        first, end, held, size, rows, epochs, rate = "1992-01-01", "1997-01-01", 64, 24, 32, 1, 1e-2
    rng = np.random.default_rng(args.seed)
    days = rng.permutation(np.arange(first, end, dtype="datetime64[D]"))
    held_out, validation, days = np.split(days, [2 * held, 3 * held])
    steps = 2 * len(days) // rows  # whole batches, so that one program runs all of them
    test = write(held_out, rng)

    half, attend = jaxrnn.GRU(32, size // 2), Attend(jaxrnn.GRU(2 * size, size))
    encoder = jaxrnn.Stack((jaxrnn.Embed(len(LETTERS), 32), jaxrnn.Bidirectional(half, half)))
    decoder = jaxrnn.Stack((jaxrnn.Embed(START + 1, size), attend, jaxrnn.Linear(2 * size, len(ISO))))
    model = Translator(encoder, decoder, args.attention)
    keys = jax.random.split(jax.random.key(args.seed), 4)
    schedule = optax.cosine_decay_schedule(rate, epochs * steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    train = encode(write(np.tile(days, 2)[: steps * rows], rng))
    choose = encode(write(validation, rng))
    state = train_state((jax.jit(encoder.init)(keys[0]), jax.jit(decoder.init)(keys[1])), optimizer, keys[2])
    state, _ = fit(
        model.loss, state, train, optimizer=optimizer, epochs=epochs, batch_size=rows, key=keys[3], validation=choose
    )
    assert state.best is not None
    codes, looks = jax.jit(model.translate)(state.best.params, encode(test))
    correct = encode(test).targets == np.asarray(codes).T
    baseline = sum(mend_and_parse(text) == meaning for text, meaning in test) / len(test)
    return Result(test, float(correct.all(1).mean()), baseline, float(correct.mean()), np.asarray(looks).swapaxes(0, 1))


def picture(result: Result) -> Figure:
    """Where the decoder looks as it writes."""
    figure = Figure(figsize=(7, 4.2))
    for axes, (text, meaning), a in zip(figure.subplots(2, 3).flat, result.test, result.attention, strict=False):
        axes.imshow(a[:, : len(text)], vmin=0, vmax=1, aspect="auto")
        axes.set(xticks=range(len(text)), yticks=range(10), xticklabels=text, yticklabels=meaning)
        axes.tick_params(labelsize=6, length=0)
    figure.suptitle("across: what is read; down: what is written; dark: where the decoder looks as it writes that")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="attention in the decoder (default: with it)",
    )
    parser.add_argument("--quick", action="store_true", help="five years and a small network, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of dates, weights and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.02, help="wanted gain in right dates (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("dates.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    console, table = Console(highlight=False), Table(f"{len(result.test)} dates never seen", "right")
    table.add_row("the network", f"{result.network:.1%}")
    table.add_row("words mended, strptime", f"{result.baseline:.1%}")
    console.print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    gain = result.network - result.baseline
    if args.quick:
        console.print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    console.print(f"gain {gain:.3f}, wanted at least {args.margin}; picture in {args.out}")
    return 0 if gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
