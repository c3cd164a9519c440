// Instructions and their operands.
#include "ptx_parser.h"

namespace cudasim {

namespace {
std::vector<std::string> splitDots(const std::string& s) {
  std::vector<std::string> out;
  size_t b = 0;
  while (b <= s.size()) {
    size_t e = s.find('.', b);
    if (e == std::string::npos) e = s.size();
    if (e > b) out.push_back(s.substr(b, e - b));
    b = e + 1;
  }
  return out;
}

}  // namespace

void PtxParser::instruction() {
  PtxInst in;
  in.line = tok_.line;
  if (accept("@")) {
    bool neg = accept("!");
    in.guarded = true;
    in.guard = operand();
    in.guard.negated = neg;
    if (in.guard.kind != PtxOperand::Reg) fail("the guard is not a predicate register");
  }
  in.line = tok_.line;
  in.op = splitDots(ident());
  while (!accept(";")) {
    in.args.push_back(operand());
    if (!accept(",") && !is(";")) fail("expected ',' or ';' before '" + tok_.text + "'");
  }
  fn_->insts.push_back(std::move(in));
}

PtxOperand PtxParser::operand() {
  PtxOperand o = simple();
  if (accept("|")) {
    PtxOperand pair;
    pair.kind = PtxOperand::Vector;
    pair.pipe = true;
    pair.list.push_back(std::move(o));
    pair.list.push_back(simple());
    return pair;
  }
  return o;
}

PtxOperand PtxParser::simple() {
  PtxOperand o;
  o.scope = scopes_.back().id;
  if (accept("!")) {
    o = simple();
    o.negated = !o.negated;
    return o;
  }
  if (accept("{")) {
    o.kind = PtxOperand::Vector;
    while (!accept("}")) {
      o.list.push_back(operand());
      accept(",");
    }
    return o;
  }
  if (accept("(")) {
    o.kind = PtxOperand::Group;
    while (!accept(")")) {
      o.list.push_back(operand());
      accept(",");
    }
    return o;
  }
  if (accept("[")) {
    o.kind = PtxOperand::Address;
    while (!accept("]")) {
      PtxOperand e = operand();
      if (o.list.empty()) {
        o.offset = e.kind == PtxOperand::Imm ? 0 : e.offset;
      }
      o.list.push_back(std::move(e));
      if (accept("+"))
        o.offset += constant();
      else if (is("-"))
        o.offset += constant();
      accept(",");
    }
    return o;
  }
  bool neg = accept("-");
  if (neg && accept("-")) neg = false;
  if (accept("~")) {
    o.kind = PtxOperand::Imm;
    o.bits = ~(uint64_t)constant();
    return o;
  }
  if (tok_.kind == Token::Int) {
    o.kind = PtxOperand::Imm;
    o.bits = neg ? 0 - tok_.bits : tok_.bits;
    advance();
    return o;
  }
  if (tok_.kind == Token::Float) {
    o.kind = PtxOperand::Float;
    o.bits = tok_.bits;
    o.f32Literal = tok_.f32;
    if (neg) o.bits ^= tok_.f32 ? 0x80000000ull : 0x8000000000000000ull;
    advance();
    return o;
  }
  std::string n = ident();
  if (n == "_") {
    o.kind = PtxOperand::Sink;
    return o;
  }
  if (neg) fail("cannot negate '" + n + "'");
  int r = findReg(n);
  if (r >= 0) {
    o.kind = PtxOperand::Reg;
    o.reg = r;
    o.name = n;
    plusOffset(o);
    return o;
  }
  int v = findVar(n);
  if (v >= 0) {
    o.kind = PtxOperand::Var;
    o.reg = v;
    o.name = n;
    plusOffset(o);
    return o;
  }
  if (n == "WARP_SZ") {
    o.kind = PtxOperand::Imm;
    o.bits = 32;
    return o;
  }
  if (n[0] == '%') {
    o.kind = PtxOperand::Special;
    o.name = n;
    return o;
  }
  o.kind = PtxOperand::Symbol;
  o.name = n;
  plusOffset(o);
  return o;
}

void PtxParser::plusOffset(PtxOperand& o) {
  while (is("+") || is("-")) {
    if (accept("+"))
      o.offset += constant();
    else
      o.offset += constant();
  }
}

}  // namespace cudasim
