// The types of PTX (PTX ISA, "Fundamental Types").
#include <unordered_map>

#include "ptx_ast.h"

namespace cudasim {

namespace {
struct TypeInfo {
  const char* name;
  Ty ty;
  int size;
  bool flt, sgn;
};
const TypeInfo kTypes[] = {
    {"pred", Ty::Pred, 1, false, false},   {"b8", Ty::B8, 1, false, false},       {"b16", Ty::B16, 2, false, false},
    {"b32", Ty::B32, 4, false, false},     {"b64", Ty::B64, 8, false, false},     {"b128", Ty::B128, 16, false, false},
    {"u8", Ty::U8, 1, false, false},       {"u16", Ty::U16, 2, false, false},     {"u32", Ty::U32, 4, false, false},
    {"u64", Ty::U64, 8, false, false},     {"s8", Ty::S8, 1, false, true},        {"s16", Ty::S16, 2, false, true},
    {"s32", Ty::S32, 4, false, true},      {"s64", Ty::S64, 8, false, true},      {"f16", Ty::F16, 2, true, true},
    {"f16x2", Ty::F16x2, 4, true, true},   {"bf16", Ty::BF16, 2, true, true},     {"bf16x2", Ty::BF16x2, 4, true, true},
    {"tf32", Ty::TF32, 4, true, true},     {"f32", Ty::F32, 4, true, true},       {"f32x2", Ty::F32x2, 8, true, true},
    {"f64", Ty::F64, 8, true, true},       {"e4m3", Ty::E4M3, 1, true, true},     {"e5m2", Ty::E5M2, 1, true, true},
    {"e4m3x2", Ty::E4M3x2, 2, true, true}, {"e5m2x2", Ty::E5M2x2, 2, true, true}, {"s4", Ty::S4, 1, false, true},
    {"u4", Ty::U4, 1, false, false},       {"b1", Ty::B1, 1, false, false},
};
}  // namespace

Ty parseType(const std::string& s) {
  static const auto* table = [] {
    auto* t = new std::unordered_map<std::string, Ty>;
    for (auto& k : kTypes) (*t)[k.name] = k.ty;
    return t;
  }();
  auto it = table->find(s);
  return it == table->end() ? Ty::Bad : it->second;
}
static const TypeInfo* info(Ty t) {
  for (auto& k : kTypes)
    if (k.ty == t) return &k;
  return nullptr;
}
int tySize(Ty t) {
  auto* i = info(t);
  return i ? i->size : 0;
}
const char* tyName(Ty t) {
  auto* i = info(t);
  return i ? i->name : "?";
}
bool tyIsFloat(Ty t) {
  auto* i = info(t);
  return i && i->flt;
}
bool tyIsSigned(Ty t) {
  auto* i = info(t);
  return i && i->sgn;
}

}  // namespace cudasim
