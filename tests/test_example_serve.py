"""examples/serve.py: sessions that come and go, what clients may do, its short mode, and the exit status."""

import asyncio
import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import jaxrnn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "serve.py"
SPEC = importlib.util.spec_from_file_location("serve", PATH)
serve = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(serve)

ARGS = serve.parse(["--quick", "--sessions", "3"])
MODEL, PARAMS = serve.network(ARGS)


@pytest.fixture(scope="module")
def runs():
    return serve.run(ARGS)


def with_server(clients, slots=2, patience=10.0):
    """What `clients(port, sessions)` returns beside a server of so many slots."""

    async def beside():
        with ThreadPoolExecutor(1) as thread:
            sessions = serve.Batched(MODEL, PARAMS, slots, thread, patience)
            async with serve.serving(sessions) as port:
                return await clients(port, sessions)

    return asyncio.run(beside())


def draw(*lengths):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(length, serve.INPUTS)).astype(np.float32) for length in lengths]


def whole(xs):
    return jaxrnn.scan(MODEL, PARAMS, None, xs)[1]


def test_the_short_mode_answers_right(runs):
    for each in runs.values():
        assert len(each.latencies) == sum(map(len, serve.sequences(ARGS)))
        assert each.latencies.min() > 0
        assert each.throughput > 0


def test_a_wrong_answer_is_found(monkeypatch):
    predict = serve.predict
    monkeypatch.setattr(serve, "predict", lambda *given: [ys + 1e-3 * (k == 4) for k, ys in enumerate(predict(*given))])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        serve.run(ARGS)


def test_a_slot_is_reset_when_it_is_used_again():
    """Also after NaN; and one session's NaN reaches no other."""
    first, second, third = draw(3, 4, 2)

    async def clients(port, sessions):
        a, _ = await asyncio.gather(serve.session("127.0.0.1", port, first), serve.session("127.0.0.1", port, bad))
        b, c = await asyncio.gather(*(serve.session("127.0.0.1", port, xs) for xs in (second, third)))
        return a.ys, b.ys, c.ys

    bad = np.full_like(second, np.nan)
    for ys, xs in zip(with_server(clients), (first, second, third), strict=True):
        np.testing.assert_allclose(ys, whole(xs), 1e-4, 1e-5)


def test_more_sessions_than_slots_wait_and_steps_are_computed_together():
    given = draw(5, 5, 5, 5, 5, 5)

    async def clients(port, sessions):
        found = await asyncio.gather(*(serve.session("127.0.0.1", port, xs) for xs in given))
        return [each.ys for each in found], sessions.batches

    found, batches = with_server(clients, slots=3)
    for ys, xs in zip(found, given, strict=True):
        np.testing.assert_allclose(ys, whole(xs), 1e-4, 1e-5)
    assert 10 <= batches < 30


def test_a_session_that_is_silent_keeps_its_carry_and_holds_up_nobody():
    mine, others = draw(4, 6)

    async def clients(port, sessions):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ys = []
        for k, x in enumerate(mine):
            writer.write(x.tobytes())
            ys.append(await serve.read(reader, serve.OUTPUTS))
            if k == 1:
                other = await serve.session("127.0.0.1", port, others)
        await serve.close(writer)
        return np.stack(ys), other.ys

    for ys, xs in zip(with_server(clients, patience=0.01), (mine, others), strict=True):
        np.testing.assert_allclose(ys, whole(xs), 1e-4, 1e-5)


@pytest.mark.parametrize("sent", [b"", b"half of a request", draw(1)[0].tobytes()], ids=["nothing", "half", "one"])
def test_a_client_that_leaves_without_a_word_frees_its_slot(sent):
    (xs,) = draw(3)

    async def clients(port, sessions):
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            await serve.close(writer)
        return (await serve.session("127.0.0.1", port, xs)).ys

    np.testing.assert_allclose(with_server(clients, slots=1), whole(xs), 1e-4, 1e-5)


def test_an_error_in_a_batch_reaches_its_sessions(caplog):
    async def clients(port, sessions):
        sessions.advance = None
        with pytest.raises(ConnectionError, match="the server has closed the connection"):
            await serve.session("127.0.0.1", port, draw(1)[0])

    with_server(clients)
    assert "'NoneType' object is not callable" in caplog.text


@pytest.mark.full
def test_server_and_clients_in_two_processes():
    common = [sys.executable, str(PATH), "--quick", "--sessions", "3"]
    with subprocess.Popen([*common, "--serve", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = re.search(r"on port (\d+)", server.stdout.readline())[1]
            found = [subprocess.run([*common, "--connect", f"localhost:{port}"], capture_output=True, text=True)]
            found += [subprocess.run([*found[0].args, "--seed", "1"], capture_output=True, text=True)]
        finally:
            server.terminate()
    assert found[0].returncode == 0, found[0].stderr
    assert "every answer is that of the whole sequence" in found[0].stdout
    assert found[1].returncode != 0  # another model
    assert "Not equal to tolerance" in found[1].stderr


@pytest.mark.parametrize(("throughput", "status"), [(250.0, 0), (150.0, 1)])
def test_the_margin_decides_the_exit_status(runs, monkeypatch, tmp_path, capsys, throughput, status):
    faster = {serve.BATCH: throughput, serve.CALLS: 100.0}
    monkeypatch.setattr(
        serve, "run", lambda args: {name: run._replace(throughput=faster[name]) for name, run in runs.items()}
    )
    out = tmp_path / "serve.png"
    assert serve.main(["--quick", "--margin", "2", "--out", str(out)]) == 0
    assert "too small for its speed to be judged" in capsys.readouterr().out
    assert serve.main(["--margin", "2", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"{throughput:.0f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", ["--margin much", "--seed 0.5", "--unknown", "--sessions 0", "--connect here", "--serve here"]
)
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        serve.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
