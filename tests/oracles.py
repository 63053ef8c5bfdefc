"""The classical recurrences a second time: NumPy in float64, straight from their papers.

A step is `(params, carry, x, **options) -> (carry', y, gates)`: params and carry are NamedTuples of arrays under the
library's names, gates a dict. `unroll` is the loop over time. Nothing here knows JAX.
"""

import numpy as np
import scipy.special


def unroll(step, params, carry, xs, **options):
    """`step` over the first axis of `xs`: (final carry, ys)."""
    ys = []
    for x in xs:
        carry, y, _ = step(params, carry, x, **options)
        ys.append(y)
    return carry, np.stack(ys)


def activate(spec, x):
    """The activation `spec`, a name or (name, alpha, beta), of x: ONNX's table, and some more."""
    name, *given = (spec,) if isinstance(spec, str) else spec
    defaults = {
        "affine": (1.0, 0.0),
        "leaky_relu": (0.01,),
        "thresholded_relu": (1.0,),
        "scaled_tanh": (1.0, 1.0),
        "hard_sigmoid": (0.2, 0.5),
        "elu": (1.0,),
    }.get(name, ())
    alpha, beta = (*given, *defaults[len(given) :], None, None)[:2]
    match name:
        case "identity":
            return x
        case "relu":
            return np.maximum(x, 0)
        case "tanh":
            return np.tanh(x)
        case "sigmoid":
            return sigmoid(x)
        case "softsign":
            return x / (1 + np.abs(x))
        case "softplus":
            return np.logaddexp(0, x)
        case "affine":
            return alpha * x + beta
        case "leaky_relu":
            return np.where(x < 0, alpha * x, x)
        case "thresholded_relu":
            return np.where(x > alpha, x, 0)
        case "scaled_tanh":
            return alpha * np.tanh(beta * x)
        case "hard_sigmoid":
            return np.maximum(0, np.minimum(1, alpha * x + beta))
        case "elu":
            return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)
        case "silu":
            return x * sigmoid(x)
        case "gelu":
            return x * scipy.special.ndtr(x)
        case "keras_hard_sigmoid":
            return np.maximum(0, np.minimum(6, x + 3)) / 6
    raise ValueError(f"no activation {name!r}")


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def layer_normalize(x):
    """Ba et al. 2016, without gain and bias."""
    mean = np.mean(x, axis=-1, keepdims=True)
    variance = np.var(x, axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def clip(x, bound):
    return x if bound is None else np.minimum(np.maximum(x, -bound), bound)


def plus(x, b):
    return x if b is None else x + b


def columns(x, width):
    """The gates that lie side by side in the last axis of x, `width` columns each."""
    return [x[..., k : k + width] for k in range(0, x.shape[-1], width)]


def elman_step(params, carry, x, *, activation="tanh", gate_clip=None):
    """Elman 1990."""
    h = activate(activation, clip(plus(x @ params.w_x + carry.h @ params.w_h, params.b), gate_clip))
    return carry._replace(h=h), h, {"h": h}


def indrnn_step(params, carry, x, *, activation="relu"):
    """Li et al. 2018."""
    h = activate(activation, plus(x @ params.w_x + params.w_h * carry.h, params.b))
    return carry._replace(h=h), h, {"h": h}


def mgu_step(params, carry, x):
    """Zhou et al. 2016, equations 4a to 4c."""
    h = carry.h
    size = h.shape[-1]
    w_xf, w_xn = columns(params.w_x, size)
    w_hf, w_hn = columns(params.w_h, size)
    b_f, b_n = (None, None) if params.b is None else columns(params.b, size)
    f = sigmoid(plus(x @ w_xf + h @ w_hf, b_f))
    n = np.tanh(plus(x @ w_xn + (f * h) @ w_hn, b_n))
    h = (1 - f) * h + f * n
    return carry._replace(h=h), h, {"f": f, "n": n}


def gru_step(
    params,
    carry,
    x,
    *,
    reset_after=True,
    layer_norm=False,
    gate_clip=None,
    gate_activation="sigmoid",
    activation="tanh",
):
    """Cho et al. 2014, arXiv 1406.1078: version 1 resets after the recurrent product, version 3 before it."""
    h = carry.h
    size = h.shape[-1]
    from_x = x @ params.w_x
    if layer_norm:
        from_x = layer_normalize(from_x) * params.norm.x
    x_r, x_z, x_n = columns(plus(from_x, params.b), size)

    def gate(pre):
        return activate(gate_activation, clip(pre, gate_clip))

    if reset_after:
        from_h = h @ params.w_h
        if layer_norm:
            from_h = layer_normalize(from_h) * params.norm.h
        h_r, h_z, h_n = columns(from_h, size)
        r, z = gate(x_r + h_r), gate(x_z + h_z)
        h_n = r * plus(h_n, params.b_hn)
    else:
        from_h = h @ params.w_h[:, : 2 * size]
        if layer_norm:
            from_h = layer_normalize(from_h) * params.norm.h[: 2 * size]
        h_r, h_z = columns(from_h, size)
        r, z = gate(x_r + h_r), gate(x_z + h_z)
        h_n = (r * h) @ params.w_h[:, 2 * size :]
        if layer_norm:
            h_n = layer_normalize(h_n) * params.norm.h[2 * size :]
    n = activate(activation, clip(x_n + h_n, gate_clip))
    h = z * h + (1 - z) * n
    return carry._replace(h=h), h, {"r": r, "z": z, "n": n}


def lstm_step(
    params,
    carry,
    x,
    *,
    peephole=False,
    coupled=False,
    projection_size=None,
    layer_norm=False,
    cell_clip=None,
    gate_clip=None,
    gate_activation="sigmoid",
    activation="tanh",
    output_activation="tanh",
):
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000.

    Peepholes: Gers & Schmidhuber 2000. Coupled gates: Greff et al. 2017. Projection: Sak et al. 2014. Layer
    normalisation: Ba et al. 2016.
    """
    h, c = carry.h, carry.c
    size = c.shape[-1]
    from_x, from_h = x @ params.w_x, h @ params.w_h
    if layer_norm:
        from_x = layer_normalize(from_x) * params.norm.x
        from_h = layer_normalize(from_h) * params.norm.h
    names = {False: "ifgo", True: "fgo", "input": "igo"}[coupled]
    pre = dict(zip(names, columns(plus(from_x + from_h, params.b), size), strict=True))
    if peephole:
        p = dict(zip(names.replace("g", ""), params.peephole, strict=True))
        pre |= {gate: pre[gate] + p[gate] * c for gate in names[: names.index("g")]}

    found = {gate: activate(gate_activation, clip(pre[gate], gate_clip)) for gate in names[: names.index("g")]}
    i = 1 - found["f"] if coupled is True else found["i"]
    f = 1 - found["i"] if coupled == "input" else found["f"]
    g = activate(activation, clip(pre["g"], gate_clip))
    c = clip(f * c + i * g, cell_clip)
    if peephole:
        pre["o"] = pre["o"] + p["o"] * c
    o = activate(gate_activation, clip(pre["o"], gate_clip))
    seen = layer_normalize(c) * params.norm.c + params.norm.b_c if layer_norm else c
    h = o * activate(output_activation, seen)
    if projection_size:
        h = h @ params.w_p
    return carry._replace(h=h, c=c), h, {"i": i, "f": f, "g": g, "o": o}


def conv_lstm_step(
    params, carry, x, *, strides=1, dilation=1, padding="SAME", gate_activation="sigmoid", activation="tanh"
):
    """Shi et al. 2015, without peepholes."""
    h, c = carry.h, carry.c
    from_x = convolve(x, params.w_x, strides=strides, dilation=dilation, padding=padding)
    from_h = convolve(h, params.w_h, strides=1, dilation=1, padding="SAME")
    i, f, g, o = columns(plus(from_x + from_h, params.b), c.shape[-1])
    i, f, o = (activate(gate_activation, gate) for gate in (i, f, o))
    g = activate(activation, g)
    c = f * c + i * g
    h = o * activate(activation, c)
    return carry._replace(h=h, c=c), h, {"i": i, "f": f, "g": g, "o": o}


def convolve(x, w, *, strides, dilation, padding):
    """x (..., *S, D) with w (*K, D, G), as the cross-correlation that deep learning calls convolution.

    "SAME" gives ceil(S / stride) positions and pads with zeros, the odd one after; "VALID" pads nothing.
    """
    *kernel, _, _ = w.shape
    dimensions = len(kernel)
    strides = (strides,) * dimensions if isinstance(strides, int) else strides
    dilation = (dilation,) * dimensions if isinstance(dilation, int) else dilation
    first = x.ndim - dimensions - 1
    take = [slice(None)] * x.ndim
    out = list(x.shape)
    padded = [(0, 0)] * x.ndim
    for axis, k, s, d in zip(range(first, x.ndim - 1), kernel, strides, dilation, strict=True):
        reach = (k - 1) * d + 1
        if padding == "SAME":
            out[axis] = -(-x.shape[axis] // s)
            zeros = max((out[axis] - 1) * s + reach - x.shape[axis], 0)
            padded[axis] = (zeros // 2, zeros - zeros // 2)
        else:
            out[axis] = (x.shape[axis] - reach) // s + 1
    x = np.pad(x, padded)
    y = 0
    for offset in np.ndindex(*kernel):
        for axis, o, s, d in zip(range(first, x.ndim - 1), offset, strides, dilation, strict=True):
            take[axis] = slice(o * d, o * d + (out[axis] - 1) * s + 1, s)
        y = y + x[tuple(take)] @ w[offset]
    return y


def _candidate(v, positive):
    return np.where(v >= 0, v + 0.5, sigmoid(v)) if positive else v


def min_gru_step(params, carry, x, *, positive=True):
    """Feng et al. 2024, section 3.1 and appendix B: gates z n."""
    z, n = np.split(x @ params.w_x + (0 if params.b is None else params.b), 2, -1)
    z, n = sigmoid(z), _candidate(n, positive)
    h = (1 - z) * carry.h + z * n
    return type(carry)(h), h, {"z": z, "n": n}


def min_lstm_step(params, carry, x, *, positive=True):
    """Feng et al. 2024, section 3.2 and appendix B: gates f i n, the first two divided by their sum."""
    f, i, n = np.split(x @ params.w_x + (0 if params.b is None else params.b), 3, -1)
    f, i, n = sigmoid(f), sigmoid(i), _candidate(n, positive)
    h = (f * carry.h + i * n) / (f + i)
    return type(carry)(h), h, {"f": f / (f + i), "i": i / (f + i), "n": n}


def lru_step(params, carry, x):
    """Orvieto et al. 2023, with B and C as real and imaginary parts side by side."""
    size = len(params.nu)
    decay = np.exp(-np.exp(params.nu) + 1j * np.exp(params.theta))
    h = decay * carry.h + np.exp(params.gamma) * (x @ (params.w_x[:, :size] + 1j * params.w_x[:, size:]))
    y = np.real(h @ (params.w_y[:size] - 1j * params.w_y[size:])) + params.d * x
    return type(carry)(h), y, None


def rg_lru_step(params, carry, x):
    """De et al. 2024, section 2.4, with gates in blocks."""
    blocks, rows, _ = params.w_x.shape
    u = np.stack([x[..., rows * n : rows * (n + 1)] @ params.w_x[n] for n in range(blocks)], -2)
    r, i = (u[..., k * rows : (k + 1) * rows].reshape(x.shape) for k in (0, 1))
    if params.b is not None:
        r, i = r + params.b[0], i + params.b[1]
    r, i = sigmoid(r), sigmoid(i)
    a = np.exp(-8 * np.logaddexp(0, params.decay) * r)
    scale = np.where(carry.started[..., None], np.sqrt(1 - a**2), 1)
    h = a * carry.h + scale * i * x
    return type(carry)(h, np.ones_like(carry.started)), h, {"r": r, "i": i}


def hgrn_step(params, carry, x, *, lower_bound=0.0):
    """Qin et al. 2023 without phases: gates f n."""
    f, v = np.split(x @ params.w_x + (0 if params.b is None else params.b), 2, -1)
    f, n = lower_bound + (1 - lower_bound) * sigmoid(f), v * sigmoid(v)
    h = f * carry.h + (1 - f) * n
    return type(carry)(h), h, {"f": f, "n": n}


def slstm_step(params, carry, x, *, heads=1):
    """Beck et al. 2024, equations 8 to 17, head by head."""
    size = params.w_h.shape[1]
    a = (x @ params.w_x + (0 if params.b is None else params.b)).reshape(*x.shape[:-1], 4, heads, size)
    for k in range(heads):
        v = carry.h[..., k * size : (k + 1) * size] @ params.w_h[k]
        a[..., k, :] += v.reshape(*v.shape[:-1], 4, size)
    i, f, z, o = np.moveaxis(a.reshape(*x.shape[:-1], 4, heads * size), -2, 0)
    log_f = -np.logaddexp(0, -f)
    m = np.where(carry.n == 0, i, np.maximum(i, log_f + carry.m))
    i, f, z, o = np.exp(i - m), np.exp(np.minimum(log_f + carry.m - m, 0)), np.tanh(z), sigmoid(o)
    c, n = f * carry.c + i * z, np.maximum(f * carry.n + i, 1)
    h = o * c / n
    return type(carry)(h, c, n, m), h, {"i": i, "f": f, "z": z, "o": o}


def _discretize(how, eigenvalue, step):
    if how == "zoh":
        a = np.exp(eigenvalue * step)
        return a, (a - 1) / eigenvalue
    return (2 + step * eigenvalue) / (2 - step * eigenvalue), 2 * step / (2 - step * eigenvalue)


def s5_step(params, carry, x, *, discretization="zoh", timed=False):
    """Smith et al. 2022, with B and C as real and imaginary parts side by side; steps times those of the last input."""
    size = len(params.log_step)
    x, time = (x[..., :-1], x[..., -1:]) if timed else (x, 1)
    eigenvalue = -np.exp(params.log_decay) + 1j * params.frequency
    a, scale = _discretize(discretization, eigenvalue, np.exp(params.log_step) * time)
    h = a * carry.h + scale * (x @ (params.w_x[:, :size] + 1j * params.w_x[:, size:]))
    y = 2 * np.real(h @ (params.w_y[:size] - 1j * params.w_y[size:])) + params.d * x
    return type(carry)(h), y, None


def s4d_step(params, carry, x, *, discretization="zoh", timed=False):
    """Gu et al. 2022, channel by channel."""
    x, time = (x[..., :-1], x[..., -1]) if timed else (x, np.ones(x.shape[:-1]))
    h, y = np.empty_like(carry.h), np.empty_like(x)
    for k in range(x.shape[-1]):
        eigenvalue = -np.exp(params.log_decay[k]) + 1j * params.frequency[k]
        a, scale = _discretize(discretization, eigenvalue, np.exp(params.log_step[k]) * time[..., None])
        h[..., k, :] = a * carry.h[..., k, :] + scale * x[..., k, None]
        y[..., k] = 2 * np.real(h[..., k, :] @ (params.c[0, k] + 1j * params.c[1, k])) + params.d[k] * x[..., k]
    return type(carry)(h), y, None


def s6_step(params, carry, x):
    """Gu & Dao 2023, algorithm 2, channel by channel."""
    size, states = params.log_decay.shape
    r, b, c = np.split(x @ params.w_x, [len(params.w_step), len(params.w_step) + states], -1)
    step = np.logaddexp(0, r @ params.w_step + params.b_step)
    h, y = np.empty_like(carry.h), np.empty_like(x)
    for k in range(size):
        a = np.exp(step[..., k, None] * -np.exp(params.log_decay[k]))
        h[..., k, :] = a * carry.h[..., k, :] + step[..., k, None] * b * x[..., k, None]
        y[..., k] = (c * h[..., k, :]).sum(-1) + params.d[k] * x[..., k]
    return type(carry)(h), y, None


def sru_step(params, carry, x, *, activation="identity"):
    """Lei et al. 2017: gates n f r."""
    size = carry.h.shape[-1]
    n, f, r, *skip = np.split(x @ params.w_x, params.w_x.shape[1] // size, -1)
    b = np.zeros(2 * size) if params.b is None else params.b
    f, r = sigmoid(f + b[:size]), sigmoid(r + b[size:])
    h = f * carry.h + (1 - f) * n
    return type(carry)(h), r * activate(activation, h) + (1 - r) * (skip[0] if skip else x), {"n": n, "f": f, "r": r}


def qrnn_step(params, carry, x):
    """Bradbury et al. 2016, equations 1 to 4 with a filter of any width."""
    seen = np.concatenate([carry.window, x[..., None, :]], -2)
    u = sum(seen[..., k, :] @ w for k, w in enumerate(np.split(params.w_x, seen.shape[-2])))
    z, f, o = np.split(u + (0 if params.b is None else params.b), 3, -1)
    f, o = sigmoid(f), sigmoid(o)
    h = f * carry.h + (1 - f) * np.tanh(z)
    return type(carry)(h, seen[..., 1:, :]), o * h, None


def causal_conv_step(params, carry, x):
    """A product with each of the last inputs."""
    seen = np.concatenate([carry.window, x[..., None, :]], -2)
    return type(carry)(seen[..., 1:, :]), (seen * params.w).sum(-2) + (0 if params.b is None else params.b), None
