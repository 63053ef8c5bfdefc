"""The short programs of the tutorials run, and learn something in a few epochs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from test_package import python
from tiers import in_full

PROMOTION = "standard"  # Adam of Optax mixes dtypes
FOLDER = Path(__file__).parent.parent / "examples" / "tutorials"
# (epochs, the least result that shows learning) or, of errors, the greatest as a negative number
EXPECTED = {
    "simple_rnn": (5, 0.85),
    "sine_forecast": (6, -0.2),
    "sentiment": (4, 0.9),
    "next_word": (6, -1.9),
    "multivariate_forecast": (5, -1.0),
    "sensors": (3, 0.75),
    "sequence_to_sequence": (5, 0.05),
}


def test_every_tutorial_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", [*list(EXPECTED)[:5], *in_full(list(EXPECTED)[5:])])
def test_a_tutorial_learns(name, capsys):
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    epochs, least = EXPECTED[name]
    result = module.main(epochs=epochs)
    assert (result if least > 0 else -result) >= least, capsys.readouterr().out
    assert "In Keras:\n\n    model = Sequential(" in module.__doc__


# What the Keras form of each names, made of its data.
NAMES = {
    "simple_rnn": "xs, kinds = data(64, 0)",
    "sine_forecast": "waves, targets = ragged(data(64, 0))",
    "sentiment": "reviews, labels = ragged(data(64, 0))",
    "next_word": "sentences = data(64, 0)",
    "multivariate_forecast": "xs, targets = windows(data(100), 24, 1); targets = targets[:, 0]",
    "sensors": "xs, kinds = data(64, 0); held_out = data(64, 1)",
    "sequence_to_sequence": "questions, answers = [each[:64] for each in data()]",
}
PROGRAM = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, FOLDER)
from {name} import *
from keras import Sequential
from keras.callbacks import EarlyStopping
from keras.layers import *
from keras.losses import *
from keras.utils import pad_sequences
ragged = lambda batch: ([x[:n] for x, n in zip(batch.xs, batch.lengths)], batch.targets)
{names}
{code}
assert model.history.epoch == [0]
"""


@pytest.mark.full
@pytest.mark.parametrize("name", EXPECTED)
def test_the_keras_form_runs(name):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras")
    text = (FOLDER / f"{name}.py").read_text()
    form = re.search(r"In Keras:\n\n(.*?)\n\"\"\"", text, re.S)[1]
    code = re.sub(r"epochs=\d+", "epochs=1, verbose=0", re.sub("^    ", "", form, flags=re.M))
    program = PROGRAM.format(name=name, names=NAMES[name], code=code).replace("FOLDER", repr(str(FOLDER)))
    run = python("-c", program)
    assert run.returncode == 0, run.stderr
