"""examples/forecast.py: its parts, its baselines, its loss, and the short mode."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("statsmodels")
SPEC = importlib.util.spec_from_file_location("forecast", Path(__file__).parents[1] / "examples" / "forecast.py")
forecast = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(forecast)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return forecast.run(forecast.parse(["--quick"]))


def test_no_week_is_in_two_parts():
    training, validation, test = forecast.load()
    assert training.future_time.max() < 1985 <= validation.future_time.min()
    assert validation.future_time.max() < 1990 <= test.future_time.min()
    assert np.isnan(training.past).any()
    for part in (training, validation, test):
        np.testing.assert_allclose(np.diff(np.hstack([part.past_time, part.future_time])), 7 / 365.25, atol=0.003)


def test_baselines_of_a_series_that_they_forecast_exactly():
    """A season and a straight line: nothing is left to the seasonal baselines, the slope to persistence."""
    time = 1960 + np.arange(600) / 52
    season = np.sin(2 * np.pi * time)
    value = 300 + 1.5 * time + season
    parts = (*forecast.windows(value, 104, 52), *forecast.windows(time, 104, 52))
    weeks = forecast.Weeks(*parts)
    ys = forecast.baselines(weeks, weeks)
    np.testing.assert_allclose(ys["seasonal naive with drift"], weeks.future, atol=1e-6)
    np.testing.assert_allclose(ys["trend and harmonics, shifted"], weeks.future, atol=1e-6)
    np.testing.assert_allclose(weeks.future[:, 51] - ys["persistence"][:, 51], 1.5, atol=1e-6)


def test_the_loss_is_that_of_the_normal_distribution_and_knows_gaps():
    rng = np.random.default_rng(0)
    mu, log_variance, targets = rng.normal(size=(3, 2, 5)).astype(np.float32)
    targets[0, 3] = np.nan
    expected = -scipy.stats.norm.logpdf(targets, mu, np.exp(log_variance / 2))[~np.isnan(targets)]
    ys = jnp.concatenate([mu, log_variance], axis=-1)
    nll, gradient = jax.value_and_grad(lambda ys: forecast.gaussian_nll(ys, jnp.asarray(targets)).value)(ys)
    np.testing.assert_allclose(nll, expected.mean(), rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert gradient[0, 3] == gradient[0, 8] == 0


def test_the_short_mode_forecasts(result):
    errors = {name: error.mean() for name, error in result.errors().items()}
    assert errors["network"] < errors["persistence"] / 2
    assert errors["network"] < 1.2
    assert 0.6 < result.coverage().mean() <= 1
    assert errors["persistence"] > errors["seasonal naive with drift"] > errors["trend and harmonics, shifted"]
    best = errors["trend and harmonics, shifted"]
    assert result.gain() == pytest.approx(best - errors["network"])


@pytest.mark.parametrize(("margin", "status"), [("-5", 0), ("5", 1)])
def test_the_margin_decides_the_exit_status(result, monkeypatch, tmp_path, capsys, margin, status):
    monkeypatch.setattr(forecast, "run", lambda args: result)
    out = tmp_path / "forecast.png"
    assert forecast.main(["--quick", "--margin", margin, "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert forecast.main(["--margin", margin, "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "persistence" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--seed 0.5", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        forecast.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
