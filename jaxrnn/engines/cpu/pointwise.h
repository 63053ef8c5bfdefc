// The gates of one vector of units, forward and backward: what a recurrence does beside its products.

template <Kind K>
struct Cell {
  static constexpr long GATES = gates_of(K), KEPT = kept_of(K);
  static constexpr int V = GATES == 1 ? 4 : GATES;  // vectors of a block
  static constexpr bool LSTM = K == Kind::kLstm, AFTER = K == Kind::kGru, BEFORE = K == Kind::kGruBefore;
};

// Some vectors at once, each step for all of them before the next one: one alone would wait for its own results.
// `gates` holds sums, and then what is kept.

template <Kind K, int N>
JAXRNN_INLINE void elman(Vec* a) {
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) a[k] = K == Kind::kElmanTanh ? tangent(a[k]) : a[k] > 0.0f ? a[k] : a[k] != a[k] ? a[k] : Vec{};
}

// y, and c in place, from the sums of the four gates.
template <int R>
JAXRNN_INLINE void lstm(Vec (&gates)[R][4], Vec (&c)[R], Vec (&y)[R]) {
  for (int r = 0; r < R; ++r) {
    gates[r][0] = logistic(gates[r][0]);
    gates[r][1] = logistic(gates[r][1]);
    gates[r][2] = tangent(gates[r][2]);
    gates[r][3] = logistic(gates[r][3]);
    c[r] = gates[r][1] * c[r] + gates[r][0] * gates[r][2];
  }
  for (int r = 0; r < R; ++r) y[r] = gates[r][3] * tangent(c[r]);
}

// y from the sums of r and z and from q = h w_hn + b_hn, and u_n and h.
template <int R>
JAXRNN_INLINE void gru(Vec (&gates)[R][3], const Vec (&u_n)[R], const Vec (&h)[R], Vec (&candidate)[R], Vec (&y)[R]) {
  for (int r = 0; r < R; ++r) {
    gates[r][0] = logistic(gates[r][0]);
    gates[r][1] = logistic(gates[r][1]);
    candidate[r] = u_n[r] + gates[r][0] * gates[r][2];
  }
  for (int r = 0; r < R; ++r) {
    candidate[r] = tangent(candidate[r]);
    y[r] = (1.0f - gates[r][1]) * candidate[r] + gates[r][1] * h[r];
  }
}

// The cotangents of the four sums, and of c in place, from that of y.
JAXRNN_INLINE void lstm_back(Vec d_y, Vec& d_c, Vec c_before, Vec c, const Real* kept, long units, long n, Vec* d_a) {
  const Vec i = load(kept, n), f = load(kept + units, n), g = load(kept + 2 * units, n), o = load(kept + 3 * units, n);
  const Vec squashed = tangent(c), d = d_c + d_y * o * (1.0f - squashed * squashed);
  d_a[0] = d * g * i * (1.0f - i);
  d_a[1] = d * c_before * f * (1.0f - f);
  d_a[2] = d * i * (1.0f - g * g);
  d_a[3] = d_y * squashed * o * (1.0f - o);
  d_c = d * f;
}

// The cotangents of the sums of z and n, and of r times what r multiplies, and of h where it does not pass a product.
struct GruBack {
  Vec r, d_z, d_n, d_h;
  GruBack(Vec d_y, Vec h, const Real* kept, long units, long n) : r(load(kept, n)) {
    const Vec z = load(kept + units, n), candidate = load(kept + 2 * units, n);
    d_n = d_y * (1.0f - z) * (1.0f - candidate * candidate);
    d_z = d_y * (h - candidate) * z * (1.0f - z);
    d_h = d_y * z;
  }
};
