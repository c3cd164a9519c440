// Special registers (PTX ISA, "Special Registers").
#pragma once
#include <string>

#include "machine.h"

namespace cudasim {

struct SpecialRegister {
  const char* name;
  uint8_t id;
  int width;
};
const SpecialRegister* findSpecial(const std::string& name);  // null when unknown
void readSpecial(Warp& w, const Inst& I);                     // sub: the id

}  // namespace cudasim
