"""A character-level language model against the best n-gram models, in three minutes on two cores.

    python examples/char_lm.py                                  # reads the topics of Python's own help()
    python examples/char_lm.py --text book.txt --cell gru --minutes 10
    python examples/char_lm.py --quick                          # a small network, half a minute

The first nine tenths of the text are for training, the last tenth is for validation. Training is truncated
backpropagation: the text is cut into parallel streams, and each window of a stream starts from the carry in which the
window before it ended. The network is compared with n-gram models of the same split, with Witten–Bell interpolation.
Both sides choose by the validation part: the network keeps the parameters of its best validation, and the n-grams keep
their best order. The learning curve is drawn if matplotlib is there.

Exit status: 0 if the network beats the strongest of them by --margin bits per character, 1 if not, 2 for a text or a
flag that cannot be used, 130 after Ctrl-C. With --quick never 1.
"""

import argparse
import contextlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

import jaxrnn

# The text.


class TextError(Exception):
    """A text that cannot be used; the message says why in one line."""


class Text(NamedTuple):
    """A text as positions in its alphabet: `training` of them to train on, the rest to validate on.

    Position 0 of the alphabet is the unknown character: any that the training part does not hold.
    """

    codes: np.ndarray
    training: int
    alphabet: str


def encode(characters: str, alphabet: str) -> np.ndarray:
    code = {character: k for k, character in enumerate(alphabet) if k}
    return np.array([code.get(character, 0) for character in characters], np.int32)


def read_text(path: Path | None) -> str:
    """The file, or the topics of help() in the order of their names."""
    if path is None:
        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,})") from None
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from None


def split_text(characters: str, name: object, streams: int, window: int) -> Text:
    """The first nine tenths for training, the last tenth for validation."""
    needed = -(-10 * (streams * window + 1) // 9)
    if len(characters) < needed:
        has = f"too short, {len(characters):,} characters" if characters else "empty"
        raise TextError(f"{name}: {has}; {streams} streams of windows of {window} need at least {needed:,} characters")
    training = len(characters) * 9 // 10
    alphabet = "\N{REPLACEMENT CHARACTER}" + "".join(sorted(set(characters[:training])))
    return Text(encode(characters, alphabet), training, alphabet)


class Windows(NamedTuple):
    """Arrays (windows, time, streams): what is read, what comes next, and which steps are text and not filling."""

    inputs: np.ndarray
    targets: np.ndarray
    valid: np.ndarray


def cut(codes: np.ndarray, streams: int, window: int) -> Windows:
    """Every character but the first is a target once; stream k + 1 goes on where k ends, the last one is filled up."""
    steps = len(codes) - 1
    filling = -steps % (streams * window)

    def arrange(row):
        return np.pad(row, (0, filling)).reshape(streams, -1, window).transpose(1, 2, 0)

    return Windows(arrange(codes[:-1]), arrange(codes[1:]), arrange(np.ones(steps, bool)))


# The baselines.


def witten_bell(text: Text, highest: int) -> Iterator[np.ndarray]:
    """For each order 0 to `highest`, the probability of every character of the validation part.

        p(c | ctx) = (count(ctx c) + types(ctx) p(c | ctx without its first)) / (count(ctx) + types(ctx))

    counted on the training part; types(ctx) is how many characters followed ctx. Order 0 backs off to 1 / symbols.
    """
    codes, training, symbols = text.codes, text.training, len(text.alphabet)
    context = np.zeros(len(codes), np.int64)  # a number for the characters before each position, `order` of them
    p = np.full(len(codes) - training, 1 / symbols)
    for _ in range(highest + 1):
        pairs, event = np.unique(context * symbols + codes, return_inverse=True)
        contexts = context.max() + 1
        count_event = np.bincount(event[:training], minlength=len(pairs))
        count = np.bincount(context[:training], minlength=contexts)
        types = np.bincount(pairs[count_event > 0] // symbols, minlength=contexts)
        ctx, ctx_c = context[training:], event[training:]
        p = np.where(count[ctx], (count_event[ctx_c] + types[ctx] * p) / np.maximum(count[ctx] + types[ctx], 1), p)
        yield p
        context = np.append(len(pairs), event[:-1])  # one character longer; the text's start is one of its own


def baselines(text: Text) -> dict[str, float]:
    """Bits per character of the validation part."""
    bits = [float(-np.log2(p).mean()) for p in witten_bell(text, 6)]
    best = min(range(1, 7), key=bits.__getitem__)
    return {"order 0": bits[0], "order 2": bits[2], f"order {best}, the best of 1 to 6": bits[best]}


# The network.


class State(NamedTuple):
    """All that a training step changes."""

    params: Any
    moments: optax.OptState
    carry: Any
    key: Array


def build(args: argparse.Namespace, symbols: int) -> jaxrnn.Stack:
    """Embedding, recurrent layers with dropout above each, logits."""
    cell = {"lstm": jaxrnn.LSTM, "gru": jaxrnn.GRU}[args.cell]
    sizes = [args.embed] + args.layers * [args.hidden]
    layers: list[jaxrnn.Cell] = [jaxrnn.Embed(symbols, args.embed)]
    for below, size in itertools.pairwise(sizes):
        layers += [cell(below, size), jaxrnn.Dropout(args.dropout)]
    return jaxrnn.Stack((*layers, jaxrnn.Linear(args.hidden, symbols)))


def bits_of(targets: Any, logits: Array) -> Array:
    """−log₂ p of each target."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) / math.log(2)


def make_train_step(model: jaxrnn.Cell, args: argparse.Namespace) -> tuple[State, jax.stages.Wrapped]:
    """The state before training, and the jitted `step(state, window, progress) -> (state, bits per character)`.

    The learning rate follows progress, the share of the training time that is over, and not a count of steps: it has
    come down when the time is up, on a machine of any speed.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(args.clip), optax.scale_by_adam())
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, 20, 1000, args.lr / 100)  # in thousandths of the time

    def loss(params, carry, window, key):
        carry, logits = jaxrnn.scan(model, params, carry, window.inputs, key=key)
        return bits_of(window.targets, logits).mean(where=window.valid), carry

    def step(state, window, progress):
        key, noise = jax.random.split(state.key)
        (bits, carry), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, state.carry, window, noise)
        updates, moments = optimizer.update(gradient, state.moments)
        params = optax.apply_updates(state.params, optax.tree.scale(-1.0 * schedule(1000 * progress), updates))
        return State(params, moments, carry, key), bits

    init, key = jax.random.split(jax.random.key(args.seed))
    params = model.init(init)
    state = State(params, optimizer.init(params), model.initial_carry(params, (args.streams,)), key)
    return state, jax.jit(step, donate_argnums=0)


@jax.jit
def evaluate(model: jaxrnn.Cell, params: Any, windows: Windows) -> Array:
    """Bits per character without dropout, every valid step counted once, the carry handed from window to window."""

    def one(carry, window):
        carry, logits = jaxrnn.scan(model, params, carry, window.inputs)
        return carry, bits_of(window.targets, logits)

    start = model.initial_carry(params, windows.inputs.shape[2:])
    return lax.scan(one, start, windows)[1].mean(where=windows.valid)


def sample(model: jaxrnn.Cell, params: Any, alphabet: str, args: argparse.Namespace) -> str:
    """The prompt, and what the model writes after it."""

    def draw(logits, key):
        code = jax.random.categorical(key, logits.at[0].set(-jnp.inf) / args.temperature).astype(jnp.int32)
        return code, code

    prompt, key = encode(args.prompt, alphabet), jax.random.fold_in(jax.random.key(args.seed), 1)
    carry, _ = jaxrnn.scan(model, params, None, prompt[:-1])
    _, codes = jaxrnn.rollout(model, params, carry, prompt[-1], args.sample, feedback=draw, key=key)
    return args.prompt + "".join(alphabet[code] for code in np.asarray(codes))


# The run.

QUICK = {"layers": 1, "hidden": 64, "minutes": 0.5}
SHORT = ", ".join(f"--{flag} {value}" for flag, value in QUICK.items())


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[bool]]:
    """A list that Ctrl-C makes true, to be read between steps, where the state is whole; a second one interrupts."""
    pressed = []

    def handler(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Clock(NamedTuple):
    """The seconds between which training runs, on `time.perf_counter`, and what `ctrl_c` gave."""

    start: float
    end: float
    pressed: list[bool]

    def progress(self) -> float:
        """The share of the time that is over, 1 or more when it is up."""
        return (time.perf_counter() - self.start) / max(self.end - self.start, 1e-3)

    def over(self) -> bool:
        return bool(self.pressed) or self.progress() >= 1


class Point(NamedTuple):
    """Of the learning curve: seconds of training, and bits per character of both parts."""

    seconds: float
    training: float
    validation: float


class Trained(NamedTuple):
    """The parameters of the best validation, its bits per character, the curve, and whether Ctrl-C ended it."""

    params: Any
    bits: float
    curve: list[Point]
    interrupted: bool


def train_epoch(
    step: Callable, state: State, windows: Windows, clock: Clock, bar: Progress
) -> tuple[State, float, str]:
    """One pass over the windows, or as far as the clock allows.

    Returns the state, bits per character, and a line on how it went.
    """
    begun, seen, total, line = time.perf_counter(), 0, 0.0, ""
    for window in map(Windows._make, zip(*windows, strict=True)):
        state, bits = step(state, window, clock.progress())
        characters = window.valid.sum()
        seen, total = seen + characters, total + characters * float(bits)
        line = f"training {total / seen:.3f} bits/char  {seen / (time.perf_counter() - begun):,.0f} chars/s"
        bar.update(bar.task_ids[0], completed=clock.progress(), description=line)
        if clock.over():
            break
    return state, total / seen, line


def train(model: jaxrnn.Cell, text: Text, args: argparse.Namespace, console: Console, deadline: float) -> Trained:
    """Trains until the deadline, validating after every epoch, where they are short every fiftieth of the time."""
    windows = cut(text.codes[: text.training], args.streams, args.window)
    held_out = cut(text.codes[text.training - 1 :], 1, 512)
    state, step = make_train_step(model, args)
    best, best_bits, validated, curve = jax.tree.map(jnp.copy, state.params), math.inf, 0.0, []
    columns = "{task.description}", BarColumn(20), TimeRemainingColumn()
    on_screen = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with ctrl_c() as pressed, on_screen as bar:
        bar.add_task("compiling", total=1.0)
        step = step.lower(state, Windows(*(part[0] for part in windows)), 0.0).compile()
        clock = Clock(time.perf_counter(), deadline, pressed)
        for epoch in itertools.count(1):
            state = state._replace(carry=model.initial_carry(state.params, (args.streams,)))
            state, training, line = train_epoch(step, state, windows, clock, bar)
            if clock.over() or clock.progress() > validated + 0.02:
                bits, validated = float(evaluate(model, state.params, held_out)), clock.progress()
                left = max(0, deadline - time.perf_counter())
                curve.append(Point(time.perf_counter() - clock.start, training, bits))
                console.print(f"epoch {epoch:3}  {line}  validation {bits:.3f}  {left:.0f} s left")
                if bits < best_bits:  # a copy, since the next step takes the state's memory
                    best, best_bits = jax.tree.map(jnp.copy, state.params), bits
                if clock.over():
                    break
    return Trained(best, best_bits, curve, bool(pressed))


def draw(curve: list[Point], ngrams: dict[str, float], path: Path) -> str:
    """Writes the picture of the learning curve, and returns a line on it."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the learning curve, for lack of matplotlib"
    with rc_context(jaxrnn.analysis.STYLE):
        axes = (figure := Figure(figsize=(3.5, 2.6))).subplots()
        seconds, training, validation = zip(*curve, strict=True)
        axes.plot(seconds, training, ".-", label="training")
        axes.plot(seconds, validation, ".-", label="validation")
        for (order, bits), line in zip(ngrams.items(), (":", "-.", "--"), strict=True):
            axes.axhline(bits, color="0.5", ls=line, lw=0.8, label=f"n-gram, {order}")
        axes.set(xlabel="seconds of training", ylabel="bits per character")
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.95))
        figure.savefig(path)
    return f"the learning curve is in {path}"


def run(args: argparse.Namespace) -> int:
    """The comparison; the exit status. Raises KeyboardInterrupt after the report if Ctrl-C ended the training."""
    deadline = time.perf_counter() + 60 * args.minutes
    console = Console(highlight=False, markup=False, soft_wrap=True)
    name = args.text or "pydoc_data.topics"
    text = split_text(read_text(args.text), name, args.streams, args.window)
    model = build(args, len(text.alphabet))
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    network = f"{args.cell.upper()}, {args.layers} x {args.hidden}, {size:,} parameters"
    console.print(f"{name}: {len(text.codes):,} characters, {text.training:,} of them to train on; {network}")
    ngrams = baselines(text)
    params, bits, curve, interrupted = train(model, text, args, console, deadline)

    table = Table("on the validation part", "bits/char")
    for order, value in ngrams.items():
        table.add_row(f"Witten–Bell n-gram, {order}", f"{value:.3f}")
    table.add_row(f"{network}, the best validation", f"{bits:.3f}")
    console.print(table)
    console.print(sample(model, params, text.alphabet, args))
    console.print(draw(curve, ngrams, args.out))
    if interrupted:
        raise KeyboardInterrupt
    if args.quick:
        console.print("too small to win, and not judged")
        return 0
    strongest = min(ngrams.values())
    if strongest - bits >= args.margin:
        return 0
    wanted = f"the strongest n-gram, {strongest:.3f}, by {args.margin}"
    print(f"char_lm.py: {bits:.3f} bits per character do not beat {wanted}", file=sys.stderr)
    return 1


def checked(kind: Callable[[str], Any], holds: Callable[[Any], Any], wanted: str) -> Callable[[str], Any]:
    """A type for argparse: `kind` of the word, if `holds` is true of it."""

    def parse(word):
        with contextlib.suppress(ValueError):
            if holds(kind(word)):
                return kind(word)
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {word!r}")

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    count = checked(int, lambda n: n >= 1, "a positive integer")
    positive = checked(float, lambda x: 0 < x < math.inf, "a positive number")
    seed = checked(int, lambda n: 0 <= n < 2**32, "an integer from 0 to 2**32 - 1")
    rate = checked(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
    finite = checked(float, math.isfinite, "a number")
    file = checked(Path, lambda path: path.parent.is_dir(), "a file in a folder that exists")
    letters = checked(str, len, "at least one character")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"where not given: {SHORT}")
    parser.add_argument("--text", type=Path, metavar="PATH", help="a UTF-8 text (default: the topics of help())")
    parser.add_argument("--cell", choices=("lstm", "gru"), default="lstm", help="the recurrent layer (default: lstm)")
    for flag, kind, default, meaning in (
        ("--layers", count, 2, "recurrent layers"),
        ("--hidden", count, 128, "units of a recurrent layer"),
        ("--embed", count, 32, "size of a character's embedding"),
        ("--dropout", rate, 0.1, "dropout above every recurrent layer"),
        ("--streams", count, 16, "parallel streams, the batch"),
        ("--window", count, 32, "characters through which gradients flow back"),
        ("--lr", positive, 0.01, "the highest learning rate of Adam"),
        ("--clip", positive, 1.0, "the greatest norm of the gradient"),
        ("--minutes", positive, 2.5, "time until training ends, compilation and validation included"),
        ("--seed", seed, 0, "seed of the weights, dropout and the sample; the schedule follows the clock"),
        ("--margin", finite, 0.05, "bits per character below the strongest baseline that give exit status 0"),
        ("--prompt", letters, "The ", "the text that the sample begins with"),
        ("--sample", count, 400, "characters to sample"),
        ("--temperature", positive, 0.7, "below 1 the sample takes fewer risks"),
        ("--out", file, Path("char_lm.png"), "the picture of the learning curve"),
    ):
        parser.add_argument(flag, type=kind, default=default, metavar="X", help=f"{meaning} (default: %(default)s)")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    try:
        return run(parse(argv))
    except TextError as error:
        print(f"char_lm.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("char_lm.py: ended by Ctrl-C", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
