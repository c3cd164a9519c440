// vprintf: the argument buffer holds 4-byte integers at 4-byte alignment and
// 8-byte values (long long, pointers, doubles) at 8-byte alignment.
#include <cstdio>

#include "machine.h"
#include "memory.h"

namespace cudasim {

int devicePrintf(Warp& w, int lane, uint64_t fmtAddr, uint64_t args) {
  const char* f = (const char*)resolveOne(w, Space::None, fmtAddr, 1, 1, Access::Read, lane);
  std::string out;
  uint64_t off = 0;
  int count = 0;
  auto fetch = [&](int n) {
    off = (off + n - 1) / n * n;
    uint64_t v = 0;
    memcpy(&v, resolveOne(w, Space::None, args + off, n, 1, Access::Read, lane), n);
    off += n;
    return v;
  };
  while (*f) {
    if (*f != '%') {
      out += *f++;
      continue;
    }
    if (f[1] == '%') {
      out += '%';
      f += 2;
      continue;
    }
    std::string spec = "%";
    f++;
    bool wide = false;
    while (*f && !strchr("diouxXcfFeEgGaAsp", *f)) {
      if (*f == '*') {
        spec += std::to_string((int)fetch(4));
        f++;
        continue;
      }
      if (*f == 'l' || *f == 'z' || *f == 'j' || *f == 't')
        wide = true;
      else if (*f != 'h')
        spec += *f;
      f++;
    }
    if (!*f) break;
    char c = *f++;
    count++;
    if (strchr("fFeEgGaA", c)) {
      double d;
      uint64_t v = fetch(8);
      memcpy(&d, &v, 8);
      out += format((spec + c).c_str(), d);
    } else if (c == 's') {
      uint64_t p = fetch(8);
      const char* s = (const char*)resolveOne(w, Space::None, p, 1, 1, Access::Read, lane);
      out += format((spec + c).c_str(), s);
    } else if (c == 'p') {
      out += format((spec + "p").c_str(), (void*)fetch(8));
    } else if (wide) {
      out += format((spec + "ll" + c).c_str(), (long long)fetch(8));
    } else {
      out += format((spec + c).c_str(), (int)fetch(4));
    }
  }
  fwrite(out.data(), 1, out.size(), stdout);
  fflush(stdout);
  return count;
}

}  // namespace cudasim
