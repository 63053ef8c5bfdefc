"""The short programs of the tutorials run, and learn something in a few epochs."""

import importlib.util
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", EXPECTED)
def test_a_tutorial_learns(name, capsys):
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    epochs, least = EXPECTED[name]
    result = module.main(epochs=epochs)
    assert (result if least > 0 else -result) >= least, capsys.readouterr().out
    assert "In Keras:\n\n    model = Sequential(" in module.__doc__
