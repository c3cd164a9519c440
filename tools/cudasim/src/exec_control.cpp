// Control flow: call, ret, exit, bra, brx, and the functions that the compiler
// expects the system to provide (PTX ISA, "Control Flow Instructions").
#include "decoder.h"
#include "lanes.h"
#include "memory.h"
#include "module.h"

namespace cudasim {
namespace {

const char* const kBuiltins[] = {"vprintf", "__assertfail", "malloc", "free"};
bool isBuiltin(const std::string& n) {
  for (auto* b : kBuiltins)
    if (n == b) return true;
  return false;
}

void returnHandler(Warp& w, const Inst& I) {
  const uint32_t* link = w.reg<uint32_t>(I.op[0]);
  uint32_t to = link[w.firstLane()], same = 0;
  for (int i = 0; i < 32; i++)
    if ((w.m >> i & 1) && link[i] == to) same |= 1u << i;
  if (same == w.active) {
    w.npc = to;
    return;
  }
  w.ev = Event::Diverge;
  w.splitMask = same;
  w.splitPc = to;
  if (same != w.m) w.npc = w.pc;  // the other lanes execute the return again
}

void exitHandler(Warp& w, const Inst&) {
  w.ev = Event::Exit;
}

struct CopyList {
  struct Copy {
    uint32_t from, to, bytes;
  };
  std::vector<Copy> v;
};

void copyLocal(Warp& w, const Inst& I) {
  auto* c = (const CopyList*)I.aux;
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    uint8_t* l = w.local + (size_t)i * w.localBytes;
    for (auto& x : c->v) memcpy(l + x.to, l + x.from, x.bytes);
  }
}

void jumpTo(Warp& w, uint32_t target) {
  if (w.m == w.active) {
    w.npc = target;
    return;
  }
  w.ev = Event::Diverge;
  w.splitMask = w.m;
  w.splitPc = target;
}

void callHandler(Warp& w, const Inst& I) {
  uint32_t* link = w.reg<uint32_t>(I.op[0]);
  for (int i = 0; i < 32; i++)
    if (w.m >> i & 1) link[i] = w.pc + 1;
  jumpTo(w, (uint32_t)I.target);
}

void branchHandler(Warp& w, const Inst& I) {
  jumpTo(w, (uint32_t)I.target);
}

// Indirect calls: lanes are taken one target at a time.
struct IndirectTarget {
  uint32_t pc;
  int link;
  std::vector<CopyList::Copy> in, out;
};
struct IndirectCall {
  std::map<uint64_t, IndirectTarget> targets;
};

void indirectCall(Warp& w, const Inst& I) {
  auto* c = (const IndirectCall*)I.aux;
  const uint64_t* addr = w.reg<uint64_t>(I.op[0]);
  uint64_t t = addr[w.firstLane()];
  auto it = c->targets.find(t);
  if (it == c->targets.end())
    throw Fault(kFaultIllegalInstruction, format("call of 0x%llx, which is no function", (unsigned long long)t),
                w.firstLane());
  uint32_t same = 0;
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1) || addr[i] != t) continue;
    same |= 1u << i;
    uint8_t* l = w.local + (size_t)i * w.localBytes;
    for (auto& x : it->second.in) memcpy(l + x.to, l + x.from, x.bytes);
    w.reg<uint32_t>(I.ext[it->second.link])[i] = w.pc + 1;
  }
  if (same == w.active) {
    w.npc = it->second.pc;
    return;
  }
  w.ev = Event::Diverge;
  w.splitMask = same;
  w.splitPc = it->second.pc;
  if (same != w.m) w.npc = w.pc;
}
void indirectReturn(Warp& w, const Inst& I) {
  auto* c = (const IndirectCall*)I.aux;
  const uint64_t* addr = w.reg<uint64_t>(I.op[0]);
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    auto it = c->targets.find(addr[i]);
    if (it == c->targets.end()) continue;
    uint8_t* l = w.local + (size_t)i * w.localBytes;
    for (auto& x : it->second.out) memcpy(l + x.to, l + x.from, x.bytes);
  }
}

void builtinPrintf(Warp& w, const Inst& I) {
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    uint8_t* l = w.local + (size_t)i * w.localBytes;
    uint64_t fmt, args;
    memcpy(&fmt, l + (uint32_t)I.imm, 8);
    memcpy(&args, l + (I.imm >> 32), 8);
    int n = devicePrintf(w, i, fmt, args);
    if (I.sub) memcpy(l + I.imm2, &n, 4);
  }
}
void builtinAssert(Warp& w, const Inst& I) {
  int lane = w.firstLane();
  uint8_t* l = w.local + (size_t)lane * w.localBytes;
  uint64_t msg, file, func;
  uint32_t line;
  auto* c = (const CopyList*)I.aux;
  memcpy(&msg, l + c->v[0].from, 8);
  memcpy(&file, l + c->v[1].from, 8);
  memcpy(&line, l + c->v[2].from, 4);
  memcpy(&func, l + c->v[3].from, 8);
  auto str = [&](uint64_t a) {
    return std::string((const char*)resolveOne(w, Space::None, a, 1, 1, Access::Read, lane));
  };
  throw Fault(kFaultAssert,
              format("%s:%u: %s: Assertion `%s` failed", str(file).c_str(), line, str(func).c_str(), str(msg).c_str()),
              lane);
}
void builtinMalloc(Warp& w, const Inst& I) {
  for (int i = 0; i < 32; i++) {
    if (!(w.m >> i & 1)) continue;
    uint8_t* l = w.local + (size_t)i * w.localBytes;
    uint64_t v;
    memcpy(&v, l + I.imm, 8);
    if (I.sub == 0) {
      uint64_t r = (uint64_t)deviceAlloc(v);
      memcpy(l + I.imm2, &r, 8);
    } else if (v) {
      deviceFree((void*)v);
    }
  }
}

void decodeCall(Decoder& d) {
  d.allow({"uni"});
  size_t i = 0;
  std::vector<PtxOperand> rets, args;
  if (d.arg(0).kind == PtxOperand::Group) {
    rets = d.arg(0).list;
    i = 1;
  }
  const PtxOperand& target = d.arg(i++);
  if (i < d.nargs() && d.arg(i).kind == PtxOperand::Group) args = d.arg(i++).list;
  auto local = [&](const PtxOperand& o) {
    if (o.kind != PtxOperand::Var) d.fail("call arguments must be .param variables");
    return d.localOf(d.fn, o.reg);
  };
  auto newList = [&] {
    auto c = std::make_shared<CopyList>();
    d.kernel().auxStore.push_back(c);
    return c.get();
  };
  if (target.kind == PtxOperand::Reg) {
    auto c = std::make_shared<IndirectCall>();
    d.kernel().auxStore.push_back(c);
    auto& fns = d.module().ptx->functions;
    std::vector<Operand> links;
    for (size_t f = 0; f < fns.size(); f++) {
      const PtxFunction* g = fns[f].get();
      auto e = d.entries().find(g);
      if (e == d.entries().end() || g->params.size() != args.size() || g->rets.size() != rets.size()) continue;
      IndirectTarget t;
      t.pc = e->second;
      t.link = (int)links.size();
      links.push_back(d.linkOf(g));
      bool same = true;
      for (size_t a = 0; a < args.size(); a++) {
        same &= g->vars[g->params[a]].size == d.fn->vars[args[a].reg].size;
        t.in.push_back({local(args[a]), d.localOf(g, g->params[a]), (uint32_t)g->vars[g->params[a]].size});
      }
      for (size_t a = 0; a < rets.size(); a++) {
        same &= g->vars[g->rets[a]].size == d.fn->vars[rets[a].reg].size;
        t.out.push_back({d.localOf(g, g->rets[a]), local(rets[a]), (uint32_t)g->vars[g->rets[a]].size});
      }
      if (same) c->targets[kFunctionWindow | (f + 1)] = t;
    }
    Operand addr = d.src(target, Ty::B64);
    Inst& in = d.emit(indirectCall, Cls::Branch, {addr});
    in.aux = c.get();
    d.setExt(in, links);
    d.emit(indirectReturn, Cls::Other, {addr}).aux = c.get();
    return;
  }
  if (target.kind != PtxOperand::Symbol) d.fail("unknown call target");
  const PtxFunction* callee = d.findFunction(target.name);
  if (isBuiltin(target.name) && (!callee || !callee->hasBody)) {
    if (target.name == "vprintf") {
      Inst& in = d.emit(builtinPrintf, Cls::Other);
      in.imm = local(args.at(0)) | (int64_t)local(args.at(1)) << 32;
      in.sub = !rets.empty();
      if (in.sub) in.imm2 = local(rets[0]);
    } else if (target.name == "__assertfail") {
      auto* c = newList();
      for (auto& a : args) c->v.push_back({local(a), 0, 0});
      d.emit(builtinAssert, Cls::Other).aux = c;
    } else {
      Inst& in = d.emit(builtinMalloc, Cls::Other);
      in.sub = target.name == "free";
      in.imm = local(args.at(0));
      if (!in.sub) in.imm2 = local(rets.at(0));
    }
    return;
  }
  if (!callee || !callee->hasBody) d.fail("call of '" + target.name + "', which is not defined in this module");
  if (callee->params.size() != args.size() || callee->rets.size() != rets.size())
    d.fail("wrong number of call arguments");
  if (!args.empty()) {
    auto* c = newList();
    for (size_t a = 0; a < args.size(); a++)
      c->v.push_back(
          {local(args[a]), d.localOf(callee, callee->params[a]), (uint32_t)callee->vars[callee->params[a]].size});
    d.emit(copyLocal, Cls::Other).aux = c;
  }
  size_t at = d.here();
  d.emit(callHandler, Cls::Branch, {d.linkOf(callee)});
  d.callFixup(at, callee);
  if (!rets.empty()) {
    auto* c = newList();
    for (size_t a = 0; a < rets.size(); a++)
      c->v.push_back(
          {d.localOf(callee, callee->rets[a]), local(rets[a]), (uint32_t)callee->vars[callee->rets[a]].size});
    d.emit(copyLocal, Cls::Other).aux = c;
  }
}
OpcodeEntry eCall({"call"}, decodeCall);

OpcodeEntry eRet({"ret"}, [](Decoder& d) {
  d.allow({"uni"});
  if (d.fn->isEntry)
    d.emit(exitHandler, Cls::Branch).ends = true;
  else
    d.emit(returnHandler, Cls::Branch, {d.linkOf(d.fn)}).ends = true;
});
OpcodeEntry eExit({"exit"}, [](Decoder& d) { d.emit(exitHandler, Cls::Branch).ends = true; });

OpcodeEntry eBra({"bra"}, [](Decoder& d) {
  d.allow({"uni"});
  size_t at = d.here();
  d.emit(branchHandler, Cls::Branch).ends = true;
  d.branchTo(at, d.labelIndex(d.arg(0)));
});

void brxHandler(Warp& w, const Inst& I) {
  auto& t = *(const std::vector<uint32_t>*)I.aux;
  const uint32_t* idx = w.reg<uint32_t>(I.op[0]);
  uint32_t v = idx[w.firstLane()], same = 0;
  if (v >= t.size())
    throw Fault(kFaultIllegalInstruction, format("brx.idx index %u outside its %zu targets", v, t.size()),
                w.firstLane());
  for (int i = 0; i < 32; i++)
    if ((w.m >> i & 1) && idx[i] == v) same |= 1u << i;
  if (same == w.active) {
    w.npc = t[v];
    return;
  }
  w.ev = Event::Diverge;
  w.splitMask = same;
  w.splitPc = t[v];
  if (same != w.m) w.npc = w.pc;
}
OpcodeEntry eBrx({"brx"}, [](Decoder& d) {
  d.allow({"idx", "uni"});
  const PtxOperand& list = d.arg(1);
  std::vector<int> labels;
  for (int s = list.scope; s >= 0; s = d.fn->scopeParent[s]) {
    auto it = d.fn->targetLists.find({s, list.name});
    if (it == d.fn->targetLists.end()) continue;
    for (auto& n : it->second) {
      PtxOperand o;
      o.name = n;
      o.scope = s;
      labels.push_back(d.labelIndex(o));
    }
    break;
  }
  if (labels.empty()) d.fail("unknown branch target list");
  auto t = std::make_shared<std::vector<uint32_t>>();
  d.kernel().auxStore.push_back(t);
  Operand idx = d.src(d.arg(0), Ty::U32);
  Inst& in = d.emit(brxHandler, Cls::Branch, {idx});
  in.aux = t.get();
  in.ends = in.table = true;
  d.fixTable(t.get(), labels);
});

}  // namespace

}  // namespace cudasim
