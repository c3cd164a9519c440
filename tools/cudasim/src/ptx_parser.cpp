// Tokens and module scope.
#include "ptx_parser.h"

#include "fault.h"

namespace cudasim {

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

void PtxParser::run() {
  while (tok_.kind != Token::End) topLevel();
}

void PtxParser::advance() {
  if (havePeek_) {
    tok_ = peek_;
    havePeek_ = false;
    return;
  }
  tok_ = lex_.next();
}

const Token& PtxParser::peek() {
  if (!havePeek_) {
    peek_ = lex_.next();
    havePeek_ = true;
  }
  return peek_;
}

bool PtxParser::accept(const char* p) {
  if (!is(p)) return false;
  advance();
  return true;
}

void PtxParser::expect(const char* p) {
  if (!accept(p)) fail(format("expected '%s' before '%s'", p, tok_.text.c_str()));
}

void PtxParser::fail(const std::string& msg) {
  throw Fault(kFaultInvalidPtx,
              format("PTX line %d: %s\n    %s", tok_.line, msg.c_str(), m_.lineText(tok_.line).c_str()));
}

std::string PtxParser::ident() {
  if (tok_.kind != Token::Ident) fail("expected a name, found '" + tok_.text + "'");
  std::string s = tok_.text;
  advance();
  return s;
}

int64_t PtxParser::constant() {
  bool neg = accept("-");
  if (tok_.kind != Token::Int) fail("expected an integer");
  int64_t v = (int64_t)tok_.bits;
  advance();
  return neg ? -v : v;
}

void PtxParser::skipStatement() {
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

void PtxParser::topLevel() {
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
  PtxParser(*m).run();
  return m;
}

}  // namespace cudasim
