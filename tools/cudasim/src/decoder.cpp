#include "decoder.h"

#include <cxxabi.h>

#include <algorithm>

#include "slot_allocator.h"
#include "tensor_core.h"

namespace cudasim {

namespace {
std::unordered_map<std::string, DecodeFn>& opcodeTable() {
  static auto* t = new std::unordered_map<std::string, DecodeFn>;
  return *t;
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

const PtxFunction* Decoder::findFunction(const std::string& name) const {
  std::string n = name;
  auto a = module_.ptx->aliases.find(n);
  if (a != module_.ptx->aliases.end()) n = a->second;
  auto it = module_.ptx->functionIndex.find(n);
  return it == module_.ptx->functionIndex.end() ? nullptr : it->second;
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
