// Products of a few rows with a block of weight columns that is packed: for every k the V vectors that it multiplies.

#if JAXRNN_WIDTH == 64
constexpr int ROWS = 6;  // 6 × 4 sums, 4 weights and a broadcast number in 32 registers
#elif JAXRNN_WIDTH == 32
constexpr int ROWS = 3;
#else
constexpr int ROWS = 2;
#endif

template <int R, int V>
inline void multiply(const float* const* a, long length, const float* w, Vec (&sums)[R][V]) {
  for (long k = 0; k < length; ++k, w += V * LANES) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(w + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      Vec x = splat(a[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * b[v];
    }
  }
}

// Where vector v of block j begins among the columns of a weight with `gates` gates of `size` units each. A block holds
// LANES units of every gate, or, of a single gate, V · LANES units.
struct Layout {
  long size, gates, vectors;
  long units() const { return gates == 1 ? vectors * LANES : LANES; }
  long blocks() const { return (size + units() - 1) / units(); }
  long unit(long block, long v) const { return block * units() + (gates == 1 ? v * LANES : 0); }
  long column(long block, long v) const { return (gates == 1 ? 0 : v * size) + unit(block, v); }
  long lanes(long block, long v) const {
    long left = size - unit(block, v);
    return left < 0 ? 0 : left < LANES ? left : LANES;
  }
};

// w (rows, columns) into blocks, zero beyond the units; or its transpose, of which `rows` are the columns.
inline void pack(const float* w, long rows, long stride, bool transposed, const Layout& layout, float* out) {
  for (long j = 0; j < layout.blocks(); ++j)
    for (long k = 0; k < rows; ++k)
      for (long v = 0; v < layout.vectors; ++v, out += LANES) {
        long n = layout.lanes(j, v), column = layout.column(j, v);
        for (long lane = 0; lane < LANES; ++lane)
          out[lane] = lane < n ? (transposed ? w[(column + lane) * stride + k] : w[k * stride + column + lane]) : 0.0f;
      }
}
