"""examples/char_lm.py: its baselines, its windows, its exit statuses."""

import importlib.util
import random
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

pytest.importorskip("rich")
SPEC = importlib.util.spec_from_file_location("char_lm", Path(__file__).parents[1] / "examples" / "char_lm.py")
char_lm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(char_lm)

PROMOTION = "standard"  # Optax divides floats by integers
FLAGS = "--hidden 8 --embed 4 --streams 2 --window 8 --sample 20 --dropout 0 --minutes 0.01"
SMALL = FLAGS.split()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where the pictures go."""
    monkeypatch.chdir(tmp_path)


def words(length, seed=0):
    choose = random.Random(seed).choice
    text = ""
    while len(text) < length:
        text += choose(["a tree", "the sea", "and", "is", "see", "\n", "Ω", "not"]) + " "
    return text[:length]


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def text():
    return char_lm.split_text(words(1500), "test", 2, 8)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(words(1500), encoding="utf-8")
    return path


def args(*flags):
    return char_lm.parse([*SMALL, *flags])


def slow_witten_bell(train, history, c, order, alphabet):
    """The equation, by dictionaries of tuples. None stands for what is before the text."""
    if order < 0:
        return 1 / len(alphabet)
    followers = defaultdict(Counter)
    padded = (None,) * order + tuple(train)
    for k in range(order, len(padded)):
        followers[padded[k - order : k]][padded[k]] += 1
    padded = (None,) * order + tuple(history)
    counts = followers.get(padded[len(padded) - order :], Counter())
    shorter = slow_witten_bell(train, history, c, order - 1, alphabet)
    if not counts:
        return shorter
    return (counts[c] + len(counts) * shorter) / (sum(counts.values()) + len(counts))


@pytest.mark.parametrize("characters", [words(120), "abracadabra" * 5 + "xyzab", "aaaaaaaaab", "abc"])
def test_witten_bell_equals_the_slow_one(characters):
    text = char_lm.split_text(characters, "test", 1, 1)
    codes, train = text.codes.tolist(), text.codes[: text.training].tolist()
    for order, p in enumerate(char_lm.witten_bell(text, 4)):
        expected = [
            slow_witten_bell(train, codes[:k], codes[k], order, text.alphabet) for k in range(len(train), len(codes))
        ]
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("history", ["", "tree", "Ωtr", "?"])
def test_witten_bell_sums_to_one(history):
    text = char_lm.split_text(words(200), "test", 1, 1)
    train = text.codes[: text.training]
    total = np.zeros(7)
    for code in range(len(text.alphabet)):
        codes = np.array([*train, *char_lm.encode(history, text.alphabet), code])
        total += [p[-1] for p in char_lm.witten_bell(text._replace(codes=codes), 6)]
    np.testing.assert_allclose(total, 1, atol=1e-12)


def test_baselines_are_of_the_validation_part(text):
    bits = [-np.log2(p).mean() for p in char_lm.witten_bell(text, 6)]
    zero, two, best = char_lm.baselines(text).items()
    assert zero == ("order 0", pytest.approx(bits[0]))
    assert two == ("order 2", pytest.approx(bits[2]))
    order = int(np.argmin(bits[1:])) + 1
    assert best == (f"order {order}, the best of 1 to 6", pytest.approx(min(bits[1:])))


def test_split_loses_no_character():
    characters = words(995) + "Änew"
    text = char_lm.split_text(characters, "test", 4, 8)
    decoded = "".join(text.alphabet[code] for code in text.codes)
    assert decoded == characters.replace("Ä", text.alphabet[0]).replace("w", text.alphabet[0])
    assert text.training == 899
    assert (text.codes[: text.training] > 0).all()


@pytest.mark.parametrize("streams", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("length", [36, 71, 72, 141])
def test_streams_lose_no_character(streams, window, length):
    codes = np.arange(length)
    windows = char_lm.cut(codes, streams, window)
    assert windows.inputs.shape[1:] == (window, streams)
    flat = [part.transpose(2, 0, 1).ravel() for part in windows]
    np.testing.assert_array_equal(flat[0][flat[2]], codes[:-1])
    np.testing.assert_array_equal(flat[1][flat[2]], codes[1:])
    assert windows.valid.any((1, 2)).all()


def test_the_built_in_text():
    text = char_lm.read_text(None)
    assert text == char_lm.read_text(None)
    assert len(text) > 100_000


def test_windows_carry_on(text):
    """Windows from carry to carry are one long scan; at progress 0 nothing else changes."""
    flags = args("--cell", "gru", "--layers", "2")
    model = char_lm.build(flags, len(text.alphabet))
    windows = char_lm.cut(text.codes, flags.streams, flags.window)
    state, step = char_lm.make_train_step(model, flags)
    params = jax.tree.map(jnp.copy, state.params)
    bits = []
    for window in zip(*windows, strict=True):
        state, value = step(state, char_lm.Windows(*window), 0.0)
        bits.append(float(value) * window[2].sum())
    jax.tree.map(np.testing.assert_array_equal, state.params, params)

    streams = [part.reshape(-1, flags.streams) for part in windows]
    carry, logits = jaxrnn.scan(model, params, None, streams[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.carry, carry)
    log_p = np.take_along_axis(np.array(jax.nn.log_softmax(logits)), streams[1][..., None], 2)[..., 0]
    expected = -log_p[streams[2]].mean() / np.log(2)
    assert sum(bits) / (len(text.codes) - 1) == pytest.approx(expected, rel=1e-5)
    assert char_lm.evaluate(model, params, windows) == pytest.approx(expected, rel=1e-5)


def test_evaluation_does_not_depend_on_the_window(text):
    model = char_lm.build(args(), len(text.alphabet))
    params = model.init(jax.random.key(1))
    one, other = (char_lm.evaluate(model, params, char_lm.cut(text.codes, 1, window)) for window in (10, 128))
    assert one == pytest.approx(float(other), rel=1e-5)


def test_training_learns(text):
    flags = args("--lr", "0.03", "--layers", "1")
    state, step = char_lm.make_train_step(char_lm.build(flags, len(text.alphabet)), flags)
    windows = list(map(char_lm.Windows._make, zip(*char_lm.cut(text.codes, 2, 8), strict=True)))
    bits = []
    for k, window in enumerate(windows):
        state, value = step(state, window, k / len(windows))
        bits.append(float(value))
    assert np.mean(bits[-10:]) < np.mean(bits[:10]) - 1


def test_sample_is_of_the_alphabet(text):
    model = char_lm.build(args(), len(text.alphabet))
    sampled = char_lm.sample(model, model.init(jax.random.key(0)), text.alphabet, args("--prompt", "a"))
    assert sampled[0] == "a"
    assert len(sampled) == 21
    assert set(sampled) <= set(text.alphabet[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty; 2 streams of windows of 8 need at least 19 characters"),
        (b"x" * 18, "too short, 18 characters; 2 streams of windows of 8 need at least 19 characters"),
        (b"a tree \xff", "not UTF-8"),
    ],
)
def test_unusable_texts(tmp_path, capsys, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert char_lm.main([*SMALL, "--text", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("char_lm.py: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_the_shortest_text_fits():
    text = char_lm.split_text("x" * 19, "test", 2, 8)
    assert char_lm.cut(text.codes[: text.training], 2, 8).valid.all()
    assert char_lm.cut(text.codes[text.training - 1 :], 1, 8).valid.sum() == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--cell rnn",
        "--hidden 0",
        "--streams -1",
        "--window 2.5",
        "--dropout 1",
        "--lr nan",
        "--clip 0",
        "--minutes inf",
        "--minutes soon",
        "--temperature 0",
        "--margin nan",
        "--seed -1",
        "--prompt=",
        "--out none/char_lm.png",
        "--unknown",
    ],
)
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        char_lm.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split("=")[0].split()[0] in capsys.readouterr().err


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        char_lm.main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.count("(default:") == len(vars(char_lm.parse([]))) - 1  # --quick


def test_quick_is_small_and_yields_to_flags():
    full, quick, larger = (char_lm.parse(flags.split()) for flags in ("", "--quick", "--hidden 96 --quick"))
    assert quick.hidden < larger.hidden == 96 < full.hidden
    assert quick.minutes < full.minutes


def test_a_missed_margin_is_exit_status_1(book, capsys):
    assert char_lm.main([*SMALL, "--text", str(book), "--margin", "20"]) == 1
    output = capsys.readouterr()
    for expected in ("1,500 characters, 1,350 of them", "chars/s  validation", "order 0", "order 2", "LSTM", "\nThe "):
        assert expected in output.out
    assert output.err.startswith("char_lm.py: ")
    assert "do not beat the strongest n-gram" in output.err


@pytest.mark.parametrize(("bits", "status"), [(0.4, 0), (0.6, 1), (float("nan"), 1)])
def test_the_margin_is_to_the_strongest_ngram(book, monkeypatch, bits, status):
    monkeypatch.setattr(char_lm, "baselines", lambda text: {"order 0": 2.0, "order 2": 1.0, "order 3": 1.5})
    monkeypatch.setattr(
        char_lm, "train", lambda *_: char_lm.Trained(None, bits, [char_lm.Point(1.0, 2.0, bits)] * 2, False)
    )
    monkeypatch.setattr(char_lm, "sample", lambda *_: "The sample")
    assert char_lm.main([*SMALL, "--text", str(book), "--margin", "0.5"]) == status
    assert char_lm.main([*SMALL, "--text", str(book), "--quick"]) == 0


def test_the_learning_curve(book, tmp_path, capsys, monkeypatch):
    """Drawn where matplotlib is; without it the run goes on and says so."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "curve.png"
    char_lm.main([*SMALL, "--text", str(book), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"the learning curve is in {out}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    char_lm.main([*SMALL, "--text", str(book), "--quick"])
    assert "no picture of the learning curve, for lack of matplotlib" in capsys.readouterr().out


def test_ctrl_c_ends_with_a_report(book, capsys, monkeypatch):
    evaluate, handler = char_lm.evaluate, signal.getsignal(signal.SIGINT)

    def press(*operands):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*operands)

    monkeypatch.setattr(char_lm, "evaluate", press)
    assert char_lm.main([*SMALL, "--text", str(book), "--minutes", "1", "--dropout", "0.1"]) == 130
    output = capsys.readouterr()
    assert output.out.count("  validation ") == 1
    assert "order 2" in output.out
    assert "\nThe " in output.out
    assert output.err == "char_lm.py: ended by Ctrl-C\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_before_training(book, capsys, monkeypatch):
    def press(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(char_lm, "baselines", press)
    assert char_lm.main([*SMALL, "--text", str(book)]) == 130
    assert capsys.readouterr().err == "char_lm.py: ended by Ctrl-C\n"
