// Parser for PTX text (PTX ISA, "Syntax", "State Spaces, Types, and
// Variables" and "Directives").
#include "ptx_ast.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "fault.h"
#include "ptx_lexer.h"

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

int PtxFunction::findLabel(int scope, const std::string& name) const {
  for (int s = scope; s >= 0; s = scopeParent[s]) {
    auto it = labels.find({s, name});
    if (it != labels.end()) return it->second;
  }
  return -1;
}

const std::string& PtxModule::lineText(int n) const {
  static const std::string empty;
  return n >= 1 && n <= (int)lines.size() ? lines[n - 1] : empty;
}

namespace {

std::vector<std::string> splitDots(const std::string& s) {
  std::vector<std::string> out;
  size_t b = 0;
  while (b <= s.size()) {
    size_t e = s.find('.', b);
    if (e == std::string::npos) e = s.size();
    if (e > b) out.push_back(s.substr(b, e - b));
    b = e + 1;
  }
  return out;
}

class Parser {
 public:
  explicit Parser(PtxModule& m) : m_(m), lex_(m.text) { advance(); }

  void run() {
    while (tok_.kind != Token::End) topLevel();
  }

 private:
  // --- token helpers
  void advance() {
    if (havePeek_) {
      tok_ = peek_;
      havePeek_ = false;
      return;
    }
    tok_ = lex_.next();
  }
  const Token& peek() {
    if (!havePeek_) {
      peek_ = lex_.next();
      havePeek_ = true;
    }
    return peek_;
  }
  bool is(const char* p) const { return tok_.kind != Token::String && tok_.text == p; }
  bool accept(const char* p) {
    if (!is(p)) return false;
    advance();
    return true;
  }
  void expect(const char* p) {
    if (!accept(p)) fail(format("expected '%s' before '%s'", p, tok_.text.c_str()));
  }
  [[noreturn]] void fail(const std::string& msg) {
    throw Fault(kFaultInvalidPtx,
                format("PTX line %d: %s\n    %s", tok_.line, msg.c_str(), m_.lineText(tok_.line).c_str()));
  }
  std::string ident() {
    if (tok_.kind != Token::Ident) fail("expected a name, found '" + tok_.text + "'");
    std::string s = tok_.text;
    advance();
    return s;
  }
  int64_t constant() {
    bool neg = accept("-");
    if (tok_.kind != Token::Int) fail("expected an integer");
    int64_t v = (int64_t)tok_.bits;
    advance();
    return neg ? -v : v;
  }
  void skipStatement() {
    int depth = 0;
    closed_ = false;
    while (tok_.kind != Token::End) {
      if (is("{")) depth++;
      if (is("}")) {
        depth--;
        if (depth <= 0) {
          closed_ = true;
          advance();
          return;
        }
      }
      if (is(";") && depth == 0) {
        advance();
        return;
      }
      advance();
    }
  }

  // --- module scope
  void topLevel() {
    int line = tok_.line;
    if (accept(";")) return;
    if (accept(".version")) {
      advance();
      return;
    }
    if (accept(".target")) {
      m_.target = ident();
      while (accept(",")) ident();
      return;
    }
    if (accept(".address_size")) {
      advance();
      return;
    }
    if (is(".file")) {  // .file N "name" [, time, size]
      while (tok_.line == line && tok_.kind != Token::End) advance();
      return;
    }
    if (accept(".section")) {  // debug sections: name { ... }
      while (!is("{") && tok_.kind != Token::End) advance();
      skipStatement();
      return;
    }
    if (accept(".pragma")) {
      skipStatement();
      return;
    }
    if (accept(".alias")) {
      std::string a = ident();
      expect(",");
      m_.aliases[a] = ident();
      accept(";");
      return;
    }
    bool isExtern = false;
    for (;;) {
      if (is(".extern")) {
        isExtern = true;
        advance();
      } else if (is(".visible") || is(".weak") || is(".common"))
        advance();
      else
        break;
    }
    if (is(".entry") || is(".func")) {
      function();
      return;
    }
    PtxVar v;
    v.isExtern = isExtern;
    v.line = line;
    if (accept(".global"))
      v.space = Space::Global;
    else if (accept(".const"))
      v.space = Space::Const;
    else if (accept(".shared"))
      v.space = Space::Shared;
    else
      fail("unknown directive '" + tok_.text + "'");
    for (PtxVar& x : variables(v)) {
      auto it = m_.varIndex.find(x.name);
      if (it != m_.varIndex.end()) {  // extern declaration followed by the definition
        if (m_.vars[it->second].isExtern) m_.vars[it->second] = x;
        continue;
      }
      m_.varIndex[x.name] = (int)m_.vars.size();
      m_.vars.push_back(std::move(x));
    }
    accept(";");
  }

  // Everything after the state space: attributes, type, names, initialisers.
  std::vector<PtxVar> variables(PtxVar proto, bool single = false) {
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

  void initialiser(PtxVar& v) {
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
  PtxInit initValue(Ty t) {
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

  // --- functions
  void function() {
    auto f = std::make_unique<PtxFunction>();
    f->line = tok_.line;
    f->isEntry = is(".entry");
    advance();
    fn_ = f.get();
    scopes_.clear();
    fn_->scopeParent.clear();
    pushScope();
    while (accept(".attribute")) {
      expect("(");
      while (!accept(")")) advance();
    }
    if (!f->isEntry && is("(")) f->rets = formals();
    f->name = ident();
    if (is("(")) f->params = formals();
    for (;;) {
      if (accept(".maxntid")) {
        int n = 1;
        do n *= (int)constant();
        while (accept(","));
        f->maxThreads = n;
      } else if (accept(".reqntid")) {
        int i = 0;
        f->reqThreads[1] = f->reqThreads[2] = 1;
        do f->reqThreads[i++] = (int)constant();
        while (accept(",") && i < 3);
      } else if (accept(".reqnctapercluster")) {
        int i = 0;
        f->reqCluster[1] = f->reqCluster[2] = 1;
        do f->reqCluster[i++] = (int)constant();
        while (accept(",") && i < 3);
      } else if (accept(".minnctapersm") || accept(".maxnctapersm") || accept(".maxnreg") ||
                 accept(".maxclusterrank") || accept(".abi_preserve") || accept(".abi_preserve_control")) {
        do constant();
        while (accept(","));
      } else if (accept(".noreturn") || accept(".explicitcluster") || accept(".blocksareclusters")) {
      } else if (accept(".pragma")) {
        while (!accept(";")) advance();
      } else
        break;
    }
    if (is("{")) {
      f->hasBody = true;
      const Lexer atLexer = lex_;
      const Token atTok = tok_, atPeek = peek_;
      const bool atHave = havePeek_;
      try {
        advance();
        body();
      } catch (Fault& e) {  // skip the body; a library may hold kernels that nobody launches
        f->error = e.what();
        lex_ = atLexer;
        tok_ = atTok;
        peek_ = atPeek;
        havePeek_ = atHave;
        skipStatement();
        if (tok_.kind == Token::End && !closed_) throw;
      }
    } else {
      accept(";");
    }
    auto it = m_.functionIndex.find(f->name);
    if (it == m_.functionIndex.end() || (f->hasBody && !it->second->hasBody)) m_.functionIndex[f->name] = f.get();
    m_.functions.push_back(std::move(f));
    fn_ = nullptr;
  }

  std::vector<int> formals() {
    std::vector<int> out;
    expect("(");
    while (!accept(")")) {
      if (accept(".param")) {
        PtxVar v;
        v.space = Space::Param;
        v.line = tok_.line;
        for (PtxVar& x : variables(v, true)) out.push_back(addVar(std::move(x)));
      } else if (accept(".reg")) {
        fail("functions with .reg parameters are not supported (use the ABI, .param)");
      } else {
        fail("expected .param");
      }
      accept(",");
    }
    return out;
  }

  struct Scope {
    std::unordered_map<std::string, int> regs, vars;
    int id;
  };
  void pushScope() {
    Scope s;
    s.id = (int)fn_->scopeParent.size();
    fn_->scopeParent.push_back(scopes_.empty() ? -1 : scopes_.back().id);
    scopes_.push_back(std::move(s));
  }
  int addVar(PtxVar v) {
    int id = (int)fn_->vars.size();
    scopes_.back().vars[v.name] = id;
    fn_->vars.push_back(std::move(v));
    return id;
  }
  void addReg(const std::string& name, Ty t) {
    scopes_.back().regs[name] = (int)fn_->regs.size();
    fn_->regs.push_back({name, t});
  }
  int findReg(const std::string& n) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto it = scopes_[i].regs.find(n);
      if (it != scopes_[i].regs.end()) return it->second;
      if (scopes_[i].vars.count(n)) return -1;
    }
    return -1;
  }
  int findVar(const std::string& n) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto it = scopes_[i].vars.find(n);
      if (it != scopes_[i].vars.end()) return it->second;
    }
    return -1;
  }

  void body() {
    int depth = 1;
    while (depth > 0) {
      if (tok_.kind == Token::End) fail("unexpected end of file in function " + fn_->name);
      if (accept("{")) {
        pushScope();
        depth++;
        continue;
      }
      if (accept("}")) {
        scopes_.pop_back();
        depth--;
        continue;
      }
      if (accept(";")) continue;
      if (tok_.kind == Token::Ident && tok_.text[0] == '.') {
        localDirective();
        continue;
      }
      if (tok_.kind == Token::Ident && peek().kind == Token::Punct && peek().text == ":") {
        std::string l = ident();
        advance();
        if (is(".branchtargets") || is(".calltargets")) {
          advance();
          std::vector<std::string> t;
          do t.push_back(ident());
          while (accept(","));
          accept(";");
          fn_->targetLists[{scopes_.back().id, l}] = t;
          continue;
        }
        if (is(".callprototype")) {
          while (!accept(";")) advance();
          continue;
        }
        fn_->labels[{scopes_.back().id, l}] = (int)fn_->insts.size();
        continue;
      }
      instruction();
    }
    // A trailing label may point past the last instruction.
    PtxInst end;
    end.op = {"ret"};
    end.line = tok_.line;
    fn_->insts.push_back(end);
  }

  void localDirective() {
    if (accept(".reg")) {
      int vec = 1;
      if (accept(".v2"))
        vec = 2;
      else if (accept(".v4"))
        vec = 4;
      if (vec > 1) fail("vector registers are not supported");
      if (tok_.kind != Token::Ident || tok_.text[0] != '.') fail("expected a register type");
      Ty t = parseType(tok_.text.substr(1));
      if (t == Ty::Bad) fail("unknown register type '" + tok_.text + "'");
      advance();
      do {
        std::string n = ident();
        if (accept("<")) {
          int64_t c = constant();
          expect(">");
          for (int64_t i = 0; i < c; i++) addReg(n + std::to_string(i), t);
        } else {
          addReg(n, t);
        }
      } while (accept(","));
      accept(";");
      return;
    }
    Space sp = Space::None;
    if (is(".local"))
      sp = Space::Local;
    else if (is(".param"))
      sp = Space::Param;
    else if (is(".shared"))
      sp = Space::Shared;
    else if (is(".global"))
      sp = Space::Global;
    else if (is(".const"))
      sp = Space::Const;
    if (sp != Space::None) {
      PtxVar v;
      v.space = sp;
      v.line = tok_.line;
      advance();
      for (PtxVar& x : variables(v)) addVar(std::move(x));
      accept(";");
      return;
    }
    if (is(".loc")) {  // .loc file line col [, function_name ..., inlined_at ...]
      int line = tok_.line;
      while (tok_.line == line && tok_.kind != Token::End) advance();
      return;
    }
    if (is(".pragma") || is(".branchtargets") || is(".callprototype") || is(".calltargets")) {
      skipStatement();
      return;
    }
    fail("unknown directive '" + tok_.text + "'");
  }

  void instruction() {
    PtxInst in;
    in.line = tok_.line;
    if (accept("@")) {
      bool neg = accept("!");
      in.guarded = true;
      in.guard = operand();
      in.guard.negated = neg;
      if (in.guard.kind != PtxOperand::Reg) fail("the guard is not a predicate register");
    }
    in.line = tok_.line;
    in.op = splitDots(ident());
    while (!accept(";")) {
      in.args.push_back(operand());
      if (!accept(",") && !is(";")) fail("expected ',' or ';' before '" + tok_.text + "'");
    }
    fn_->insts.push_back(std::move(in));
  }

  PtxOperand operand() {
    PtxOperand o = simple();
    if (accept("|")) {
      PtxOperand pair;
      pair.kind = PtxOperand::Vector;
      pair.pipe = true;
      pair.list.push_back(std::move(o));
      pair.list.push_back(simple());
      return pair;
    }
    return o;
  }

  PtxOperand simple() {
    PtxOperand o;
    o.scope = scopes_.back().id;
    if (accept("!")) {
      o = simple();
      o.negated = !o.negated;
      return o;
    }
    if (accept("{")) {
      o.kind = PtxOperand::Vector;
      while (!accept("}")) {
        o.list.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (accept("(")) {
      o.kind = PtxOperand::Group;
      while (!accept(")")) {
        o.list.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (accept("[")) {
      o.kind = PtxOperand::Address;
      while (!accept("]")) {
        PtxOperand e = operand();
        if (o.list.empty()) {
          o.offset = e.kind == PtxOperand::Imm ? 0 : e.offset;
        }
        o.list.push_back(std::move(e));
        if (accept("+"))
          o.offset += constant();
        else if (is("-"))
          o.offset += constant();
        accept(",");
      }
      return o;
    }
    bool neg = accept("-");
    if (neg && accept("-")) neg = false;
    if (accept("~")) {
      o.kind = PtxOperand::Imm;
      o.bits = ~(uint64_t)constant();
      return o;
    }
    if (tok_.kind == Token::Int) {
      o.kind = PtxOperand::Imm;
      o.bits = neg ? 0 - tok_.bits : tok_.bits;
      advance();
      return o;
    }
    if (tok_.kind == Token::Float) {
      o.kind = PtxOperand::Float;
      o.bits = tok_.bits;
      o.f32Literal = tok_.f32;
      if (neg) o.bits ^= tok_.f32 ? 0x80000000ull : 0x8000000000000000ull;
      advance();
      return o;
    }
    std::string n = ident();
    if (n == "_") {
      o.kind = PtxOperand::Sink;
      return o;
    }
    if (neg) fail("cannot negate '" + n + "'");
    int r = findReg(n);
    if (r >= 0) {
      o.kind = PtxOperand::Reg;
      o.reg = r;
      o.name = n;
      plusOffset(o);
      return o;
    }
    int v = findVar(n);
    if (v >= 0) {
      o.kind = PtxOperand::Var;
      o.reg = v;
      o.name = n;
      plusOffset(o);
      return o;
    }
    if (n == "WARP_SZ") {
      o.kind = PtxOperand::Imm;
      o.bits = 32;
      return o;
    }
    if (n[0] == '%') {
      o.kind = PtxOperand::Special;
      o.name = n;
      return o;
    }
    o.kind = PtxOperand::Symbol;
    o.name = n;
    plusOffset(o);
    return o;
  }
  void plusOffset(PtxOperand& o) {
    while (is("+") || is("-")) {
      if (accept("+"))
        o.offset += constant();
      else
        o.offset += constant();
    }
  }

  PtxModule& m_;
  Lexer lex_;
  Token tok_, peek_;
  bool havePeek_ = false;
  bool closed_ = false;  // skipStatement found the closing brace
  PtxFunction* fn_ = nullptr;
  std::vector<Scope> scopes_;
};

}  // namespace

std::unique_ptr<PtxModule> parsePtx(std::string text) {
  auto m = std::make_unique<PtxModule>();
  m->text = std::move(text);
  size_t b = 0;
  while (b < m->text.size()) {
    size_t e = m->text.find('\n', b);
    if (e == std::string::npos) e = m->text.size();
    m->lines.push_back(m->text.substr(b, e - b));
    b = e + 1;
  }
  Parser(*m).run();
  return m;
}

}  // namespace cudasim
