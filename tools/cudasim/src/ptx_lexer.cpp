#include "ptx_lexer.h"

#include <cstdlib>
#include <cstring>

namespace cudasim {

Token Lexer::next() {
  skip();
  Token t;
  t.line = line_;
  if (p_ >= end_) return t;
  char c = *p_;
  if (isalpha((unsigned char)c) || c == '_' || c == '$' || c == '%' ||
      (c == '.' && p_ + 1 < end_ && (isalpha((unsigned char)p_[1]) || p_[1] == '_' || p_[1] == '$'))) {
    const char* b = p_++;
    while (p_ < end_) {
      char d = *p_;
      if (d == '.' && c == '.') break;  // .reg.b32 is two directives
      if (isalnum((unsigned char)d) || d == '_' || d == '$' || d == '.' || d == '%') {
        p_++;
        continue;
      }
      if (d == ':' && p_ + 2 < end_ && p_[1] == ':') {
        p_ += 2;
        continue;
      }
      break;
    }
    t.kind = Token::Ident;
    t.text.assign(b, p_);
    return t;
  }
  if (isdigit((unsigned char)c) || (c == '.' && p_ + 1 < end_ && isdigit((unsigned char)p_[1]))) return number();
  if (c == '"') {
    const char* b = ++p_;
    while (p_ < end_ && *p_ != '"') {
      if (*p_ == '\\') p_++;
      if (*p_ == '\n') line_++;
      p_++;
    }
    t.kind = Token::String;
    t.text.assign(b, p_);
    if (p_ < end_) p_++;
    return t;
  }
  t.kind = Token::Punct;
  t.text.assign(1, c);
  p_++;
  return t;
}

void Lexer::skip() {
  for (;;) {
    while (p_ < end_ && isspace((unsigned char)*p_)) {
      if (*p_ == '\n') line_++;
      p_++;
    }
    if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '/') {
      while (p_ < end_ && *p_ != '\n') p_++;
      continue;
    }
    if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '*') {
      p_ += 2;
      while (p_ + 1 < end_ && !(p_[0] == '*' && p_[1] == '/')) {
        if (*p_ == '\n') line_++;
        p_++;
      }
      p_ += 2;
      continue;
    }
    return;
  }
}

Token Lexer::number() {
  Token t;
  t.line = line_;
  const char* b = p_;
  if (*p_ == '0' && p_ + 1 < end_ && (p_[1] == 'f' || p_[1] == 'F' || p_[1] == 'd' || p_[1] == 'D')) {
    t.f32 = p_[1] == 'f' || p_[1] == 'F';
    p_ += 2;
    const char* h = p_;
    while (p_ < end_ && isxdigit((unsigned char)*p_)) p_++;
    t.kind = Token::Float;
    t.bits = strtoull(std::string(h, p_).c_str(), nullptr, 16);
    return t;
  }
  if (*p_ == '0' && p_ + 1 < end_ && (p_[1] == 'x' || p_[1] == 'X')) {
    p_ += 2;
    while (p_ < end_ && isxdigit((unsigned char)*p_)) p_++;
    t.bits = strtoull(std::string(b, p_).c_str(), nullptr, 16);
  } else if (*p_ == '0' && p_ + 1 < end_ && (p_[1] == 'b' || p_[1] == 'B')) {
    p_ += 2;
    const char* h = p_;
    while (p_ < end_ && (*p_ == '0' || *p_ == '1')) p_++;
    t.bits = strtoull(std::string(h, p_).c_str(), nullptr, 2);
  } else {
    bool flt = false;
    while (p_ < end_ && (isdigit((unsigned char)*p_) || (*p_ == '.' && !directiveAt(p_)) || *p_ == 'e' || *p_ == 'E' ||
                         ((*p_ == '-' || *p_ == '+') && (p_[-1] == 'e' || p_[-1] == 'E')))) {
      if (*p_ == '.' || *p_ == 'e' || *p_ == 'E') flt = true;
      p_++;
    }
    std::string s(b, p_);
    if (flt) {
      double d = strtod(s.c_str(), nullptr);
      t.kind = Token::Float;
      memcpy(&t.bits, &d, 8);
      return t;
    }
    t.bits = strtoull(s.c_str(), nullptr, s.size() > 1 && s[0] == '0' ? 8 : 10);
  }
  while (p_ < end_ && (*p_ == 'U' || *p_ == 'u')) p_++;
  t.kind = Token::Int;
  return t;
}

}  // namespace cudasim
