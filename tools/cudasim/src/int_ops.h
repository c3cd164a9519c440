// What the instructions on integers share: handlers of an operation on every lane, and their decoding.
#pragma once
#include <type_traits>

#include "decoder.h"
#include "lanes.h"

namespace cudasim {

template <class T, class F>
void unary(Warp& w, const Inst& I) {
  map1<T, T>(w, I, F());
}
template <class T, class F>
void binary(Warp& w, const Inst& I) {
  map2<T, T, T>(w, I, F());
}
template <class T, class F>
void ternary(Warp& w, const Inst& I) {
  map3<T, T, T, T>(w, I, F());
}

// Picks the instantiation for a type; signedness matters only where S differs.
#define PICK8(T_, H, F)                                   \
  ((T_) == Ty::U16 || (T_) == Ty::B16   ? &H<uint16_t, F> \
   : (T_) == Ty::S16                    ? &H<int16_t, F>  \
   : (T_) == Ty::U32 || (T_) == Ty::B32 ? &H<uint32_t, F> \
   : (T_) == Ty::S32                    ? &H<int32_t, F>  \
   : (T_) == Ty::U64 || (T_) == Ty::B64 ? &H<uint64_t, F> \
   : (T_) == Ty::S64                    ? &H<int64_t, F>  \
                                        : (Handler) nullptr)

template <class T>
using Uns = std::make_unsigned_t<T>;

inline void emit2(Decoder& d, Handler h, Ty t, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t);
  d.emit(h, c, {d.dst(d.arg(0), t), a, b});
}
inline void emit3(Decoder& d, Handler h, Ty t, Ty tc, Ty td, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t), b = d.src(d.arg(2), t), e = d.src(d.arg(3), tc);
  d.emit(h, c, {d.dst(d.arg(0), td), a, b, e});
}
inline void emit1(Decoder& d, Handler h, Ty t, Ty td, Cls c = Cls::Int) {
  if (!h) d.fail("type not supported by '" + d.opcode() + "'");
  Operand a = d.src(d.arg(1), t);
  d.emit(h, c, {d.dst(d.arg(0), td), a});
}

}  // namespace cudasim
