// How far the results of approximate instructions may be off.
#pragma once
#include <cstdint>

namespace cudasim {

enum class Approximate : uint8_t { Rcp, Rsqrt, Sin, Cos, Lg2, Ex2, Tanh, Sqrt, Div };

// A result within the bound that is documented for the instruction with binary32 operands, around the exact one.
// `bits`: the operands, as one number. The same every time for the same operands and seed, as on hardware.
float withinBinary32(Approximate what, double exact, double operand, uint64_t bits);

// Likewise with operands of 16 bits (bf16, else f16); the caller rounds.
float withinHalf(Approximate what, bool bf16, double exact, uint64_t bits);

}  // namespace cudasim
