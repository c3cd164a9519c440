// Functions: formal parameters, scopes, bodies and the directives in them.
#include "fault.h"
#include "ptx_parser.h"

namespace cudasim {

void PtxParser::function() {
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
    } else if (accept(".minnctapersm") || accept(".maxnctapersm") || accept(".maxnreg") || accept(".maxclusterrank") ||
               accept(".abi_preserve") || accept(".abi_preserve_control")) {
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

std::vector<int> PtxParser::formals() {
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

void PtxParser::pushScope() {
  Scope s;
  s.id = (int)fn_->scopeParent.size();
  fn_->scopeParent.push_back(scopes_.empty() ? -1 : scopes_.back().id);
  scopes_.push_back(std::move(s));
}

int PtxParser::addVar(PtxVar v) {
  int id = (int)fn_->vars.size();
  scopes_.back().vars[v.name] = id;
  fn_->vars.push_back(std::move(v));
  return id;
}

void PtxParser::addReg(const std::string& name, Ty t) {
  scopes_.back().regs[name] = (int)fn_->regs.size();
  fn_->regs.push_back({name, t});
}

int PtxParser::findReg(const std::string& n) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    auto it = scopes_[i].regs.find(n);
    if (it != scopes_[i].regs.end()) return it->second;
    if (scopes_[i].vars.count(n)) return -1;
  }
  return -1;
}

int PtxParser::findVar(const std::string& n) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    auto it = scopes_[i].vars.find(n);
    if (it != scopes_[i].vars.end()) return it->second;
  }
  return -1;
}

void PtxParser::body() {
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

void PtxParser::localDirective() {
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

}  // namespace cudasim
