// Products of many rows with packed weights, tile by tile: functions of the number V of vectors of a block alone, so that
// all kernels share them.

constexpr int OUT = 4;  // vectors of a block of what a product with a transposed weight gives

// to[m] = begin + Σ_k rows[m][k] w[k] for some rows of `to`, `stride` apart. The sums of a row that is `alone` would wait
// for themselves, so that there are two of each.
template <int V>
void product(const Real* const* rows, long count, Range k, const Real* w, const Real* begin, Real* to, long stride,
             bool alone = false) {
  auto tile = [&](auto size, auto chains, long m) {
    constexpr int R = decltype(size)::value;
    const Real* a[R];
    Vec sums[R][V];
    for (int r = 0; r < R; ++r) {
      a[r] = rows[m + r] + k.begin;
      for (int v = 0; v < V; ++v) sums[r][v] = begin ? load(begin + v * LANES) : Vec{};
    }
    multiply<R, V, decltype(chains)::value>(a, k.size(), w + k.begin * V * LANES, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(to + (m + r) * stride + v * LANES, sums[r][v]);
  };
  constexpr std::integral_constant<int, 1> one{};
  if (alone) tile(one, std::integral_constant<int, 2>{}, 0l);
  else tiles<ROWS<V>>({0, count}, [&](auto size, long m) { tile(size, one, m); });
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
