// Decoded form of a kernel: a flat array of instructions with handler pointers
// and operand slots. All functions reachable from the kernel are linked into
// the one array, callees first (see the note on scheduling in warp.cpp).
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ptx_ast.h"

namespace cudasim {

struct Warp;
struct Inst;
struct Module;
using Handler = void (*)(Warp&, const Inst&);

// Where an operand lives: in the warp's register file or in the kernel's
// constants. A slot holds 32 lanes of `width` bytes; predicates are one
// 32-bit mask. Constants are stored broadcast so handlers need no special case.
struct Operand {
  uint32_t off = 0;
  uint8_t file = 0;   // 0 registers, 1 constants
  uint8_t width = 0;  // bytes per lane; 0 = predicate
  bool def = false;   // written by the instruction
  bool neg = false;   // negated predicate source
  int32_t reg = -1;   // virtual register index, -1 for constants and sinks
  bool present = false;
};

enum class Cls : uint8_t {
  Int,
  Fp32,
  Fp64,
  Fp16,
  Sfu,
  Cvt,
  Mov,
  LdStGlobal,
  LdStShared,
  LdStLocal,
  LdParam,
  Atomic,
  LdMatrix,
  Mma,
  Wgmma,
  Async,
  Branch,
  Barrier,
  Shuffle,
  Other,
  Count
};
const char* clsName(Cls c);

constexpr int kMaxInlineOps = 6;
constexpr uint32_t kNoGuard = ~0u;

struct Inst {
  Handler fn = nullptr;
  Handler inner = nullptr;    // handler behind a check of pending wgmma registers
  uint32_t guard = kNoGuard;  // byte offset of the predicate slot
  uint32_t guardXor = 0;
  Cls cls = Cls::Other;
  bool ends = false;                              // control never falls through (unless guarded)
  bool table = false;                             // aux is a std::vector<uint32_t> of branch targets
  uint8_t sub = 0, sub2 = 0, sub3 = 0, sub4 = 0;  // meaning depends on the handler
  uint16_t nops = 0, next = 0;
  int32_t target = -1;
  int32_t line = 0;
  int64_t imm = 0, imm2 = 0;
  Operand op[kMaxInlineOps];
  const Operand* ext = nullptr;  // further operands (vectors, matrix fragments)
  const void* aux = nullptr;     // handler specific, owned by the kernel
};

struct KernelParam {
  uint32_t offset, size;
};

struct Kernel {
  std::string name, pretty;
  std::string title;  // pretty, cut to what a message can bear
  Module* module = nullptr;
  const PtxFunction* fn = nullptr;
  std::vector<Inst> code;
  uint32_t entryPc = 0;
  uint32_t regBytes = 0;        // register file per warp
  std::vector<uint8_t> consts;  // broadcast constants
  uint32_t staticShared = 0;    // end of the static variables, from kSharedBase
  uint32_t dynamicAlign = 16;
  uint32_t localBytes = 0;  // per lane
  std::vector<KernelParam> params;
  uint32_t paramBytes = 0;
  std::vector<uint8_t> paramBuffer;
  uint8_t* paramData = nullptr;  // aligned start of the parameters in paramBuffer
  std::vector<std::unique_ptr<std::vector<Operand>>> extStore;
  std::vector<std::shared_ptr<void>> auxStore;
};

// Shared memory starts above zero so that null shared pointers are caught;
// sm_90 reserves the first kilobyte in the same way.
constexpr uint32_t kSharedBase = 1024;
// Generic addresses of the shared and local windows: outside of anything the
// host can map, so that they cannot be confused with global addresses.
constexpr uint64_t kSharedWindow = 0x0100000000000000ull;
constexpr uint64_t kLocalWindow = 0x0200000000000000ull;
constexpr uint64_t kWindowMask = 0xff00000000000000ull;
// In the shared::cluster window bits 24.. hold rank + 1; 0 is the own block.
constexpr int kClusterShift = 24;
constexpr uint32_t kLocalBase = 64;

std::unique_ptr<Kernel> decodeKernel(Module& module, const PtxFunction& fn);

}  // namespace cudasim
