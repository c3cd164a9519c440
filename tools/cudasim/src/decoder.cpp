#include "decoder.h"

#include <cxxabi.h>

#include <algorithm>

#include "float_formats.h"
#include "memory.h"
#include "slot_allocator.h"
#include "tensor_core.h"

namespace cudasim {

namespace {
std::unordered_map<std::string, DecodeFn>& opcodeTable() {
  static auto* t = new std::unordered_map<std::string, DecodeFn>;
  return *t;
}
uint32_t alignUp(uint32_t v, uint32_t a) {
  return a ? (v + a - 1) / a * a : v;
}
}  // namespace

OpcodeEntry::OpcodeEntry(std::initializer_list<const char*> names, DecodeFn f) {
  for (auto* n : names) opcodeTable()[n] = f;
}
DecodeFn findOpcode(const std::string& name) {
  auto it = opcodeTable().find(name);
  return it == opcodeTable().end() ? nullptr : it->second;
}

const char* clsName(Cls c) {
  static const char* n[] = {"int",         "fp32",        "fp64",       "fp16",     "sfu",     "cvt",      "mov",
                            "ldst_global", "ldst_shared", "ldst_local", "ld_param", "atomic",  "ldmatrix", "mma",
                            "wgmma",       "async",       "branch",     "barrier",  "shuffle", "other"};
  return n[(int)c];
}

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

Decoder::Decoder(Module& module, const PtxFunction& entry) : module_(module), entry_(entry), k_(new Kernel) {
  k_->module = &module;
  k_->fn = &entry;
  k_->name = entry.name;
  int status = 0;
  char* d = abi::__cxa_demangle(entry.name.c_str(), nullptr, nullptr, &status);
  k_->pretty = status == 0 && d ? d : entry.name;
  free(d);
  k_->title = k_->pretty.size() <= 160 ? k_->pretty : k_->pretty.substr(0, 157) + "...";
}

std::string Decoder::opcode() const {
  std::string s;
  for (auto& x : p->op) s += (s.empty() ? "" : ".") + x;
  return s;
}
void Decoder::fail(const std::string& why) const {
  int line = p ? p->line : fn ? fn->line : 0;
  Fault f(kFaultInvalidPtx, format("%s: PTX line %d: %s\n    %s", k_->title.c_str(), line, why.c_str(),
                                   module_.ptx->lineText(line).c_str()));
  f.located = true;
  throw f;
}
bool Decoder::has(const char* m) const {
  for (size_t i = 1; i < p->op.size(); i++)
    if (p->op[i] == m) return true;
  return false;
}
Ty Decoder::type(size_t fromEnd) const {
  for (size_t i = p->op.size(); i-- > 1;) {
    Ty t = parseType(p->op[i]);
    if (t == Ty::Bad) continue;
    if (fromEnd-- == 0) return t;
  }
  return Ty::Bad;
}
void Decoder::allow(std::initializer_list<const char*> mods) const {
  for (size_t i = 1; i < p->op.size(); i++) {
    if (parseType(p->op[i]) != Ty::Bad) continue;
    bool ok = false;
    for (auto* m : mods) ok |= p->op[i] == m;
    if (!ok) fail("modifier '." + p->op[i] + "' of '" + opcode() + "' is not supported");
  }
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

static void readSpecial(Warp& w, const Inst& I);
namespace {
enum Special : uint8_t {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NWarpId,
  SmId,
  NSmId,
  GridId,
  LaneEq,
  LaneLt,
  LaneLe,
  LaneGt,
  LaneGe,
  Clock,
  ClockHi,
  Clock64,
  GlobalTimer,
  GlobalTimerLo,
  GlobalTimerHi,
  DynSmem,
  TotalSmem,
  AggrSmem,
  ClusterIdX,
  ClusterIdY,
  ClusterIdZ,
  NClusterIdX,
  NClusterIdY,
  NClusterIdZ,
  ClusterCtaX,
  ClusterCtaY,
  ClusterCtaZ,
  ClusterNctaX,
  ClusterNctaY,
  ClusterNctaZ,
  ClusterCtaRank,
  ClusterNctaRank,
  IsExplicitCluster,
  Graph,
  Env
};
struct SpecialName {
  const char* name;
  Special s;
  int width;
};
const SpecialName kSpecials[] = {
    {"%tid.x", TidX, 4},
    {"%tid.y", TidY, 4},
    {"%tid.z", TidZ, 4},
    {"%ntid.x", NtidX, 4},
    {"%ntid.y", NtidY, 4},
    {"%ntid.z", NtidZ, 4},
    {"%ctaid.x", CtaidX, 4},
    {"%ctaid.y", CtaidY, 4},
    {"%ctaid.z", CtaidZ, 4},
    {"%nctaid.x", NctaidX, 4},
    {"%nctaid.y", NctaidY, 4},
    {"%nctaid.z", NctaidZ, 4},
    {"%laneid", LaneId, 4},
    {"%warpid", WarpId, 4},
    {"%nwarpid", NWarpId, 4},
    {"%smid", SmId, 4},
    {"%nsmid", NSmId, 4},
    {"%gridid", GridId, 8},
    {"%lanemask_eq", LaneEq, 4},
    {"%lanemask_lt", LaneLt, 4},
    {"%lanemask_le", LaneLe, 4},
    {"%lanemask_gt", LaneGt, 4},
    {"%lanemask_ge", LaneGe, 4},
    {"%clock", Clock, 4},
    {"%clock_hi", ClockHi, 4},
    {"%clock64", Clock64, 8},
    {"%globaltimer", GlobalTimer, 8},
    {"%globaltimer_lo", GlobalTimerLo, 4},
    {"%globaltimer_hi", GlobalTimerHi, 4},
    {"%dynamic_smem_size", DynSmem, 4},
    {"%total_smem_size", TotalSmem, 4},
    {"%aggr_smem_size", AggrSmem, 4},
    {"%clusterid.x", ClusterIdX, 4},
    {"%clusterid.y", ClusterIdY, 4},
    {"%clusterid.z", ClusterIdZ, 4},
    {"%nclusterid.x", NClusterIdX, 4},
    {"%nclusterid.y", NClusterIdY, 4},
    {"%nclusterid.z", NClusterIdZ, 4},
    {"%cluster_ctaid.x", ClusterCtaX, 4},
    {"%cluster_ctaid.y", ClusterCtaY, 4},
    {"%cluster_ctaid.z", ClusterCtaZ, 4},
    {"%cluster_nctaid.x", ClusterNctaX, 4},
    {"%cluster_nctaid.y", ClusterNctaY, 4},
    {"%cluster_nctaid.z", ClusterNctaZ, 4},
    {"%cluster_ctarank", ClusterCtaRank, 4},
    {"%cluster_nctarank", ClusterNctaRank, 4},
    {"%is_explicit_cluster", IsExplicitCluster, 0},
    {"%current_graph_exec", Graph, 8},
    {"%reserved_smem_offset_begin", Env, 4},
};
}  // namespace

// Special registers (PTX ISA, "Special Registers").
static void readSpecial(Warp& w, const Inst& I) {
  const Block& b = *w.block;
  const Cluster& c = *b.cluster;
  const LaunchConfig& g = w.launch->cfg;
  uint64_t v = 0;
  bool perLane = false;
  uint64_t lane[32];
  auto each = [&](auto f) {
    perLane = true;
    for (int i = 0; i < 32; i++) lane[i] = f(i);
  };
  auto thread = [&](int i) { return (uint32_t)(w.id * 32 + i); };
  uint64_t now = w.launch->progress * 16 + w.issued * 4;
  switch ((Special)I.sub) {
    case TidX: each([&](int i) { return thread(i) % g.block[0]; }); break;
    case TidY: each([&](int i) { return thread(i) / g.block[0] % g.block[1]; }); break;
    case TidZ: each([&](int i) { return thread(i) / (g.block[0] * g.block[1]); }); break;
    case NtidX: v = g.block[0]; break;
    case NtidY: v = g.block[1]; break;
    case NtidZ: v = g.block[2]; break;
    case CtaidX: v = b.idx[0]; break;
    case CtaidY: v = b.idx[1]; break;
    case CtaidZ: v = b.idx[2]; break;
    case NctaidX: v = g.grid[0]; break;
    case NctaidY: v = g.grid[1]; break;
    case NctaidZ: v = g.grid[2]; break;
    case LaneId: each([&](int i) { return i; }); break;
    case WarpId: v = w.id; break;
    case NWarpId: v = 64; break;
    case SmId: v = b.linear % 132; break;
    case NSmId: v = 132; break;
    case GridId: v = w.launch->id; break;
    case LaneEq: each([&](int i) { return 1u << i; }); break;
    case LaneLt: each([&](int i) { return (1u << i) - 1; }); break;
    case LaneLe: each([&](int i) { return (2u << i) - 1; }); break;
    case LaneGt: each([&](int i) { return ~((2u << i) - 1); }); break;
    case LaneGe: each([&](int i) { return ~((1u << i) - 1); }); break;
    case Clock:
    case Clock64: v = now; break;
    case ClockHi: v = now >> 32; break;
    case GlobalTimer:
    case GlobalTimerLo: v = now; break;
    case GlobalTimerHi: v = now >> 32; break;
    case DynSmem: v = g.dynamicShared; break;
    case TotalSmem:
    case AggrSmem: v = b.sharedEnd - kSharedBase; break;
    case ClusterIdX: v = c.idx[0]; break;
    case ClusterIdY: v = c.idx[1]; break;
    case ClusterIdZ: v = c.idx[2]; break;
    case NClusterIdX: v = g.grid[0] / c.dim[0]; break;
    case NClusterIdY: v = g.grid[1] / c.dim[1]; break;
    case NClusterIdZ: v = g.grid[2] / c.dim[2]; break;
    case ClusterCtaX: v = b.idx[0] % c.dim[0]; break;
    case ClusterCtaY: v = b.idx[1] % c.dim[1]; break;
    case ClusterCtaZ: v = b.idx[2] % c.dim[2]; break;
    case ClusterNctaX: v = c.dim[0]; break;
    case ClusterNctaY: v = c.dim[1]; break;
    case ClusterNctaZ: v = c.dim[2]; break;
    case ClusterCtaRank: v = b.rank; break;
    case ClusterNctaRank: v = c.blocks.size(); break;
    case IsExplicitCluster: w.setPred(I.op[0], c.blocks.size() > 1 ? ~0u : 0); return;
    case Graph:
    case Env: v = 0; break;
  }
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    uint64_t x = perLane ? lane[i] : v;
    if (I.op[0].width == 8)
      w.reg<uint64_t>(I.op[0])[i] = x;
    else if (I.op[0].width == 2)
      w.reg<uint16_t>(I.op[0])[i] = (uint16_t)x;
    else
      w.reg<uint32_t>(I.op[0])[i] = (uint32_t)x;
  }
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
      for (auto& s : kSpecials) {
        if (o.name != s.name) continue;
        Operand d = temp(s.width);
        d.def = true;
        emit(readSpecial, Cls::Mov, {d}).sub = s.s;
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

Inst& Decoder::emit(Handler h, Cls c) {
  k_->code.emplace_back();
  Inst& in = k_->code.back();
  in.fn = h;
  in.cls = c;
  in.line = p ? p->line : 0;
  if (p && p->guarded) {
    in.guard = (uint32_t)(regBase_[fn] + p->guard.reg);  // patched to an offset by assignSlots
    in.guardXor = p->guard.negated ? ~0u : 0;
    if (regWidth_[in.guard] != 0) fail("the guard is not a predicate");
  }
  return in;
}
Inst& Decoder::emit(Handler h, Cls c, std::initializer_list<Operand> ops) {
  Inst& in = emit(h, c);
  if (ops.size() > kMaxInlineOps) fail("internal: too many operands");
  for (auto& o : ops) in.op[in.nops++] = o;
  return in;
}
void Decoder::setExt(Inst& in, std::vector<Operand> ops) {
  k_->extStore.emplace_back(new std::vector<Operand>(std::move(ops)));
  in.ext = k_->extStore.back()->data();
  in.next = (uint16_t)k_->extStore.back()->size();
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
const PtxFunction* Decoder::findFunction(const std::string& name) const {
  std::string n = name;
  auto a = module_.ptx->aliases.find(n);
  if (a != module_.ptx->aliases.end()) n = a->second;
  auto it = module_.ptx->functionIndex.find(n);
  return it == module_.ptx->functionIndex.end() ? nullptr : it->second;
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

int Decoder::labelIndex(const PtxOperand& o) const {
  int l = fn->findLabel(o.scope, o.name);
  if (l < 0) fail("undefined label '" + o.name + "'");
  return l;
}

Operand Decoder::linkOf(const PtxFunction* f) {
  auto it = link_.find(f);
  if (it != link_.end()) return it->second;
  Operand o = temp(4);
  pinned_[o.reg] = true;
  link_[f] = o;
  return o;
}

// Depth-first over calls: callees are linked before their callers.
void Decoder::collect(const PtxFunction* f) {
  if (!f->error.empty()) throw Fault(kFaultInvalidPtx, f->error);
  int& s = state_[f];
  if (s == 2) return;
  if (s == 1) {
    fn = f;
    p = nullptr;
    fail("recursive function '" + f->name + "' is not supported");
  }
  s = 1;
  auto visit = [&](const PtxOperand& o, auto&& self) -> void {
    if (o.kind == PtxOperand::Symbol) {
      auto v = module_.ptx->varIndex.find(o.name);
      if (v != module_.ptx->varIndex.end()) {
        const PtxVar* var = &module_.ptx->vars[v->second];
        if (var->space == Space::Shared && !sharedGlobal_.count(o.name)) {
          sharedGlobal_[o.name] = 0;
          sharedOrder_.push_back({var, {nullptr, 0}});
        }
      } else if (const PtxFunction* callee = findFunction(o.name)) {
        if (callee->hasBody && !callee->isEntry) collect(callee);
      }
    }
    if (o.kind == PtxOperand::Var && f->vars[o.reg].space == Space::Shared && !sharedLocal_.count({f, o.reg})) {
      sharedLocal_[{f, o.reg}] = 0;
      sharedOrder_.push_back({&f->vars[o.reg], {f, o.reg}});
    }
    for (auto& x : o.list) self(x, self);
  };
  for (auto& in : f->insts) {
    for (auto& a : in.args) visit(a, visit);
    if (in.op[0] == "call") {
      size_t i = !in.args.empty() && in.args[0].kind == PtxOperand::Group ? 1 : 0;
      if (i < in.args.size() && in.args[i].kind == PtxOperand::Reg)  // indirect: anything may be called
        for (auto& g : module_.ptx->functions)
          if (g->hasBody && !g->isEntry && g->error.empty() && state_[g.get()] != 1) collect(g.get());
    }
  }
  state_[f] = 2;
  linked.push_back(f);
}

void Decoder::layoutVariables() {
  uint32_t cur = kSharedBase;
  for (auto& [v, at] : sharedOrder_) {
    if (v->unsized) continue;
    cur = alignUp(cur, v->align);
    (at.first ? sharedLocal_[at] : sharedGlobal_[v->name]) = cur;
    cur += (uint32_t)v->size;
  }
  uint32_t align = 16;
  for (auto& [v, at] : sharedOrder_)
    if (v->unsized) align = std::max<uint32_t>(align, v->align);
  k_->staticShared = cur;
  k_->dynamicAlign = align;
  uint32_t dyn = alignUp(cur, align);
  for (auto& [v, at] : sharedOrder_)
    if (v->unsized) (at.first ? sharedLocal_[at] : sharedGlobal_[v->name]) = dyn;

  uint32_t local = kLocalBase;
  for (auto* f : linked)
    for (size_t i = 0; i < f->vars.size(); i++) {
      const PtxVar& v = f->vars[i];
      bool kernelParam = f->isEntry && std::find(f->params.begin(), f->params.end(), (int)i) != f->params.end();
      if (kernelParam || (v.space != Space::Local && v.space != Space::Param)) continue;
      local = alignUp(local, std::max(v.align, 8));
      localVar_[{f, (int)i}] = local;
      local += (uint32_t)std::max<uint64_t>(v.size, 8);
    }
  k_->localBytes = alignUp(local, 16);

  uint32_t off = 0;
  for (int i : entry_.params) {
    const PtxVar& v = entry_.vars[i];
    off = alignUp(off, v.align);
    k_->params.push_back({off, (uint32_t)v.size});
    off += (uint32_t)v.size;
  }
  k_->paramBytes = off;
  k_->paramBuffer.assign(off + 16 + 256, 0);
  k_->paramData = (uint8_t*)(((uintptr_t)k_->paramBuffer.data() + 255) & ~(uintptr_t)255);  // tensor maps need 64
}

void Decoder::decodeFunction(const PtxFunction* f) {
  fn = f;
  fnBegin_.push_back((uint32_t)here());
  entryPc_[f] = (uint32_t)here();
  std::vector<uint32_t> pcOf(f->insts.size() + 1);
  for (size_t i = 0; i < f->insts.size(); i++) {
    p = &f->insts[i];
    pcOf[i] = (uint32_t)here();
    DecodeFn d = findOpcode(p->op[0]);
    if (!d) fail("unknown instruction '" + opcode() + "'");
    d(*this);
  }
  pcOf[f->insts.size()] = (uint32_t)here();
  for (auto& x : fixups_)
    if (x.fn == f) k_->code[x.inst].target = (int32_t)pcOf[x.label];
  for (auto& x : tableFixups_)
    if (x.fn == f)
      for (int l : x.labels) x.table->push_back(pcOf[l]);
  p = nullptr;
}

std::unique_ptr<Kernel> Decoder::run() {
  fn = &entry_;
  collect(&entry_);
  layoutVariables();
  for (auto* f : linked) {
    regBase_[f] = (int)regWidth_.size();
    for (auto& r : f->regs) {
      regWidth_.push_back(r.type == Ty::Pred ? 0 : (uint8_t)std::max(tySize(r.type), 2));
      pinned_.push_back(false);
    }
  }
  for (auto* f : linked) decodeFunction(f);
  k_->entryPc = entryPc_.at(&entry_);
  for (auto& c : callFixups_) k_->code[c.inst].target = (int32_t)entryPc_.at(c.fn);
  if (!asyncRegs.empty()) guardAsyncRegisters(*k_, asyncRegs);
  SlotAllocator(*k_, regWidth_, pinned_, fnBegin_).run();
  return std::move(k_);
}

std::unique_ptr<Kernel> decodeKernel(Module& module, const PtxFunction& fn) {
  return Decoder(module, fn).run();
}

}  // namespace cudasim
