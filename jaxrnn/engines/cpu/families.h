// The gates of cells with options, of some vectors of units at once: forward, with slopes where they are asked for, and
// backward. Sums hold what a gate is computed from, and then the gate.

constexpr int AT_ONCE = 8;

// A vector of units of a row at a step: the row, the step's place in sequences, the first unit, and how many there are.
// A step that is not live changes nothing. Backward also where the states before the step lie.
struct Entry {
  long row, at, unit, n;
  bool live;
  const Real *h, *rest;
};

// The first of these arrays are filled by the driver, of which it reads what has come in their place.
template <class F, bool BACK>
struct Batch {
  const Rule& rule;
  const Real* own;  // θ, (K, width)
  const long width;
  const bool recalled;  // whether the driver has given gates, and not their sums
  int n = 0;
  Entry entries[AT_ONCE];
  Batch(const Rule& r, const Real* theta, long theta_width)
      : rule(r), own(theta), width(theta_width), recalled(BACK && r.keeps_gates()) {}
  JAXRNN_INLINE Vec theta(long k, int i) const { return load(own + k * width + entries[i].unit); }

  Vec a[F::SUMS][AT_ONCE];        // sums, then gates
  Vec s[F::STATES][AT_ONCE];      // states before the step; forward, then those after it
  Vec read[AT_ONCE];              // h as products read it
  Vec y[AT_ONCE];                 // the new h, or what the second product reads
  Vec mean[AT_ONCE], scale[AT_ONCE];  // of the norm of c'

  // Backward: the cotangent of y and, in and out, of the states; of the sums, of the carry where no mask is between, and
  // as products read it; of θ for every vector.
  Vec slope[BACK ? F::SUMS : 1][AT_ONCE];
  Vec d_y[AT_ONCE], d_a[F::SUMS][AT_ONCE], d_s[F::STATES][AT_ONCE], d_read[AT_ONCE];
  Vec through[F::STATES][AT_ONCE];  // the cotangents of states that stay
  Vec d_theta[F::THETA ? F::THETA : 1][AT_ONCE];
  Vec c[AT_ONCE], squashed[AT_ONCE], bend[AT_ONCE], inside[AT_ONCE];  // of an LSTM: c', χ(c'), and slopes of χ and clip

  JAXRNN_INLINE Vec* slopes(int k) { return BACK ? slope[k] : nullptr; }
};

// x within ±bound, with its slope; at the bound that is the mean of both sides.
JAXRNN_INLINE Dual within(Vec x, Real bound) {
  const Vec size = absolute(x), one = splat(1.0f);
  return {size > bound ? with_sign_of(splat(bound), x) : x, size > bound ? Vec{} : size == bound ? 0.5f * one : one};
}

// A gate in place of its sum, clipped before it. One that is recalled has its slope from itself.
template <class B>
JAXRNN_APART void gate(B& b, int k, const Choice& f) {
  if (b.recalled) return slopes_of_values(f, b.a[k], b.slopes(k), b.n);
  const Real bound = b.rule.gate_clip;
  Vec inside[AT_ONCE];
  const bool clipped = bound < std::numeric_limits<Real>::infinity();
  for (int i = 0; clipped && i < b.n; ++i) {
    const Dual x = within(b.a[k][i], bound);
    b.a[k][i] = x.x, inside[i] = x.d;
  }
  activate_all(f, b.a[k], b.slopes(k), b.n);
  if (b.slopes(k))
    for (int i = 0; clipped && i < b.n; ++i) b.slopes(k)[i] *= inside[i];
}

// The same, where more(i) comes to the sum.
template <class B, class More>
JAXRNN_INLINE void gate(B& b, int k, const Choice& f, const More& more) {
  for (int i = 0; !b.recalled && i < b.n; ++i) b.a[k][i] += more(i);
  gate(b, k, f);
}

struct Elman {
  static constexpr int GATES = 1, FIRST = 1, SUMS = 1, STATES = 1, THETA = 0;
  template <class B>
  static void first(B& b) {
    gate(b, 0, b.rule.candidate);
    for (int i = 0; i < b.n; ++i) b.y[i] = b.a[0][i];
  }
  template <class B>
  static void back(B& b) {
    first(b);
    for (int i = 0; i < b.n; ++i) b.d_a[0][i] = b.d_y[i] * b.slope[0][i], b.d_s[0][i] = b.d_read[i] = Vec{};
  }
};

struct IndRnn {
  static constexpr int GATES = 1, FIRST = 0, SUMS = 1, STATES = 1, THETA = 1;
  template <class B>
  static void first(B& b) {
    gate(b, 0, b.rule.candidate, [&](int i) { return b.theta(0, i) * b.read[i]; });
    for (int i = 0; i < b.n; ++i) b.y[i] = b.a[0][i];
  }
  template <class B>
  static void back(B& b) {
    first(b);
    for (int i = 0; i < b.n; ++i) {
      const Vec d = b.d_a[0][i] = b.d_y[i] * b.slope[0][i];
      b.d_s[0][i] = Vec{};
      b.d_read[i] = d * b.theta(0, i);
      b.d_theta[0][i] = d * b.read[i];
    }
  }
};

// Gates i, f, g, o; coupled ones f, g, o or i, g, o. θ holds peepholes, for all gates but g.
template <bool COUPLED>
struct Lstm {
  static constexpr int GATES = COUPLED ? 3 : 4, FIRST = GATES, SUMS = GATES, STATES = 2, THETA = GATES - 1;
  static constexpr int G = GATES - 2, O = GATES - 1;

  template <class B>
  static void pair(const B& b, int i, Vec& in, Vec& forget) {
    const Vec one = b.a[0][i];
    in = !COUPLED || b.rule.input ? one : 1.0f - one;
    forget = !COUPLED ? b.a[1][i] : b.rule.input ? 1.0f - one : one;
  }

  // c' as a state.
  template <class B>
  static JAXRNN_INLINE void cell(B& b) {
    for (int k = 0; k < G; ++k) gate(b, k, b.rule.gate, [&](int i) { return b.theta(k, i) * b.s[1][i]; });
    gate(b, G, b.rule.candidate);
    const Real bound = b.rule.cell_clip;
    for (int i = 0; i < b.n; ++i) {
      Vec in, forget;
      pair(b, i, in, forget);
      const Dual c = within(forget * b.s[1][i] + in * b.a[G][i], bound);
      b.c[i] = c.x, b.inside[i] = c.d;
    }
  }
  template <class B>
  static JAXRNN_INLINE void output_gate(B& b) {
    gate(b, O, b.rule.gate, [&](int i) { return b.theta(G, i) * b.c[i]; });
  }
  template <class B>
  static void first(B& b) {
    cell(b), output_gate(b);
  }

  // y = o χ(c'), where `mean` and `scale` are those of a norm, and its gain and bias the last θ.
  template <class B>
  static JAXRNN_INLINE Vec gain(const B& b, int i) { return b.theta(b.rule.theta() - 2, i); }
  template <class B>
  static void output(B& b, bool slopes) {
    for (int i = 0; i < b.n; ++i)
      b.squashed[i] = b.rule.norm ? (b.c[i] - b.mean[i]) * b.scale[i] * gain(b, i) + b.theta(b.rule.theta() - 1, i) : b.c[i];
    activate_all(b.rule.output, b.squashed, slopes ? b.bend : nullptr, b.n);
    for (int i = 0; i < b.n; ++i) b.y[i] = b.a[O][i] * b.squashed[i];
  }

  // The cotangent of χ's argument, in place of d_y, and of o's sum.
  template <class B>
  static void back_output(B& b) {
    output(b, true);
    for (int i = 0; i < b.n; ++i) {
      b.d_a[O][i] = b.d_y[i] * b.squashed[i] * b.slope[O][i];
      b.d_y[i] *= b.a[O][i] * b.bend[i];
    }
  }

  // The rest, from that of c' beside o's peephole.
  template <class B>
  static void back_gates(B& b) {
    for (int i = 0; i < b.n; ++i) {
      Vec in, forget;
      pair(b, i, in, forget);
      const Vec before = b.s[1][i], d_o = b.d_a[O][i];
      const Vec d = (b.d_s[1][i] + b.d_y[i] + d_o * b.theta(G, i)) * b.inside[i];
      const Vec d_in = d * b.a[G][i], d_forget = d * before;
      b.d_a[G][i] = d * in * b.slope[G][i];
      if constexpr (COUPLED) {
        b.d_a[0][i] = (b.rule.input ? d_in - d_forget : d_forget - d_in) * b.slope[0][i];
      } else {
        b.d_a[0][i] = d_in * b.slope[0][i];
        b.d_a[1][i] = d_forget * b.slope[1][i];
      }
      Vec d_before = d * forget;
      for (int k = 0; k < G; ++k) {
        d_before += b.d_a[k][i] * b.theta(k, i);
        b.d_theta[k][i] = b.d_a[k][i] * before;
      }
      b.d_theta[G][i] = d_o * b.c[i];
      b.d_s[1][i] = d_before;
      b.d_s[0][i] = b.d_read[i] = Vec{};
    }
  }
};

// Sums r, z, q = h w_hn + b_hn, and that of x for n. θ is b_hn, which is in q.
struct Gru {
  static constexpr int GATES = 3, FIRST = 3, SUMS = 4, STATES = 1, THETA = 1;
  template <class B>
  static void first(B& b) {
    gate(b, 0, b.rule.gate);
    gate(b, 1, b.rule.gate);
    gate(b, 3, b.rule.candidate, [&](int i) { return b.a[0][i] * b.a[2][i]; });
    for (int i = 0; i < b.n; ++i) b.y[i] = (1.0f - b.a[1][i]) * b.a[3][i] + b.a[1][i] * b.s[0][i];
  }
  // Those of the sums of the product with x are 0, 1 and 3; of that with h, 0, 1 and 2.
  template <class B>
  static void back(B& b) {
    first(b);
    for (int i = 0; i < b.n; ++i) {
      const Vec d = b.d_y[i], z = b.a[1][i], d_n = d * (1.0f - z) * b.slope[3][i];
      b.d_a[0][i] = d_n * b.a[2][i] * b.slope[0][i];
      b.d_a[1][i] = d * (b.s[0][i] - b.a[3][i]) * b.slope[1][i];
      b.d_a[2][i] = b.d_theta[0][i] = d_n * b.a[0][i];
      b.d_a[3][i] = d_n;
      b.d_s[0][i] = d * z;
      b.d_read[i] = Vec{};
    }
  }
};

// Gates that reset before the second product: r, z and n; of an MGU, f, which is both, and n.
template <bool MGU>
struct ResetBefore {
  static constexpr int GATES = MGU ? 2 : 3, FIRST = GATES - 1, SUMS = GATES, STATES = 1, THETA = 0;
  static constexpr int UPDATE = FIRST - 1, N = GATES - 1;

  // y is what the second product reads.
  template <class B>
  static void first(B& b) {
    for (int k = 0; k < FIRST; ++k) gate(b, k, b.rule.gate);
    for (int i = 0; i < b.n; ++i) b.y[i] = b.a[0][i] * b.read[i];
  }
  // y from the gate and the sum of n.
  template <class B>
  static void second(B& b) {
    gate(b, N, b.rule.candidate);
    for (int i = 0; i < b.n; ++i) {
      const Vec u = b.a[UPDATE][i], n = b.a[N][i];
      b.y[i] = MGU ? (1.0f - u) * b.s[0][i] + u * n : (1.0f - u) * n + u * b.s[0][i];
    }
  }
  // The cotangents of n's sum and of the update gate's output, in d_a.
  template <class B>
  static void back_second(B& b) {
    first(b), second(b);
    for (int i = 0; i < b.n; ++i) {
      const Vec d = b.d_y[i], u = b.a[UPDATE][i], toward = b.a[N][i] - b.s[0][i];
      b.d_a[N][i] = d * (MGU ? u : 1.0f - u) * b.slope[N][i];
      b.d_a[UPDATE][i] = MGU ? d * toward : -d * toward;
      b.d_s[0][i] = d * (MGU ? 1.0f - u : u);
    }
  }
  // From that of what the second product read, in d_y.
  template <class B>
  static void back_first(B& b) {
    first(b);
    for (int i = 0; i < b.n; ++i) {
      const Vec d_r = b.d_y[i] * b.read[i];
      if constexpr (MGU) {
        b.d_a[0][i] = (b.d_a[0][i] + d_r) * b.slope[0][i];
      } else {
        b.d_a[0][i] = d_r * b.slope[0][i];
        b.d_a[1][i] *= b.slope[1][i];
      }
      b.d_read[i] = b.d_y[i] * b.a[0][i];
      b.d_s[0][i] = Vec{};
    }
  }
};

// Gates i, f, z, o; states h, c, n, m.
struct Slstm {
  static constexpr int GATES = 4, FIRST = 4, SUMS = 4, STATES = 4, THETA = 0;

  // Of one vector: what the gates are, and the states after the step.
  struct Step {
    Vec kept, past, i, f, z, o, c, n, clamped, y, m, falls;
    JAXRNN_INLINE Step(Vec a_i, Vec a_f, Vec a_z, Vec a_o, Vec c_before, Vec n_before, Vec m_before) {
      const Softplus forget(-a_f);
      falls = forget.slope;
      kept = m_before - forget.y;
      m = n_before == 0.0f ? a_i : a_i > kept ? a_i : kept != kept ? kept : a_i != a_i ? a_i : kept;
      past = kept - m;
      i = exponential(a_i - m), f = exponential(past > 0.0f ? Vec{} : past);
      z = tangent(a_z), o = logistic(a_o);
      c = f * c_before + i * z, n = f * n_before + i;
      clamped = n < 1.0f ? splat(1.0f) : n;
      y = o * c / clamped;
    }
  };

  template <class B>
  static void first(B& b) {
    for (int k = 0; k < b.n; ++k) {
      const Step s(b.a[0][k], b.a[1][k], b.a[2][k], b.a[3][k], b.s[1][k], b.s[2][k], b.s[3][k]);
      b.y[k] = s.y, b.s[1][k] = s.c, b.s[2][k] = s.clamped, b.s[3][k] = s.m;
    }
  }
  template <class B>
  static void back(B& b) {
    for (int k = 0; k < b.n; ++k) {
      const Vec c_before = b.s[1][k], n_before = b.s[2][k];
      const Step s(b.a[0][k], b.a[1][k], b.a[2][k], b.a[3][k], c_before, n_before, b.s[3][k]);
      const Vec part = 1.0f / s.clamped, d = b.d_y[k] * part, d_c = b.d_s[1][k] + d * s.o;
      const Vec d_n = s.n < 1.0f ? Vec{} : b.d_s[2][k] - d * s.y;
      const Vec d_i = (d_c * s.z + d_n) * s.i, d_past = s.past > 0.0f ? Vec{} : (d_c * c_before + d_n * n_before) * s.f;
      const Vec d_m = b.d_s[3][k] - d_i - d_past;
      const Vec share = n_before == 0.0f ? splat(1.0f)
                        : b.a[0][k] > s.kept ? splat(1.0f) : b.a[0][k] == s.kept ? splat(0.5f) : Vec{};  // i's, of m
      const Vec d_kept = d_past + d_m * (1.0f - share);
      b.d_a[0][k] = d_i + d_m * share;
      b.d_a[1][k] = d_kept * s.falls;
      b.d_a[2][k] = d_c * s.i * (1.0f - s.z * s.z);
      b.d_a[3][k] = d * s.c * s.o * (1.0f - s.o);
      b.d_s[1][k] = d_c * s.f, b.d_s[2][k] = d_n * s.f, b.d_s[3][k] = d_kept;
      b.d_s[0][k] = b.d_read[k] = Vec{};
    }
  }
};
