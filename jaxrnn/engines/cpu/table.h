// The kernels of one instruction set.

template <Kind K>
inline void run_forward(const Sizes& n, const Forward& p, int threads) {
  if (OneStep<K>::serves(n, p)) OneStep<K>(n, p, threads).run();
  else ForwardRun<K>(n, p, threads).run();
}

template <Kind K>
inline void run_backward(const Sizes& n, const Backward& p, int threads) {
  BackwardRun<K>(n, p, threads).run();
}

inline Kernels table(const char* name) {
  Kernels kernels{{}, {}, name};
  auto enter = [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    kernels.forward[static_cast<int>(K)] = run_forward<K>;
    kernels.backward[static_cast<int>(K)] = run_backward<K>;
  };
  enter(std::integral_constant<Kind, Kind::kElmanTanh>{});
  enter(std::integral_constant<Kind, Kind::kElmanRelu>{});
  enter(std::integral_constant<Kind, Kind::kLstm>{});
  enter(std::integral_constant<Kind, Kind::kGru>{});
  enter(std::integral_constant<Kind, Kind::kGruBefore>{});
  return kernels;
}
