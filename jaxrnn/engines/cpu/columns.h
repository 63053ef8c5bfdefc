// Matrices of K rows and V columns, of which a kernel takes a few columns at once.

// Columns of a panel: Z vectors, of which the last one holds `last` numbers.
template <long Z>
struct Columns {
  long last;
  // One vector; where all are whole, no lane is looked at.
  template <bool WHOLE>
  JAXRNN_INLINE Vec get(const Real* p, long z) const {
    return WHOLE || z < Z - 1 ? load(p + z * LANES) : load(p + z * LANES, last);
  }
  template <bool WHOLE>
  JAXRNN_INLINE void put(Real* p, long z, Vec x) const {
    if (WHOLE || z < Z - 1) store(p + z * LANES, x);
    else store(p + z * LANES, x, last);
  }
  JAXRNN_INLINE void read(Vec* to, const Real* p) const {
    for (long z = 0; z < Z - 1; ++z) to[z] = load(p + z * LANES);
    to[Z - 1] = load(p + (Z - 1) * LANES, last);
  }
  JAXRNN_INLINE void write(Real* p, const Vec* from) const {
    for (long z = 0; z < Z - 1; ++z) store(p + z * LANES, from[z]);
    store(p + (Z - 1) * LANES, from[Z - 1], last);
  }
  // K rows of V numbers to a panel, and back.
  void take(Real* panel, const Real* p, long rows, long stride) const {
    for (long i = 0; i < rows; ++i) {
      Vec row[Z];
      read(row, p + i * stride);
      for (long z = 0; z < Z; ++z) store(panel + (i * Z + z) * LANES, row[z]);
    }
  }
  void give(const Real* panel, Real* p, long rows, long stride) const {
    for (long i = 0; i < rows; ++i) {
      Vec row[Z];
      for (long z = 0; z < Z; ++z) row[z] = load(panel + (i * Z + z) * LANES);
      write(p + i * stride, row);
    }
  }
};

// Calls f with `count` columns, at most 4 vectors.
template <class F>
void with_columns(long count, const F& f) {
  const long vectors = (count + LANES - 1) / LANES, last = count - (vectors - 1) * LANES;
  if (vectors == 4) f(Columns<4>{last});
  else if (vectors == 3) f(Columns<3>{last});
  else if (vectors == 2) f(Columns<2>{last});
  else f(Columns<1>{last});
}

constexpr long WIDTH = 4 * LANES;  // of a panel, at most
