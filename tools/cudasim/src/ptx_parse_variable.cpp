// Variables and their initialisers.
#include <cstring>

#include "ptx_parser.h"

namespace cudasim {

// Everything after the state space: attributes, type, names, initialisers.
std::vector<PtxVar> PtxParser::variables(PtxVar proto, bool single) {
  int vec = 1;
  for (;;) {
    if (accept(".align")) {
      proto.align = (int)constant();
      continue;
    }
    if (accept(".attribute")) {
      expect("(");
      while (!accept(")")) advance();
      continue;
    }
    if (accept(".v2")) {
      vec = 2;
      continue;
    }
    if (accept(".v4")) {
      vec = 4;
      continue;
    }
    if (accept(".ptr")) {  // kernel parameter annotation
      while (is(".global") || is(".shared") || is(".const") || is(".local")) advance();
      continue;
    }
    if (tok_.kind == Token::Ident && tok_.text[0] == '.') {
      Ty t = parseType(tok_.text.substr(1));
      if (t == Ty::Bad) {
        if (is(".texref") || is(".samplerref") || is(".surfref"))
          t = Ty::U64;
        else
          fail("unknown type '" + tok_.text + "'");
      }
      proto.type = t;
      advance();
      continue;
    }
    break;
  }
  std::vector<PtxVar> out;
  do {
    PtxVar v = proto;
    v.name = ident();
    uint64_t n = vec;
    if (accept("<")) {  // parameterised names exist for registers only
      n = constant();
      expect(">");
    }
    while (accept("[")) {
      if (is("]")) {
        v.unsized = true;
        n = 0;
      } else
        n *= (uint64_t)constant();
      expect("]");
    }
    int es = tySize(v.type);
    v.size = n * es;
    if (v.align < es) v.align = es;
    if (vec > 1 && v.align < es * vec) v.align = es * vec;
    if (accept("=")) initialiser(v);
    out.push_back(std::move(v));
  } while (!single && accept(","));
  return out;
}

void PtxParser::initialiser(PtxVar& v) {
  if (accept("{")) {
    while (!accept("}")) {
      if (is("{")) {
        initialiser(v);
      } else
        v.init.push_back(initValue(v.type));
      accept(",");
    }
    if (v.unsized) {
      v.size = v.init.size() * tySize(v.type);
      v.unsized = false;
    }
    return;
  }
  v.init.push_back(initValue(v.type));
}

PtxInit PtxParser::initValue(Ty t) {
  PtxInit i;
  bool neg = accept("-");
  if (tok_.kind == Token::Int) {
    i.bits = tok_.bits;
    advance();
    if (neg) i.bits = 0 - i.bits;
    if (tyIsFloat(t) && t == Ty::F32) {
      float f = (float)(int64_t)i.bits;
      uint32_t u;
      memcpy(&u, &f, 4);
      i.bits = u;
    } else if (t == Ty::F64) {
      double d = (double)(int64_t)i.bits;
      memcpy(&i.bits, &d, 8);
    }
    return i;
  }
  if (tok_.kind == Token::Float) {
    double d;
    if (tok_.f32) {
      float f;
      uint32_t u = (uint32_t)tok_.bits;
      memcpy(&f, &u, 4);
      d = f;
    } else
      memcpy(&d, &tok_.bits, 8);
    if (neg) d = -d;
    if (t == Ty::F32) {
      float f = (float)d;
      uint32_t u;
      memcpy(&u, &f, 4);
      i.bits = tok_.f32 && !neg ? tok_.bits : u;
    } else if (tok_.f32 && tySize(t) == 4)
      i.bits = tok_.bits;
    else
      memcpy(&i.bits, &d, 8);
    advance();
    return i;
  }
  std::string s = ident();
  if (s == "generic") {
    i.generic = true;
    expect("(");
    s = ident();
    expect(")");
  }
  i.symbol = s;
  if (accept("+"))
    i.bits = (uint64_t)constant();
  else if (is("-"))
    i.bits = (uint64_t)constant();
  return i;
}

}  // namespace cudasim
