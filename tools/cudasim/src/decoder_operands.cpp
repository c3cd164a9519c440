// The operands of instructions: registers, constants, special registers and addresses.
#include <algorithm>

#include "decoder.h"
#include "float_formats.h"
#include "memory.h"
#include "special_registers.h"

namespace cudasim {

uint64_t immediateBits(const PtxOperand& o, Ty t) {
  if (o.kind == PtxOperand::Imm) {
    if (t == Ty::F32) {
      float f = (float)(int64_t)o.bits;
      return bitsOf(f);
    }
    if (t == Ty::F64) {
      double d = (double)(int64_t)o.bits;
      return bitsOf(d);
    }
    return o.bits;
  }
  double d;
  if (o.f32Literal) {
    float f = floatOf((uint32_t)o.bits);
    if (t == Ty::F64) {
      d = f;
      return bitsOf(d);
    }
    if (t == Ty::F16) return f32ToF16(f);
    if (t == Ty::BF16) return f32ToBf16(f);
    return o.bits;
  }
  d = doubleOf(o.bits);
  if (t == Ty::F32 || t == Ty::TF32 || (tySize(t) == 4)) return bitsOf((float)d);
  if (t == Ty::F16) return f32ToF16((float)d);
  if (t == Ty::BF16) return f32ToBf16((float)d);
  return o.bits;
}

Operand Decoder::constant(uint64_t bits, int width) {
  if (width == 0) bits = bits & 1 ? 0xffffffffu : 0;
  auto key = std::make_pair(bits, width);
  auto it = constIndex_.find(key);
  Operand o;
  o.file = 1;
  o.width = (uint8_t)width;
  o.present = true;
  if (it != constIndex_.end()) {
    o.off = it->second;
    return o;
  }
  uint32_t off = alignUp((uint32_t)k_->consts.size(), 64);
  uint32_t bytes = width == 0 ? 4 : 32 * width;
  k_->consts.resize(off + bytes);
  for (uint32_t i = 0; i < bytes; i += width ? width : 4)
    memcpy(&k_->consts[off + i], &bits, width ? std::min(width, 8) : 4);
  constIndex_[key] = off;
  o.off = off;
  return o;
}
Operand Decoder::temp(int width) {
  Operand o;
  o.reg = (int)regWidth_.size();
  o.width = (uint8_t)width;
  o.present = true;
  regWidth_.push_back((uint8_t)width);
  pinned_.push_back(false);
  return o;
}

Operand Decoder::src(const PtxOperand& o, Ty t) {
  int width = t == Ty::Pred ? 0 : std::max(tySize(t), 2);
  switch (o.kind) {
    case PtxOperand::Reg: {
      Operand r;
      r.reg = regBase_[fn] + o.reg;
      r.width = regWidth_[r.reg];
      r.present = true;
      r.neg = o.negated;
      if ((t == Ty::Pred) != (r.width == 0)) fail("operand '" + o.name + "' has the wrong kind of register");
      return r;
    }
    case PtxOperand::Imm:
    case PtxOperand::Float: {
      Operand r = constant(immediateBits(o, t), width);
      r.neg = o.negated;
      return r;
    }
    case PtxOperand::Special: {
      if (o.name == "%pt" || o.name == "%PT") return constant(1, 0);
      if (const SpecialRegister* s = findSpecial(o.name)) {
        Operand d = temp(s->width);
        d.def = true;
        emit(readSpecial, Cls::Mov, {d}).sub = s->id;
        d.def = false;
        return d;
      }
      if (o.name == "%envreg1") return constant((uint64_t)gridWorkspace() >> 32, 4);
      if (o.name == "%envreg2") return constant((uint32_t)(uint64_t)gridWorkspace(), 4);
      if (o.name.rfind("%envreg", 0) == 0 || o.name.rfind("%pm", 0) == 0) return constant(0, width);
      fail("unknown special register '" + o.name + "'");
    }
    case PtxOperand::Var:
    case PtxOperand::Symbol: {
      Space sp;
      uint64_t a = symbolAddress(o, &sp);
      return constant(a, width);
    }
    default: fail("unexpected operand");
  }
}
Operand Decoder::dst(const PtxOperand& o, Ty t) {
  if (o.kind == PtxOperand::Sink) {
    Operand r = temp(t == Ty::Pred ? 0 : std::max(tySize(t), 2));
    r.def = true;
    return r;
  }
  if (o.kind != PtxOperand::Reg) fail("the destination is not a register");
  Operand r;
  r.reg = regBase_[fn] + o.reg;
  r.width = regWidth_[r.reg];
  r.def = true;
  r.present = true;
  if ((t == Ty::Pred) != (r.width == 0)) fail("destination '" + o.name + "' has the wrong kind of register");
  return r;
}
Operand Decoder::predSrc(const PtxOperand& o) {
  return src(o, Ty::Pred);
}
Operand Decoder::predDst(const PtxOperand& o) {
  return dst(o, Ty::Pred);
}

const PtxVar* Decoder::entryParam(const PtxOperand& o) const {
  if (o.kind != PtxOperand::Var || !fn->isEntry) return nullptr;
  const PtxVar& v = fn->vars[o.reg];
  if (v.space != Space::Param) return nullptr;
  for (int x : fn->params)
    if (x == o.reg) return &v;
  return nullptr;
}
uint32_t Decoder::paramOffset(const PtxFunction* f, int var) {
  for (size_t i = 0; i < f->params.size(); i++)
    if (f->params[i] == var) return k_->params[i].offset;
  return 0;
}
uint64_t Decoder::symbolAddress(const PtxOperand& o, Space* space) {
  if (space) *space = Space::None;
  if (o.kind == PtxOperand::Var) {
    const PtxVar& v = fn->vars[o.reg];
    if (space) *space = v.space;
    if (v.space == Space::Shared) return sharedLocal_.at({fn, o.reg}) + o.offset;
    if (v.space == Space::Param && entryParam(o)) return paramOffset(fn, o.reg) + o.offset;
    if (v.space == Space::Local || v.space == Space::Param) return localVar_.at({fn, o.reg}) + o.offset;
    fail("variables of this state space are not supported inside functions");
  }
  auto sh = sharedGlobal_.find(o.name);
  if (sh != sharedGlobal_.end()) {
    if (space) *space = Space::Shared;
    return sh->second + o.offset;
  }
  auto g = module_.globals.find(o.name);
  if (g != module_.globals.end()) {
    const PtxVar& v = module_.ptx->vars[module_.ptx->varIndex.at(o.name)];
    if (space) *space = v.space;
    if (v.space == Space::Const) return (uint64_t)(g->second.first - module_.constBase) + o.offset;
    return (uint64_t)g->second.first + o.offset;
  }
  if (const PtxFunction* f = findFunction(o.name)) {
    for (size_t i = 0; i < module_.ptx->functions.size(); i++)
      if (module_.ptx->functions[i].get() == f) return kFunctionWindow | (i + 1);
  }
  fail("undefined symbol '" + o.name + "'");
}

Operand Decoder::addressBase(const PtxOperand& o, int64_t& disp, Space space) {
  if (o.kind != PtxOperand::Address || o.list.empty()) fail("expected an address operand");
  const PtxOperand& b = o.list[0];
  disp = o.offset;
  if (b.kind == PtxOperand::Reg) {
    Operand r = src(b, Ty::B64);
    if (r.width < 4) fail("an address register must have 32 or 64 bits");
    return r;
  }
  if (b.kind == PtxOperand::Imm) {
    return constant(b.bits, 8);
  }
  PtxOperand s = b;
  s.offset = 0;
  Space sp;
  uint64_t a = symbolAddress(s, &sp);
  if (space == Space::None) {  // generic access naming a variable of a window
    if (sp == Space::Shared) a |= kSharedWindow;
    if (sp == Space::Local) a |= kLocalWindow;
    if (sp == Space::Const) a += (uint64_t)module_.constBase;
  }
  return constant(a, 8);
}

}  // namespace cudasim
