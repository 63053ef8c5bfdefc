// Runs the kernels on problems drawn at random, from several threads at once, and compares every result with that of one
// thread. Built with sanitizers by sanitize.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "problem.h"
#include "threads.h"

using namespace jaxrnn;

// The arrays of one problem, each exactly as long as it must be.
struct Case {
  std::mt19937 rng;
  Kind kind;
  Sizes n;
  bool flags, save;
  std::vector<std::vector<float>> held;
  std::vector<uint8_t> valid, start;
  Forward forward{};
  Backward backward{};

  long draw(long least, long most) { return std::uniform_int_distribution<long>(least, most)(rng); }
  float* array(long size) {
    std::normal_distribution<float> normal(0.0f, 0.5f);
    held.emplace_back(size);
    for (float& x : held.back()) x = normal(rng);
    return held.back().data();
  }

  explicit Case(unsigned seed) : rng(seed) {
    held.reserve(64);
    kind = static_cast<Kind>(draw(0, KINDS - 1));
    n = Sizes{draw(0, 9), draw(1, 40), draw(1, 70), draw(1, 150), draw(0, 1) == 1, draw(0, 1) == 1};
    const bool stream = draw(0, 3) == 0;  // which has a kernel of its own
    if (stream) n.steps = 1, n.rows = draw(1, 2), n.units = draw(1, 420);
    flags = !stream && draw(0, 1), save = !stream && draw(0, 2) != 0;
    const bool lstm = kind == Kind::kLstm;
    const long T = n.steps, B = n.rows, D = n.inputs, H = n.units, G = gates_of(kind) * H;
    Inputs in{};
    in.xs = array(T * B * D), in.w_x = array(D * G), in.w_h = array(H * G), in.h = array(B * H);
    in.c = lstm ? array(B * H) : nullptr;
    if (flags) {
      for (long k = 0; k < T * B; ++k) valid.push_back(draw(0, 3) != 0), start.push_back(valid[k] && draw(0, 3) == 0);
      in.valid = valid.data(), in.start = start.data();
      in.fresh_h = array(B * H), in.fresh_c = lstm ? array(B * H) : nullptr;
    }
    static_cast<Inputs&>(forward) = static_cast<Inputs&>(backward) = in;
    forward.b = draw(0, 1) ? array(G) : nullptr;
    forward.b_hn = kind == Kind::kGru ? array(H) : nullptr;
    backward.d_ys = array(T * B * H), backward.d_last_h = array(B * H), backward.d_last_c = lstm ? array(B * H) : nullptr;
  }

  // Everything that the kernels give with so many threads, one after another.
  std::vector<std::vector<float>> run(int threads) const {
    const bool lstm = kind == Kind::kLstm;
    const long T = n.steps, B = n.rows, D = n.inputs, H = n.units, G = gates_of(kind) * H;
    std::vector<std::vector<float>> found;
    found.reserve(32);
    auto out = [&](long size, bool there = true) -> float* {
      found.emplace_back(there ? size : 0, 7.0f);
      return there ? found.back().data() : nullptr;
    };
    Forward f = forward;
    f.ys = out(T * B * H), f.last_h = out(B * H), f.last_c = out(B * H, lstm);
    f.kept = out(T * B * kept_of(kind) * H, save && kept_of(kind)), f.cs = out(T * B * H, save && lstm);
    const int number = static_cast<int>(kind);
    jaxrnn::forward(kind, n, f, threads);
    if (!save) return found;
    Backward b = backward;
    b.ys = f.ys, b.kept = f.kept, b.cs = f.cs;
    b.d_xs = out(T * B * D), b.d_w_x = out(D * G), b.d_w_h = out(H * G), b.d_h = out(B * H), b.d_c = out(B * H, lstm);
    b.d_fresh_h = out(B * H, flags), b.d_fresh_c = out(B * H, flags && lstm);
    b.d_b = out(G, forward.b != nullptr), b.d_b_hn = out(H, kind == Kind::kGru);
    jaxrnn::backward(kind, n, b, threads);
    return found;
  }
};

// A linear recurrence; its expected results are those of a plain loop.
struct LinearCase {
  std::mt19937 rng;
  long T, R, groups;
  bool reverse, shifted, constant, cuts, constant_cut;
  std::vector<float> a, b, h;
  std::vector<uint8_t> cut;

  explicit LinearCase(unsigned seed) : rng(seed) {
    auto draw = [&](long least, long most) { return std::uniform_int_distribution<long>(least, most)(rng); };
    std::normal_distribution<float> normal(0.0f, 0.7f);
    groups = draw(1, 5), T = draw(0, 40);
    R = groups * (draw(0, 9) == 0 ? draw(2000, 9000) : draw(1, 300));
    reverse = draw(0, 1), shifted = draw(0, 1), constant = draw(0, 2) == 0, cuts = draw(0, 1), constant_cut = draw(0, 3) == 0;
    a.resize((constant ? 1 : T) * R), b.resize(T * R), h.resize(R);
    for (auto* array : {&a, &b, &h})
      for (float& x : *array) x = normal(rng);
    cut.resize((constant_cut ? 1 : T) * groups);
    for (uint8_t& flag : cut) flag = draw(0, 3) == 0;
  }

  std::vector<std::vector<float>> run(int threads) const {
    std::vector<float> hs(T * R, 7.0f), last(R, 7.0f);
    linear(LinearProblem{T, R, reverse, shifted, a.data(), b.data(), h.data(), constant ? 1 : T, cuts ? cut.data() : nullptr,
                         constant_cut ? 1 : T, groups, hs.data(), last.data()},
           threads);
    return {hs, last};
  }

  std::vector<std::vector<float>> expected() const {
    std::vector<float> hs(T * R), state = h;
    for (long k = 0; k < T; ++k) {
      const long t = reverse ? T - 1 - k : k;
      for (long r = 0; r < R; ++r) {
        const bool ends = cuts && cut[(constant_cut ? 0 : t) * groups + r / (R / groups)];
        const float decay = a[(constant ? 0 : t) * R + r];
        if (shifted) hs[t * R + r] = state[r] + b[t * R + r], state[r] = ends ? 0 : decay * hs[t * R + r];
        else hs[t * R + r] = state[r] = (ends ? 0 : decay * state[r]) + b[t * R + r];
      }
    }
    return {hs, state};
  }
};

int main(int count, char** values) {
  const unsigned cases = count > 1 ? std::atoi(values[1]) : 200;
  std::atomic<int> wrong{0};
  auto compare = [&](unsigned seed, const auto& found, const auto& expected) {
    for (size_t k = 0; k < found.size(); ++k)
      for (size_t i = 0; i < found[k].size(); ++i)
        if (!(std::fabs(found[k][i] - expected[k][i]) <= 1e-4f + 1e-4f * std::fabs(expected[k][i]))) {
          std::printf("case %u, result %zu, number %zu: %g for %g\n", seed, k, i, found[k][i], expected[k][i]);
          ++wrong;
          i = found[k].size() - 1;
        }
  };
  auto work = [&](unsigned first) {
    for (unsigned seed = first; seed < cases; seed += 3) {
      const Case one(seed);
      const auto expected = one.run(1);
      for (int threads : {2, 4}) compare(seed, one.run(threads), expected);
      const LinearCase other(seed);
      for (int threads : {1, 2, 4}) compare(seed, other.run(threads), other.expected());
    }
  };
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < 3; ++k) threads.emplace_back(work, k);
  for (auto& thread : threads) thread.join();
  std::printf("%u cases, %s, %d wrong\n", cases, instructions(), wrong.load());
  return wrong != 0;
}
