// Tokens of PTX text.
#pragma once
#include <cctype>
#include <cstdint>
#include <string>

namespace cudasim {

struct Token {
  enum Kind { End, Ident, Int, Float, Punct, String } kind = End;
  std::string text;
  uint64_t bits = 0;
  bool f32 = false;
  int line = 0;
};

class Lexer {
 public:
  explicit Lexer(const std::string& s) : p_(s.data()), end_(s.data() + s.size()) {}
  Token next();

 private:
  void skip();
  Token number();
  // The dot of `.align 4.b8`.
  bool directiveAt(const char* p) const {
    return p + 1 < end_ && isalpha((unsigned char)p[1]) && p[1] != 'e' && p[1] != 'E';
  }
  const char *p_, *end_;
  int line_ = 1;
};

}  // namespace cudasim
