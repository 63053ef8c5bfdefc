// Products of many rows with packed weights, tile by tile: functions of the number V of vectors of a block alone, so that
// all kernels share them.

constexpr int OUT = 4;  // vectors of a block of what a product with a transposed weight gives

// to[m] = begin + Σ_k rows[m][k] w[k], where rows of `to` are `stride` apart. Or of the first row, which is alone.
template <int V>
void product(const Real* const* rows, long count, Range k, const Real* w, const Real* begin, Real* to, long stride,
             bool alone = false) {
  auto first = [&](int v) { return begin ? load(begin + v * LANES) : Vec{}; };
  w += k.begin * V * LANES;
  if (alone) {
    Vec sums[2][V] = {};
    multiply_row(rows[0] + k.begin, k.size(), w, sums);
    for (int v = 0; v < V; ++v) store(to + v * LANES, first(v) + sums[0][v] + sums[1][v]);
    return;
  }
  tiles<ROWS<V>>({0, count}, [&](auto size, long m) {
    constexpr int R = decltype(size)::value;
    const Real* a[R];
    Vec sums[R][V];
    for (int r = 0; r < R; ++r) {
      a[r] = rows[m + r] + k.begin;
      for (int v = 0; v < V; ++v) sums[r][v] = first(v);
    }
    multiply<R, V>(a, k.size(), w, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(to + (m + r) * stride + v * LANES, sums[r][v]);
  });
}

// The squares of every row, added up: `vectors` of it in each panel.
inline void squares(const Real* a, long stride, long width, long panels, long vectors, long count, Real* to) {
  for (long m = 0; m < count; ++m, a += width) {
    Vec sum{};
    for (long j = 0; j < panels; ++j)
      for (long v = 0; v < vectors; ++v) {
        const Vec x = load(a + j * stride + v * LANES);
        sum += x * x;
      }
    to[m] = sum_of(sum);
  }
}

// Rows of which each panel holds some numbers: where the first is, what lies between two panels and two rows, and how many.
struct Panels {
  const Real* first;
  long stride, width, each;
};

// to[m] = Σ_j d[j][m] w[j] over some panels, from a column on, of which `columns` follow; w[j] is a block of a transposed
// weight. Or of the first row, which is alone.
inline void product_of_panels(const Panels& d, Range panels, const Real* w, long count, Real* const* to, long column,
                              long columns, bool alone = false) {
  auto give = [&](long m, const Vec* sums) {
    for (int v = 0; v < OUT; ++v)
      if (const long n = columns - v * LANES; n > 0) store(to[m] + column + v * LANES, sums[v], n);
  };
  if (alone) {
    Vec sums[2][OUT] = {};
    for (long j = panels.begin; j < panels.end; ++j)
      multiply_row(d.first + j * d.stride, d.each, w + j * d.each * OUT * LANES, sums);
    for (int v = 0; v < OUT; ++v) sums[0][v] += sums[1][v];
    return give(0, sums[0]);
  }
  tiles<ROWS<OUT>>({0, count}, [&](auto size, long m) {
    constexpr int R = decltype(size)::value;
    Vec sums[R][OUT] = {};
    times<R>(d.first + m * d.width, d.stride, d.width, panels, d.each, w, sums);
    for (int r = 0; r < R; ++r) give(m + r, sums[r]);
  });
}

// sums[k] += Σ_m rows[m][k] d[m] for some k: rows of `sums` are `step` apart, those of d `stride`.
template <int V>
void gram(const Real* const* rows, long count, Range k, const Real* d, long stride, Real* sums, long step) {
  tiles<ROWS<V>>(k, [&](auto size, long first) {
    accumulate<decltype(size)::value, V>(rows, first, count, d, stride, sums + first * step, step);
  });
}

// sums += Σ_m d[m].
template <int V>
void add_rows(const Real* d, long count, long stride, Real* sums) {
  Vec s[V];
  for (int v = 0; v < V; ++v) s[v] = load(sums + v * LANES);
  for (long m = 0; m < count; ++m, d += stride)
    for (int v = 0; v < V; ++v) s[v] += load(d + v * LANES);
  for (int v = 0; v < V; ++v) store(sums + v * LANES, s[v]);
}
