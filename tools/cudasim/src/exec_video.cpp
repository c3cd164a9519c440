// SIMD video instructions on 2 halves or 4 bytes (PTX ISA, "Video
// Instructions"), without lane masks and selectors.
#include <algorithm>
#include <cstdlib>

#include "decoder.h"
#include "lanes.h"

namespace cudasim {
namespace {

enum Op : uint8_t { VAdd, VSub, VAvrg, VAbsDiff, VMin, VMax };

// op: d, a, b, c. sub: operation; sub2: bits per element; sub3: signed d, a, b; sub4: saturate, accumulate.
void simdH(Warp& w, const Inst& I) {
  const int bits = I.sub2;
  const uint32_t mask = bits == 8 ? 0xffu : 0xffffu;
  const bool sd = I.sub3 & 1, sa = I.sub3 & 2, sb = I.sub3 & 4;
  auto element = [&](uint32_t v, int k, bool sgn) {
    v = v >> k & mask;
    return sgn && v >> (bits - 1) ? (int)v - (int)mask - 1 : (int)v;
  };
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, I, [&](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t packed = 0, sum = c;
    for (int k = 0; k < 32; k += bits) {
      const int x = element(a, k, sa), y = element(b, k, sb);
      int r = 0;
      switch ((Op)I.sub) {
        case VAdd: r = x + y; break;
        case VSub: r = x - y; break;
        case VAvrg: r = (x + y + (x + y >= 0)) >> 1; break;
        case VAbsDiff: r = std::abs(x - y); break;
        case VMin: r = std::min(x, y); break;
        case VMax: r = std::max(x, y); break;
      }
      if (I.sub4 & 1) r = sd ? std::clamp(r, -(int)(mask / 2) - 1, (int)(mask / 2)) : std::clamp(r, 0, (int)mask);
      packed |= ((uint32_t)r & mask) << k;
      sum += (uint32_t)r;
    }
    return I.sub4 & 2 ? sum : packed;
  });
}

OpcodeEntry eVideo({"vadd2", "vadd4", "vsub2", "vsub4", "vavrg2", "vavrg4", "vabsdiff2", "vabsdiff4", "vmin2", "vmin4",
                    "vmax2", "vmax4"},
                   [](Decoder& d) {
                     d.allow({"sat", "add"});
                     const std::string name = d.p->op[0], root = name.substr(0, name.size() - 1);
                     Operand a = d.src(d.arg(1), Ty::B32), b = d.src(d.arg(2), Ty::B32), c = d.src(d.arg(3), Ty::B32);
                     Inst& in = d.emit(simdH, Cls::Int, {d.dst(d.arg(0), Ty::B32), a, b, c});
                     in.sub = root == "vadd"       ? VAdd
                              : root == "vsub"     ? VSub
                              : root == "vavrg"    ? VAvrg
                              : root == "vabsdiff" ? VAbsDiff
                              : root == "vmin"     ? VMin
                                                   : VMax;
                     in.sub2 = name.back() == '2' ? 16 : 8;
                     in.sub3 = (tyIsSigned(d.type(2)) ? 1 : 0) | (tyIsSigned(d.type(1)) ? 2 : 0) |
                               (tyIsSigned(d.type(0)) ? 4 : 0);
                     in.sub4 = (d.has("sat") ? 1 : 0) | (d.has("add") ? 2 : 0);
                   });

}  // namespace
}  // namespace cudasim
