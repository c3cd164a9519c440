// Turns parsed PTX into Inst records. Each exec_*.cpp registers decoders for
// the opcodes it implements.
#pragma once
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "ir.h"
#include "machine.h"
#include "module.h"

namespace cudasim {

inline uint32_t alignUp(uint32_t v, uint32_t a) {
  return a ? (v + a - 1) / a * a : v;
}

class Decoder {
 public:
  Decoder(Module& module, const PtxFunction& entry);
  std::unique_ptr<Kernel> run();

  // --- for opcode decoders
  const PtxInst* p = nullptr;  // instruction being decoded
  const PtxFunction* fn = nullptr;
  Kernel& kernel() { return *k_; }
  Module& module() { return module_; }

  size_t nargs() const { return p->args.size(); }
  const PtxOperand& arg(size_t i) const {
    if (i >= p->args.size()) fail("too few operands");
    return p->args[i];
  }
  bool has(const char* mod) const;
  bool mod(size_t i, const char* s) const { return i < p->op.size() && p->op[i] == s; }
  Ty type(size_t fromEnd = 0) const;  // type suffix counted from the end; Bad if none
  // Modifiers an opcode decoder does not know are errors, never ignored.
  void allow(std::initializer_list<const char*> mods) const;
  std::string opcode() const;
  [[noreturn]] void fail(const std::string& why) const;

  Operand src(const PtxOperand& o, Ty t);
  Operand dst(const PtxOperand& o, Ty t);
  Operand predSrc(const PtxOperand& o);
  Operand predDst(const PtxOperand& o);
  Operand constant(uint64_t bits, int width);
  Operand widen(const Operand& o);  // 32-bit to 64-bit register
  Operand temp(int width);          // fresh register; 0 = predicate
  Inst& emit(Handler h, Cls c);
  // Convenience: emit with operands in order.
  Inst& emit(Handler h, Cls c, std::initializer_list<Operand> ops);
  void pin(const Operand& o) {
    if (o.reg >= 0) pinned_[o.reg] = true;
  }  // written or read asynchronously
  void pinAsync(const Operand& o) {
    pin(o);
    if (o.reg >= 0) asyncRegs.insert(o.reg);
  }
  std::set<int> asyncRegs;  // registers wgmma accesses late
  void setExt(Inst& in, std::vector<Operand> ops);
  // Address operand -> register/constant slot (64-bit) plus displacement.
  // Yields the 32-lane address operand; `disp` goes to the instruction.
  Operand addressBase(const PtxOperand& o, int64_t& disp, Space space);
  uint64_t symbolAddress(const PtxOperand& o, Space* space = nullptr);
  const PtxVar* entryParam(const PtxOperand& o) const;  // parameter of the kernel itself
  uint32_t localOffset(int var);
  uint32_t paramOffset(const PtxFunction* f, int var);
  int regOf(const PtxFunction* f, int reg) { return regBase_[f] + reg; }
  int labelIndex(const PtxOperand& o) const;
  void branchTo(size_t instIndex, int labelInst) { fixups_.push_back({instIndex, fn, labelInst}); }
  void fixTable(std::vector<uint32_t>* table, std::vector<int> labels) { tableFixups_.push_back({table, fn, labels}); }
  Operand linkOf(const PtxFunction* f);
  uint32_t localOf(const PtxFunction* f, int var) { return localVar_.at({f, var}); }
  void callFixup(size_t instIndex, const PtxFunction* f) { callFixups_.push_back({instIndex, f}); }
  const PtxFunction* findFunction(const std::string& name) const;
  const std::map<const PtxFunction*, uint32_t>& entries() const { return entryPc_; }
  std::vector<const PtxFunction*> linked;  // callees first, kernel last
  size_t here() const { return k_->code.size(); }

 private:
  struct Fixup {
    size_t inst;
    const PtxFunction* fn;
    int label;
  };
  struct TableFixup {
    std::vector<uint32_t>* table;
    const PtxFunction* fn;
    std::vector<int> labels;
  };
  struct CallFixup {
    size_t inst;
    const PtxFunction* fn;
  };
  void collect(const PtxFunction* f);
  void layoutVariables();
  void decodeFunction(const PtxFunction* f);

  Module& module_;
  const PtxFunction& entry_;
  std::unique_ptr<Kernel> k_;
  std::map<const PtxFunction*, int> regBase_;
  std::vector<uint8_t> regWidth_;  // by virtual register
  std::vector<bool> pinned_;       // registers that must keep their own slot
  std::map<std::pair<const PtxFunction*, int>, uint32_t> localVar_;
  std::map<std::pair<const PtxFunction*, int>, uint32_t> sharedLocal_;
  std::map<std::string, uint32_t> sharedGlobal_;
  std::vector<std::pair<const PtxVar*, std::pair<const PtxFunction*, int>>> sharedOrder_;
  std::map<const PtxFunction*, Operand> link_;
  std::map<std::pair<uint64_t, int>, uint32_t> constIndex_;
  std::vector<Fixup> fixups_;
  std::vector<TableFixup> tableFixups_;
  std::vector<CallFixup> callFixups_;
  std::map<const PtxFunction*, uint32_t> entryPc_;
  std::map<const PtxFunction*, int> state_;  // 1 = on the stack, 2 = done
  std::vector<uint32_t> fnBegin_;            // first pc of each linked function
};

using DecodeFn = void (*)(Decoder&);
struct OpcodeEntry {
  OpcodeEntry(std::initializer_list<const char*> names, DecodeFn f);
};
DecodeFn findOpcode(const std::string& name);

// Bits of an immediate as an operand of type t.
uint64_t immediateBits(const PtxOperand& o, Ty t);

}  // namespace cudasim
