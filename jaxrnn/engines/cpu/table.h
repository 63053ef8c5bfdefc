// The kernels of one instruction set.

template <template <Kind> class Run, class Arguments>
inline void dispatch(Kind kind, const Sizes& n, const Arguments& p, int threads) {
  switch (kind) {
    case Kind::kElmanTanh: return Run<Kind::kElmanTanh>(n, p, threads).run();
    case Kind::kElmanRelu: return Run<Kind::kElmanRelu>(n, p, threads).run();
    case Kind::kLstm: return Run<Kind::kLstm>(n, p, threads).run();
    case Kind::kGru: return Run<Kind::kGru>(n, p, threads).run();
    case Kind::kGruBefore: return Run<Kind::kGruBefore>(n, p, threads).run();
  }
}

inline Kernels table(const char* name) { return {dispatch<ForwardRun, Forward>, dispatch<BackwardRun, Backward>, name}; }
