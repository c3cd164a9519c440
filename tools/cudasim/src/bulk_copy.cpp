// Decodes bulk and tensor copies (PTX ISA, "Data Movement and Conversion Instructions: Bulk copy" and "Tensor copy").
#include "bulk_copy.h"

namespace cudasim {

namespace {

void bulkCommitH(Warp& w, const Inst&) {
  eachLane(w.m, [&](int i) { w.bulkGroup[i]++; });
}
void bulkWaitH(Warp& w, const Inst& I) {
  const uint32_t n = (uint32_t)I.imm, m = w.m;
  runStores(w, [&](const PendingBulkStore& p) { return (m >> p.lane & 1) && p.group + n < w.bulkGroup[p.lane]; });
}
void nopH(Warp&, const Inst&) {}

}  // namespace

void decodeBulk(Decoder& d) {
  if (d.has("commit_group")) {
    d.emit(bulkCommitH, Cls::Async);
    return;
  }
  if (d.has("wait_group")) {
    if (d.arg(0).kind != PtxOperand::Imm) d.fail("the group count must be an immediate");
    d.emit(bulkWaitH, Cls::Async).imm = (int64_t)d.arg(0).bits;
    return;
  }
  if (d.has("prefetch")) {
    d.emit(nopH, Cls::Async);
    return;
  }
  auto f = std::make_shared<BulkInfo>();
  d.kernel().auxStore.push_back(f);
  f->line = d.p->line;
  f->reduce = d.mod(1, "reduce");
  // The destination space comes first, then the source space.
  std::vector<std::string> spaces;
  for (size_t i = 1; i < d.p->op.size(); i++) {
    const std::string& s = d.p->op[i];
    if (s == "tensor")
      f->tensor = true;
    else if (s == "1d" || s == "2d" || s == "3d" || s == "4d" || s == "5d")
      f->dims = s[0] - '0';
    else if (s == "shared::cluster" || s == "shared::cta" || s == "global")
      spaces.push_back(s);
    else if (s == "multicast::cluster")
      f->multicast = true;
    else if (s == "reduce" || s == "async" || s == "bulk" || s == "tile" || s == "bulk_group" ||
             s == "mbarrier::complete_tx::bytes" || s == "noftz" || isCacheModifier(s) || parseType(s) != Ty::Bad) {
    } else if (f->reduce && (s == "add" || s == "min" || s == "max" || s == "inc" || s == "dec" || s == "and" ||
                             s == "or" || s == "xor")) {
    } else
      d.fail("modifier '." + s + "' is not supported");
  }
  if (spaces.size() != 2) d.fail("cannot tell the direction of the copy");
  f->toShared = spaces[0] != "global";
  f->fromShared = spaces[1] != "global";
  if (f->reduce) {
    f->redOp = parseAtomOp(d);
    f->redType = d.type();
    if (f->redType == Ty::Bad) f->redType = Ty::None;
  }
  int64_t* disp = keepDisps(d);
  std::vector<Operand> coords;
  auto tensorOperand = [&](const PtxOperand& o, int64_t& dp) {
    if (o.kind != PtxOperand::Address || o.list.size() != 2 || (int)o.list[1].list.size() != f->dims)
      d.fail("malformed tensor operand");
    for (auto& c : o.list[1].list) coords.push_back(d.src(c, Ty::S32));
    return d.addressBase(o, dp, Space::None);
  };
  if (f->toShared) {
    Operand dst = d.addressBase(d.arg(0), disp[0], Space::Shared), src, size, mask;
    size_t i = 2;
    if (f->tensor)
      src = tensorOperand(d.arg(1), disp[1]);
    else {
      src = d.addressBase(d.arg(1), disp[1], f->fromShared ? Space::Shared : Space::Global);
      size = d.src(d.arg(i++), Ty::B32);
    }
    Operand mbar = d.addressBase(d.arg(i++), disp[2], Space::Shared);
    if (f->multicast) mask = d.src(d.arg(i++), Ty::B16);
    Inst& in = d.emit(bulkLoadH, Cls::Async, {dst, src, mbar, size, mask});
    in.aux = f.get();
    in.imm = (int64_t)disp;
    d.setExt(in, coords);
    return;
  }
  Operand dst, size;
  if (f->tensor)
    dst = tensorOperand(d.arg(0), disp[0]);
  else
    dst = d.addressBase(d.arg(0), disp[0], Space::Global);
  Operand src = d.addressBase(d.arg(1), disp[1], Space::Shared);
  if (!f->tensor) size = d.src(d.arg(2), Ty::B32);
  Inst& in = d.emit(bulkStoreH, Cls::Async, {dst, src, size});
  in.aux = f.get();
  in.imm = (int64_t)disp;
  d.setExt(in, coords);
}

void finishAsync(Block& b) {
  for (auto& w : b.warps)
    for (auto& s : w->bulkStores)
      noteHazard(*w, "the block ended while a bulk copy may still read its shared memory (no cp.async.bulk.wait_group)",
                 s.line, 0);
  for (auto& w : b.warps) runStores(*w, [](const PendingBulkStore&) { return true; });
  // Loads nobody waited for still touch memory.
  for (auto& w : b.warps) landAllCpAsync(*w, ~0u);
  while (!b.mbarPending.empty()) landMbarrier(b, b.mbarPending.begin()->first);
}

}  // namespace cudasim
