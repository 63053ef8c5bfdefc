// Products of a few rows with a block of weight columns that is packed: for every k the V vectors that it multiplies.

#if JAXRNN_WIDTH == 64 || defined(__aarch64__)
constexpr int SUMS = 24;  // and V weights, and a broadcast number, in 32 registers
#else
constexpr int SUMS = 12;
#endif
// Rows of a tile: with more of them its product would be no faster.
template <int V>
constexpr int ROWS = std::min(SUMS / V, 12);

// sums[r] += Σ_k a[r][k] w[k].
template <int R, int V>
JAXRNN_INLINE void multiply(const Real* const* a, long length, const Real* w, Vec (&sums)[R][V]) {
  for (long k = 0; k < length; ++k, w += V * LANES) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(w + v * LANES);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      Vec x = splat(a[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * b[v];
    }
  }
}

// The same of a single row, where one sum would wait for itself: two in turns.
template <int V>
JAXRNN_INLINE void multiply_row(const Real* a, long length, const Real* w, Vec (&sums)[2][V]) {
  long k = 0;
  for (; k + 2 <= length; k += 2)
#pragma GCC unroll 2
    for (int turn = 0; turn < 2; ++turn, w += V * LANES)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[turn][v] += a[k + turn] * load(w + v * LANES);
  for (int v = 0; k < length && v < V; ++v) sums[0][v] += a[k] * load(w + v * LANES);
}

// sums[i] += Σ_n a[n][i] panel[n]: some rows of aᵀ panel, of which `stride` floats lie between two rows.
template <int R, int V>
JAXRNN_INLINE void accumulate(const Real* const* a, long from, long count, const Real* panel, long stride, Real* sums,
                       long step) {
  Vec s[R][V];
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[i][v] = load(sums + i * step + v * LANES);
  for (long n = 0; n < count; ++n, panel += stride) {
    const Real* row = a[n] + from;
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i) {
      Vec x = splat(row[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) s[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + i * step + v * LANES, s[i][v]);
}

// Σ over panels of the vectors there, `each` numbers of rows `width` apart, times a packed transposed weight.
template <int R, int V>
inline void times(const Real* d, long stride, long width, Range panels, long each, const Real* w, Vec (&sums)[R][V]) {
  const Real* a[R];
  for (long j = panels.begin; j < panels.end; ++j) {
    for (int r = 0; r < R; ++r) a[r] = d + j * stride + r * width;
    multiply<R, V>(a, each, w + j * each * V * LANES, sums);
  }
}

template <int MAX, class F>
JAXRNN_INLINE void one_tile(long count, long row, const F& f) {
  if (count == MAX) f(std::integral_constant<int, MAX>{}, row);
  else if constexpr (MAX > 1) one_tile<MAX - 1>(count, row, f);
}

// f(count, first row) for parts of nearly equal size, of at most `most` rows.
template <class F>
JAXRNN_INLINE void in_parts(Range rows, uint32_t most, const F& f) {
  // Of 32 bits, since a division of 64 takes as long as the product of a tile.
  const uint32_t size = static_cast<uint32_t>(rows.size()), count = (size + most - 1) / most;
  if (count == 0) return;
  const uint32_t least = size / count, more = size - least * count;
  long row = rows.begin;
  for (uint32_t k = 0; k < count; ++k) {
    const uint32_t part = least + (k < more);
    f(part, row);
    row += part;
  }
}

// The same, where f takes an integral_constant of the count.
template <int MAX, class F>
JAXRNN_INLINE void tiles(Range rows, const F& f) {
  in_parts(rows, MAX, [&](long count, long row) { one_tile<MAX>(count, row, f); });
}

// Where vector v of block j begins among the columns of a weight with `gates` gates of `size` units each. A block holds
// LANES units of every gate, or, of a single gate, V · LANES units.
struct Layout {
  long size, gates, vectors;
  long width() const { return vectors * LANES; }
  long units() const { return gates == 1 ? width() : LANES; }
  long blocks() const { return (size + units() - 1) / units(); }
  long unit(long block, long v) const { return block * units() + (gates == 1 ? v * LANES : 0); }
  long column(long block, long v) const { return (gates == 1 ? 0 : v * size) + unit(block, v); }
  long lanes(long block, long v) const {
    const long left = size - unit(block, v);
    return left < 0 ? 0 : left < LANES ? left : LANES;
  }
};

// Blocks of w (rows, stride): for every row the vectors of the block, 0 beyond the units.
JAXRNN_APART void pack(const Real* w, long rows, long stride, const Layout& layout, Range blocks, Real* out) {
  out += blocks.begin * rows * layout.width();
  for (long j = blocks.begin; j < blocks.end; ++j)
    for (long k = 0; k < rows; ++k)
      for (long v = 0; v < layout.vectors; ++v, out += LANES)
        store(out, load(w + k * stride + layout.column(j, v), layout.lanes(j, v)));
}

// And back.
JAXRNN_APART void unpack(const Real* in, long rows, long stride, const Layout& layout, Range blocks, Real* w) {
  in += blocks.begin * rows * layout.width();
  for (long j = blocks.begin; j < blocks.end; ++j)
    for (long k = 0; k < rows; ++k)
      for (long v = 0; v < layout.vectors; ++v, in += LANES)
        store(w + k * stride + layout.column(j, v), load(in), layout.lanes(j, v));
}

// Blocks of wᵀ: its rows are the columns of w (.., stride), in the order of the vectors [first, last) of `columns`; its
// columns, the rows of w, are those of `layout`.
JAXRNN_APART void pack_transposed(const Real* w, long stride, const Layout& columns, long first, long last,
                            const Layout& layout, Range blocks, Real* out) {
  const long rows = columns.blocks() * (last - first) * LANES, width = layout.width();
  std::memset(out + blocks.begin * rows * width, 0, blocks.size() * rows * width * sizeof(Real));
  for (long j = blocks.begin; j < blocks.end; ++j)
    for (long i = 0; i < width && j * width + i < layout.size; ++i) {
      const Real* row = w + (j * width + i) * stride;
      Real* to = out + j * rows * width + i;
      for (long b = 0; b < columns.blocks(); ++b)
        for (long v = first; v < last; ++v, to += LANES * width) {
          const Real* from = row + columns.column(b, v);
          for (long lane = 0, n = columns.lanes(b, v); lane < n; ++lane) to[lane * width] = from[lane];
        }
    }
}
