// How the threads of a call divide it, and its memory.

struct Range {
  long begin, end;
  long size() const { return end - begin; }
};

inline Range share(long count, long parts, long part) { return {count * part / parts, count * (part + 1) / parts}; }

struct Team {
  int threads;
  bool by_rows;
};

constexpr long CACHE = 1 << 17;  // floats of weights that a thread reads again from its own cache at every step

// `weights` are those that every step reads; `blocks` can be divided among threads.
inline Team team(const Sizes& n, long weights, long blocks, int threads) {
  if (threads == 1 || n.steps * n.rows * weights < 200000) return {1, true};
  const bool many_rows = n.rows >= 4 * threads, large = weights > CACHE && blocks >= threads;
  if (many_rows && !large) return {threads, true};
  if (blocks >= threads && n.rows * weights >= 60000) return {threads, false};
  return n.rows >= threads ? Team{threads, true} : Team{1, true};
}

// Steps whose input products are computed at once: enough rows for the weights to pay, few enough to stay in the cache.
inline long steps_at_once(const Sizes& n, long rows, long floats, long wanted) {
  const long fit = floats == 0 ? n.steps : (1 << 16) / floats, least = (wanted + rows - 1) / rows;
  const long steps = fit / rows > least ? fit / rows : least;
  return steps < 1 ? 1 : steps < n.steps ? steps : n.steps;
}

// One thread of those that run a call.
struct Worker {
  int number, count;
  bool by_rows;
  Barrier& barrier;
  Range rows(long all) const { return by_rows ? share(all, count, number) : Range{0, all}; }
  Range blocks(long all) const { return by_rows ? Range{0, all} : share(all, count, number); }
  Range part(long all) const { return share(all, count, number); }
};

template <class Work>
inline void in_team(const Team& team, const Work& work) {
  Barrier together(team.threads), alone(1);
  auto member = [&](int k) { work(Worker{k, team.threads, team.by_rows, together}); };
  if (team.threads == 1 || !Pool::run(team.threads, member)) work(Worker{0, 1, true, alone});
}

// Tasks that threads take one by one.
template <class F>
inline void in_turns(long tasks, long work, int threads, const F& task) {
  std::atomic<long> next{0};
  auto part = [&](int) {
    for (long k; (k = next.fetch_add(1)) < tasks;) task(k);
  };
  const int parts = static_cast<int>(std::min<long>(work < 100000 ? 1 : threads, tasks));
  if (parts > 1 && Pool::share(parts, part)) return;
  part(0);
}

// Memory of one call, aligned, kept by the thread for the next.
class Scratch {
 public:
  __attribute__((noinline)) explicit Scratch(long floats) {
    thread_local std::unique_ptr<char[]> memory;
    thread_local size_t size = 0;
    const size_t bytes = floats * sizeof(Real) + 64;
    if (size < bytes) {
      size = 0;
      memory.reset();
      memory.reset(new char[bytes]);
      in_large_pages(memory.get(), size = bytes);
    }
    next_ = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  }
  Real* take(long floats) {
    Real* p = next_;
    next_ += rounded(floats);
    return p;
  }
  // Where the rows of an array begin.
  Real** rows(Real* first, long count, long stride) {
    Real** at = reinterpret_cast<Real**>(take(count * sizeof(Real*) / sizeof(Real)));
    for (long r = 0; r < count; ++r) at[r] = first + r * stride;
    return at;
  }
  static long rounded(long floats) { return (floats + 15) / 16 * 16; }

 private:
  Real* next_;
};
