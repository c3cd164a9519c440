// Parsed form of a PTX module. Names are resolved to registers and variables
// of their scope while parsing; everything else is left to the decoder.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace cudasim {

enum class Ty : uint8_t {
  None,
  Pred,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  F16x2,
  BF16,
  BF16x2,
  TF32,
  F32,
  F32x2,
  F64,
  E4M3,
  E5M2,
  E4M3x2,
  E5M2x2,
  S4,
  U4,
  B1,
  Bad,
};
Ty parseType(const std::string& s);  // "u32" -> U32; Ty::Bad when it is no type
int tySize(Ty t);                    // bytes
const char* tyName(Ty t);
bool tyIsFloat(Ty t);
bool tyIsSigned(Ty t);

enum class Space : uint8_t { None, Reg, Global, Shared, Local, Const, Param };

struct PtxOperand {
  enum Kind { Reg, Special, Imm, Float, Var, Symbol, Address, Vector, Group, Sink } kind = Sink;
  int reg = -1;                  // Reg: index into PtxFunction::regs; Var: index into vars
  std::string name;              // Special, Symbol
  uint64_t bits = 0;             // Imm: two's complement; Float: bits of a double
  bool f32Literal = false;       // Float: written as 0fXXXXXXXX (bits then hold the f32 pattern)
  bool negated = false;          // !p
  int64_t offset = 0;            // Address and symbol+offset
  std::vector<PtxOperand> list;  // Address base (+ coordinates), Vector, Group, or p|q
  bool pipe = false;             // list holds the two parts of p|q
  int scope = 0;                 // scope the symbol was used in (labels)
};

struct PtxInst {
  std::vector<std::string> op;  // opcode split at the dots
  std::vector<PtxOperand> args;
  PtxOperand guard;  // kind Reg when predicated
  bool guarded = false;
  int line = 0;
};

struct PtxReg {
  std::string name;
  Ty type;
};

struct PtxInit {  // one initialised element of a variable
  uint64_t bits = 0;
  std::string symbol;  // address of a symbol when not empty
  bool generic = false;
};

struct PtxVar {
  std::string name;
  Space space = Space::None;
  Ty type = Ty::B8;
  int align = 1;
  uint64_t size = 0;  // bytes; 0 for extern shared arrays
  bool isExtern = false;
  bool unsized = false;
  std::vector<PtxInit> init;
  int line = 0;
};

struct PtxFunction {
  std::string name;
  bool isEntry = false;
  bool hasBody = false;
  std::vector<int> params, rets;  // indices into vars
  std::vector<PtxVar> vars;
  std::vector<PtxReg> regs;
  std::vector<PtxInst> insts;
  // labels: (scope, name) -> instruction index; branch target lists likewise.
  std::map<std::pair<int, std::string>, int> labels;
  std::map<std::pair<int, std::string>, std::vector<std::string>> targetLists;
  std::vector<int> scopeParent;
  int maxThreads = 0, reqThreads[3] = {0, 0, 0};
  int reqCluster[3] = {0, 0, 0};
  int line = 0;
  std::string error;  // why the body could not be parsed; only users of the function fail
  int findLabel(int scope, const std::string& name) const;  // -1 when absent
};

struct PtxModule {
  std::string text;
  std::vector<std::string> lines;  // lines[0] is PTX line 1
  std::string target;              // e.g. sm_90a
  std::vector<PtxVar> vars;
  std::unordered_map<std::string, int> varIndex;
  std::vector<std::unique_ptr<PtxFunction>> functions;
  std::unordered_map<std::string, PtxFunction*> functionIndex;
  std::unordered_map<std::string, std::string> aliases;
  const std::string& lineText(int n) const;
};

// Throws Fault (see fault.h) with the line number on malformed input.
std::unique_ptr<PtxModule> parsePtx(std::string text);

}  // namespace cudasim
