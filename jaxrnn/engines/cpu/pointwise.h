// The gates of one vector of units, forward and backward: what a recurrence does beside its products.

template <Kind K>
struct Cell {
  static constexpr long GATES = gates_of(K), KEPT = kept_of(K);
  static constexpr int V = GATES == 1 ? 4 : GATES;  // vectors of a block
  static constexpr bool LSTM = K == Kind::kLstm, AFTER = K == Kind::kGru, BEFORE = K == Kind::kGruBefore;
};

inline void keep(float* kept, long units, long n, std::initializer_list<Vec> gates) {
  if (kept == nullptr) return;
  for (Vec gate : gates) {
    store(kept, gate, n);
    kept += units;
  }
}

template <Kind K>
inline Vec elman(Vec a) {
  return K == Kind::kElmanTanh ? tangent(a) : a > 0.0f ? a : a != a ? a : Vec{};
}

// y, and c in place, from the sums of the four gates.
inline Vec lstm(const Vec* a, Vec& c, float* kept, long units, long n) {
  const Vec i = logistic(a[0]), f = logistic(a[1]), g = tangent(a[2]), o = logistic(a[3]);
  c = f * c + i * g;
  keep(kept, units, n, {i, f, g, o});
  return o * tangent(c);
}

// y from the sums of r and z, u_n and q = h w_hn + b_hn.
inline Vec gru(Vec a_r, Vec a_z, Vec u_n, Vec q, Vec h, float* kept, long units, long n) {
  const Vec r = logistic(a_r), z = logistic(a_z), candidate = tangent(u_n + r * q);
  keep(kept, units, n, {r, z, candidate, q});
  return (1.0f - z) * candidate + z * h;
}

// The cotangents of the four sums, and of c in place, from that of y.
inline void lstm_back(Vec d_y, Vec& d_c, Vec c_before, Vec c, const float* kept, long units, long n, Vec* d_a) {
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
  GruBack(Vec d_y, Vec h, const float* kept, long units, long n) : r(load(kept, n)) {
    const Vec z = load(kept + units, n), candidate = load(kept + 2 * units, n);
    d_n = d_y * (1.0f - z) * (1.0f - candidate * candidate);
    d_z = d_y * (h - candidate) * z * (1.0f - z);
    d_h = d_y * z;
  }
};
