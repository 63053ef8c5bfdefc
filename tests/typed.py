"""What an editor knows of a cell: checked by pyright, not run. A line that has to be an error says which."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxrnn

key, xs = jax.random.key(0), jnp.ones((7, 5, 3))

lstm = jaxrnn.LSTM(3, 16)
assert_type(lstm.init(key), jaxrnn.LSTMParams)
carry, ys = jaxrnn.scan(lstm, lstm.init(key), None, xs)
assert_type(carry, jaxrnn.LSTMCarry)
carry, y = jaxrnn.step(lstm, lstm.init(key), carry, xs[0])
assert_type(carry, jaxrnn.LSTMCarry)
assert_type(carry.c, jax.Array)

min_gru = jaxrnn.MinGRU(3, 16)
assert_type(jaxrnn.scan(min_gru, min_gru.init(key), None, xs)[0], jaxrnn.MinGRUCarry)
gru = jaxrnn.GRU(3, 16)
assert_type(jaxrnn.scan(gru, gru.init(key), gru.initial_carry(gru.init(key), (5,)), xs)[0], jaxrnn.GRUCarry)
jaxrnn.scan(gru, lstm.init(key), None, xs)  # pyright: ignore[reportArgumentType]
jaxrnn.scan(gru, gru.init(key), carry, xs)  # pyright: ignore[reportArgumentType]
jaxrnn.LSTM(3)  # pyright: ignore[reportCallIssue]
jaxrnn.LSTM(3, 16, peepholes=True)  # pyright: ignore[reportCallIssue]

both = jaxrnn.Bidirectional(lstm, gru)
assert_type(jaxrnn.scan(both, both.init(key), None, xs)[0], jaxrnn.BidirectionalPair)
residual = jaxrnn.Residual(jaxrnn.GRU(3, 3))
assert_type(residual.init(key), jaxrnn.GRUParams)
learned = jaxrnn.LearnedCarry(lstm)
assert_type(jaxrnn.scan(learned, learned.init(key), None, xs)[0], jaxrnn.LSTMCarry)
linear = jaxrnn.Linear(3, 2)
assert_type(linear.init(key), jaxrnn.LinearParams)
