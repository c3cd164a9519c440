// Lane loops. With all lanes active the loop body is unconditional so that the
// compiler vectorises it; otherwise inactive lanes keep their old value.
#pragma once
#include "machine.h"

namespace cudasim {

#define CUDASIM_LANES(EXPR)                                            \
  do {                                                                 \
    const uint32_t m_ = w.m;                                           \
    if (m_ == ~0u) {                                                   \
      _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) d[i] = (EXPR); \
    } else {                                                           \
      for (int i = 0; i < 32; i++)                                     \
        if (m_ >> i & 1) d[i] = (EXPR);                                \
    }                                                                  \
  } while (0)

template <class D, class A, class F>
inline void map1(Warp& w, const Inst& I, F f) {
  D* d = w.reg<D>(I.op[0]);
  const A* a = w.reg<A>(I.op[1]);
  CUDASIM_LANES(f(a[i]));
}
template <class D, class A, class B, class F>
inline void map2(Warp& w, const Inst& I, F f) {
  D* d = w.reg<D>(I.op[0]);
  const A* a = w.reg<A>(I.op[1]);
  const B* b = w.reg<B>(I.op[2]);
  CUDASIM_LANES(f(a[i], b[i]));
}
template <class D, class A, class B, class C, class F>
inline void map3(Warp& w, const Inst& I, F f) {
  D* d = w.reg<D>(I.op[0]);
  const A* a = w.reg<A>(I.op[1]);
  const B* b = w.reg<B>(I.op[2]);
  const C* c = w.reg<C>(I.op[3]);
  CUDASIM_LANES(f(a[i], b[i], c[i]));
}
// Packed pairs: a 32-bit slot is 64 halves in a row.
template <class F>
inline void mapHalves(Warp& w, const Inst& I, int perLane, F f) {
  uint16_t* d = w.reg<uint16_t>(I.op[0]);
  const int n = 32 * perLane, sh = perLane == 2;
  if (w.m == ~0u) {
    _Pragma("GCC ivdep") for (int i = 0; i < n; i++) d[i] = f(i);
  } else {
    for (int i = 0; i < n; i++)
      if (w.m >> (i >> sh) & 1) d[i] = f(i);
  }
}
template <class A, class B, class F>
inline uint32_t cmpMask(const A* a, const B* b, F f) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= f(a[i], b[i]) ? 1u << i : 0u;
  return r;
}
template <class F>
inline void eachLane(uint32_t m, F f) {
  for (; m; m &= m - 1) f(__builtin_ctz(m));
}

}  // namespace cudasim
