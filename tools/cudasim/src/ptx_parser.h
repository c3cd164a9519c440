// Recursive-descent parser for PTX text (PTX ISA, "Syntax", "State Spaces, Types, and Variables" and "Directives").
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx_ast.h"
#include "ptx_lexer.h"

namespace cudasim {

class PtxParser {
 public:
  explicit PtxParser(PtxModule& m) : m_(m), lex_(m.text) { advance(); }

  void run();

 private:
  // --- tokens
  void advance();
  const Token& peek();
  bool accept(const char* p);
  void expect(const char* p);
  [[noreturn]] void fail(const std::string& msg);
  std::string ident();
  int64_t constant();
  void skipStatement();  // up to its semicolon or closing brace
  bool is(const char* p) const { return tok_.kind != Token::String && tok_.text == p; }

  void topLevel();

  // --- ptx_parse_variable.cpp
  std::vector<PtxVar> variables(PtxVar proto, bool single = false);
  void initialiser(PtxVar& v);
  PtxInit initValue(Ty t);

  // --- ptx_parse_function.cpp
  struct Scope {
    std::unordered_map<std::string, int> regs, vars;
    int id;
  };
  void function();
  std::vector<int> formals();
  void pushScope();
  int addVar(PtxVar v);
  void addReg(const std::string& name, Ty t);
  int findReg(const std::string& n) const;
  int findVar(const std::string& n) const;
  void body();
  void localDirective();

  // --- ptx_parse_operand.cpp
  void instruction();
  PtxOperand operand();
  PtxOperand simple();
  void plusOffset(PtxOperand& o);

  PtxModule& m_;
  Lexer lex_;
  Token tok_, peek_;
  bool havePeek_ = false;
  bool closed_ = false;  // skipStatement found the closing brace
  PtxFunction* fn_ = nullptr;
  std::vector<Scope> scopes_;
};

}  // namespace cudasim
