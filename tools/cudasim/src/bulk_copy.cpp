// Bulk and tensor copies (PTX ISA, "Data Movement and Conversion Instructions:
// Bulk copy" and "Tensor copy"), st.async, red.async, tensormap.replace.
//
// Loads land when somebody waits for their mbarrier; with a seed some land at
// once. Stores read shared memory when the issuing thread waits for the group,
// or at the end of the block.
#include <algorithm>

#include "async.h"
#include "decoder.h"
#include "exec_memory.h"
#include "lanes.h"
#include "tensor_map.h"

namespace cudasim {

namespace {

// Async-proxy actor of a load that completes on an mbarrier.
struct Engine {
  VClock seen;
  int who = 0;
  uint32_t epoch = 0;
};
Engine makeEngine(Block& dst, uint32_t mbarOff, const VClock& issued) {
  Engine a;
  if (!dst.launch->raceOn) return a;
  a.seen = issued;
  a.who = asyncEngine(dst, mbarOff);
  a.epoch = ++dst.cluster->engineEpoch[a.who - dst.cluster->warpClocks];
  return a;
}
void completeOn(Block& dst, uint32_t mbarOff, const Engine& a, uint32_t bytes) {
  if (dst.launch->raceOn) {
    VClock c = a.seen;
    c[a.who] = std::max(c[a.who], a.epoch);
    MbarrierSync& y = dst.mbarSync[mbarOff];
    joinClock(y.vc, c);
    joinClock(y.proxy, c);
  }
  dst.launch->progress++;
  mbarCompleteTx(dst, mbarOff, bytes);
}
void writeShared(Block& b, uint32_t off, uint32_t bytes, const uint8_t* data, const Engine& a, int line) {
  if (b.launch->raceOn) {
    RaceActor r = {a.who, a.epoch, &a.seen, &a.seen, line};
    raceWrite(b, off, bytes, r, data);
  }
  memcpy(b.sharedPtr(off), data, bytes);
}

void queueLoad(Warp& w, Block& dst, uint32_t mbarOff, std::function<void()> f) {
  if (w.launch->asyncEarly())
    f();
  else
    queueOnMbarrier(dst, mbarOff, std::move(f));
}

void fillNan(uint8_t* p, uint32_t bytes, Ty t) {  // CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
  const uint64_t pattern = t == Ty::F16 || t == Ty::BF16 ? 0x7fff7fff7fff7fffull
                           : t == Ty::F32                ? 0x7fffffff7fffffffull
                                                         : 0x7fffffffffffffffull;
  for (uint32_t i = 0; i + 8 <= bytes; i += 8) memcpy(p + i, &pattern, 8);
}

// --- reductions
void reduceInto(uint8_t* dst, const uint8_t* src, uint32_t bytes, int op, Ty t) {
  const int es = tySize(t);
  for (uint32_t i = 0; i + es <= bytes; i += es) {
    uint64_t a = 0, b = 0;
    memcpy(&a, dst + i, es);
    memcpy(&b, src + i, es);
    uint64_t v = atomElement(op, t, a, b, 0);
    memcpy(dst + i, &v, es);
  }
}

// A bulk load is pending from its issue until it lands.
void markBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes, int line) {
  if (!w.launch->raceOn || !bytes) return;
  checkPending(w, b, off, bytes, line, true);
  markPending(b, off, bytes, w.clockId, line, 1, bytes);  // like no other source
}
void unmarkBulk(Warp& w, Block& b, uint32_t off, uint32_t bytes) {
  if (w.launch->raceOn && bytes) unmarkPending(b, off, bytes, w.clockId);
}

struct BulkInfo {
  bool tensor = false, toShared = false, fromShared = false, multicast = false, reduce = false;
  int dims = 0, redOp = 0;
  Ty redType = Ty::None;
  int line = 0;
};

uint32_t swizzleOffset(uint32_t addr, int mode) {  // CU_TENSOR_MAP_SWIZZLE: 1 = 32B, 2 = 64B, 3 = 128B
  switch (mode) {
    case 1: return addr ^ ((addr >> 3) & 0x10);
    case 2: return addr ^ ((addr >> 3) & 0x30);
    case 3: return addr ^ ((addr >> 3) & 0x70);
    default: return addr;
  }
}
Ty tensorType(int dtype) {
  static const Ty t[] = {Ty::U8,  Ty::U16, Ty::U32,  Ty::S32, Ty::U64, Ty::S64, Ty::F16,
                         Ty::F32, Ty::F64, Ty::BF16, Ty::F32, Ty::F32, Ty::F32};
  return t[dtype];
}

// Calls row(sharedOffset, globalAddress, validLo, validHi) for each innermost
// row of the box; valid elements are [lo, hi).
template <class F>
void eachRow(const TensorMap& t, const int32_t* coord, F row) {
  const int es = tensorElementBytes(t.dtype);
  uint32_t n[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < t.rank; i++) n[i] = (t.box[i] + t.elemStride[i] - 1) / t.elemStride[i];
  n[0] = t.box[0];  // the innermost element stride only matters for interleaved layouts
  uint32_t off = 0;
  for (uint32_t e = 0; e < n[4]; e++)
    for (uint32_t d = 0; d < n[3]; d++)
      for (uint32_t c = 0; c < n[2]; c++)
        for (uint32_t b = 0; b < n[1]; b++) {
          const uint32_t idx[5] = {0, b, c, d, e};
          bool inside = true;
          int64_t addr = (int64_t)t.address + (int64_t)coord[0] * es;
          for (int i = 1; i < t.rank; i++) {
            int64_t p = (int64_t)coord[i] + (int64_t)idx[i] * t.elemStride[i];
            inside &= p >= 0 && p < (int64_t)t.dim[i];
            addr += p * (int64_t)t.stride[i - 1];
          }
          int64_t lo = std::max<int64_t>(0, -(int64_t)coord[0]),
                  hi = std::min<int64_t>(n[0], (int64_t)t.dim[0] - coord[0]);
          if (!inside || hi < lo) lo = hi = 0;
          row(off, (uint64_t)addr, (uint32_t)lo, (uint32_t)hi);
          off += n[0] * es;
        }
}
uint32_t boxBytes(const TensorMap& t) {
  uint32_t v = tensorElementBytes(t.dtype);
  for (int i = 0; i < t.rank; i++) v *= i ? (t.box[i] + t.elemStride[i] - 1) / t.elemStride[i] : t.box[0];
  return v;
}

TensorMap readMap(Warp& w, uint64_t addr, int dims, int lane) {
  TensorMap t;
  memcpy(&t, resolveOne(w, Space::None, addr, 128, 64, Access::Read, lane), 128);
  if (t.magic != kTensorMapMagic)
    throw Fault(kFaultIllegalInstruction, "the operand is not a tensor map made by cuTensorMapEncodeTiled", lane);
  if (t.rank != dims)
    throw Fault(kFaultIllegalInstruction, format("a %d-dimensional copy uses a tensor map of rank %d", dims, t.rank),
                lane);
  return t;
}

void checkDst(uint64_t a, uint32_t align, int lane, const char* what) {
  if (a & (align - 1))
    throw Fault(kFaultMisaligned,
                format("%s address 0x%llx is not %u-byte aligned", what, (unsigned long long)a, align), lane);
}
uint64_t plainShared(uint64_t a) {
  return (a & kWindowMask) == kSharedWindow ? a & ~kWindowMask : a;
}

// --- loads into shared memory. op: dst, src/map, mbar, size, mask; ext: coordinates
void bulkLoadH(Warp& w, const Inst& I) {
  auto& f = *(const BulkInfo*)I.aux;
  uint64_t dstA[32], srcA[32], mbarA[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dstA);
  laneAddresses(w, I.op[1], disp[1], srcA);
  laneAddresses(w, I.op[2], disp[2], mbarA);
  eachLane(w.m, [&](int i) {
    uint64_t dst = plainShared(dstA[i]);
    checkDst(dst, f.tensor ? 128 : 16, i, "bulk copy destination");
    int32_t coord[5] = {};
    TensorMap t;
    uint32_t bytes;
    if (f.tensor) {
      t = readMap(w, srcA[i], f.dims, i);
      for (int k = 0; k < f.dims; k++) coord[k] = w.reg<int32_t>(I.ext[k])[i];
      bytes = boxBytes(t);
    } else {
      bytes = w.reg<uint32_t>(I.op[3])[i];
      checkDst(bytes, 16, i, "bulk copy size");
      checkDst(srcA[i], 16, i, "bulk copy source");
      if (!f.fromShared && bytes) checkGlobal(srcA[i], bytes, Access::Read, i, "bulk copy global");
    }
    std::vector<std::pair<Block*, uint32_t>> targets;  // block, destination offset
    uint32_t off;
    Block* first = sharedTarget(w, dst, bytes, i, off);
    MbarAddress mb = mbarAddress(w, mbarA[i], i);
    if (f.multicast) {
      uint32_t mask = I.op[4].width == 2 ? w.reg<uint16_t>(I.op[4])[i] : w.reg<uint32_t>(I.op[4])[i];
      for (size_t r = 0; r < w.block->cluster->blocks.size(); r++)
        if (mask >> r & 1) targets.push_back({w.block->cluster->blocks[r].get(), off});
      if (mask >> w.block->cluster->blocks.size())
        throw Fault(kFaultIllegalInstruction, format("multicast mask %x names blocks outside the cluster", mask), i);
    } else {
      targets.push_back({first, off});
      if (mb.block != first)
        throw Fault(kFaultIllegalInstruction, "the mbarrier of a bulk copy is not in the block of its destination", i);
    }
    w.st->bulkBytes += bytes;
    VClock issued = w.vc, issuedProxy = w.proxy;
    Warp* wp = &w;
    const int line = I.line;
    const bool reduce = f.reduce;
    for (auto& tg : targets) {
      Block* b = tg.first;
      uint32_t o = tg.second, mo = mb.off;
      if (f.fromShared) {
        if (w.launch->raceOn) {
          uint32_t so;
          Block* sb = sharedTarget(w, plainShared(srcA[i]), bytes, i, so);
          checkPending(w, *sb, so, bytes, line, false);
        }
      }
      if (!f.reduce) markBulk(w, *b, o, bytes, line);
      if (f.tensor) {
        const bool stat = &tg == &targets[0];
        queueLoad(w, *b, mo, [=] {
          if (!reduce) unmarkBulk(*wp, *b, o, bytes);
          Engine a = makeEngine(*b, mo, issued);
          const int es = tensorElementBytes(t.dtype);
          const uint32_t inner = t.box[0] * es;
          std::vector<uint8_t> row(inner);
          eachRow(t, coord, [&](uint32_t so, uint64_t ga, uint32_t lo, uint32_t hi) {
            memset(row.data(), 0, inner);
            if (t.oobNan && (lo > 0 || hi < t.box[0])) fillNan(row.data(), inner, tensorType(t.dtype));
            if (hi > lo) {
              checkGlobal(ga + lo * es, (hi - lo) * es, Access::Read, i, "tensor copy global");
              memcpy(&row[lo * es], (const void*)(ga + lo * es), (hi - lo) * es);
              if (stat) wp->st->readSet.touch(ga + lo * es, (hi - lo) * es);
            }
            for (uint32_t c = 0; c < inner; c += 16)
              writeShared(*b, swizzleOffset(o + so + c, t.swizzle), 16, &row[c], a, line);
          });
          completeOn(*b, mo, a, bytes);
        });
      } else if (f.fromShared) {
        uint64_t src = plainShared(srcA[i]);
        uint32_t so;
        Block* sb = sharedTarget(w, src, bytes, i, so);
        queueLoad(w, *b, mo, [=] {
          if (!reduce) unmarkBulk(*wp, *b, o, bytes);
          Engine a = makeEngine(*b, mo, issued);
          if (sb->launch->raceOn)
            raceRead(*sb, so, bytes, {wp->clockId, wp->vc[wp->clockId], &issued, &issuedProxy, line});
          if (f.reduce) {
            std::vector<uint8_t> v(b->sharedPtr(o), b->sharedPtr(o) + bytes);
            reduceInto(v.data(), sb->sharedPtr(so), bytes, f.redOp, f.redType);
            memcpy(b->sharedPtr(o), v.data(), bytes);
          } else {
            std::vector<uint8_t> v(sb->sharedPtr(so), sb->sharedPtr(so) + bytes);
            writeShared(*b, o, bytes, v.data(), a, line);
          }
          completeOn(*b, mo, a, bytes);
        });
      } else {
        uint64_t src = srcA[i];
        if (&tg == &targets[0]) w.st->readSet.touch(src, bytes);
        queueLoad(w, *b, mo, [=] {
          if (!reduce) unmarkBulk(*wp, *b, o, bytes);
          Engine a = makeEngine(*b, mo, issued);
          if (bytes) writeShared(*b, o, bytes, (const uint8_t*)src, a, line);
          completeOn(*b, mo, a, bytes);
        });
      }
    }
  });
}

// --- stores from shared memory. op: dst/map, src, size; ext: coordinates
void bulkStoreH(Warp& w, const Inst& I) {
  auto& f = *(const BulkInfo*)I.aux;
  uint64_t dstA[32], srcA[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dstA);
  laneAddresses(w, I.op[1], disp[1], srcA);
  eachLane(w.m, [&](int i) {
    uint64_t src = plainShared(srcA[i]);
    checkDst(src, f.tensor ? 128 : 16, i, "bulk copy source");
    TensorMap t;
    int32_t coord[5] = {};
    uint32_t bytes;
    if (f.tensor) {
      t = readMap(w, dstA[i], f.dims, i);
      for (int k = 0; k < f.dims; k++) coord[k] = w.reg<int32_t>(I.ext[k])[i];
      bytes = boxBytes(t);
    } else {
      bytes = w.reg<uint32_t>(I.op[2])[i];
      checkDst(bytes, 16, i, "bulk copy size");
      checkDst(dstA[i], 16, i, "bulk copy destination");
      if (bytes) checkGlobal(dstA[i], bytes, Access::Write, i, "bulk copy global");
    }
    uint32_t off;
    Block* b = sharedTarget(w, src, bytes, i, off);
    if (w.launch->raceOn && bytes) checkPending(w, *b, off, bytes, I.line, false);
    w.st->bulkBytes += bytes;
    VClock issued = w.vc, issuedProxy = w.proxy;
    Warp* wp = &w;
    const uint64_t dst = dstA[i];
    const int line = I.line;
    const BulkInfo info = f;
    PendingBulkStore p;
    p.lane = i;
    p.group = w.bulkGroup[i];
    p.line = line;
    p.run = [=] {
      auto readShared = [&](uint32_t o, uint32_t n) {
        if (b->launch->raceOn) raceRead(*b, o, n, {wp->clockId, wp->vc[wp->clockId], &issued, &issuedProxy, line});
        return b->sharedPtr(o);
      };
      auto put = [&](uint64_t ga, const uint8_t* data, uint32_t n, Ty ty) {
        wp->st->writeSet.touch(ga, n);
        if (info.reduce) {
          AtomicLock lock(*wp);
          reduceInto((uint8_t*)ga, data, n, info.redOp, ty);
        } else
          memcpy((void*)ga, data, n);
      };
      wp->launch->progress++;
      if (!info.tensor) {
        if (bytes) put(dst, readShared(off, bytes), bytes, info.redType);
        return;
      }
      const int es = tensorElementBytes(t.dtype);
      const uint32_t inner = t.box[0] * es;
      std::vector<uint8_t> row(inner);
      eachRow(t, coord, [&](uint32_t so, uint64_t ga, uint32_t lo, uint32_t hi) {
        for (uint32_t c = 0; c < inner; c += 16)
          memcpy(&row[c], readShared(swizzleOffset(off + so + c, t.swizzle), 16), 16);
        if (hi <= lo) return;
        checkGlobal(ga + lo * es, (hi - lo) * es, Access::Write, i, "tensor copy global");
        put(ga + lo * es, &row[lo * es], (hi - lo) * es, tensorType(t.dtype));
      });
    };
    if (w.launch->asyncEarly()) {
      p.run();
      p.run = [] {};  // still to be waited for
    }
    w.bulkStores.push_back(std::move(p));
  });
}
void runStores(Warp& w, const std::function<bool(const PendingBulkStore&)>& due) {
  for (size_t k = 0; k < w.bulkStores.size();) {
    if (!due(w.bulkStores[k])) {
      k++;
      continue;
    }
    PendingBulkStore p = std::move(w.bulkStores[k]);
    w.bulkStores.erase(w.bulkStores.begin() + k);
    p.run();
  }
}
void bulkCommitH(Warp& w, const Inst&) {
  eachLane(w.m, [&](int i) { w.bulkGroup[i]++; });
}
void bulkWaitH(Warp& w, const Inst& I) {
  const uint32_t n = (uint32_t)I.imm, m = w.m;
  runStores(w, [&](const PendingBulkStore& p) { return (m >> p.lane & 1) && p.group + n < w.bulkGroup[p.lane]; });
}
void nopH(Warp&, const Inst&) {}

int64_t* keepDisps(Decoder& d) {
  auto v = std::make_shared<std::vector<int64_t>>(3, 0);
  d.kernel().auxStore.push_back(v);
  return v->data();
}

// --- st.async, red.async. op: address, mbar; ext: values
void asyncStoreH(Warp& w, const Inst& I) {
  uint64_t addr[32], mbar[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], addr);
  laneAddresses(w, I.op[1], disp[1], mbar);
  const Ty t = (Ty)I.sub;
  const int es = tySize(t), n = I.next, op = I.sub2;
  const bool red = I.sub3;
  eachLane(w.m, [&](int i) {
    uint64_t a = plainShared(addr[i]);
    checkDst(a, es * n, i, "asynchronous store");
    uint32_t off;
    Block* b = sharedTarget(w, a, es * n, i, off);
    MbarAddress mb = mbarAddress(w, mbar[i], i);
    if (mb.block != b) throw Fault(kFaultIllegalInstruction, "the mbarrier is not in the block of the destination", i);
    std::vector<uint8_t> v(es * n);
    for (int k = 0; k < n; k++) memcpy(&v[k * es], w.reg<uint8_t>(I.ext[k]) + i * I.ext[k].width, es);
    VClock issued = w.vc;
    const int line = I.line;
    uint32_t mo = mb.off;
    Warp* wp = &w;
    if (!red) markBulk(w, *b, off, es * n, line);
    queueLoad(w, *b, mo, [=] {
      if (!red) unmarkBulk(*wp, *b, off, es * n);
      Engine ag = makeEngine(*b, mo, issued);
      if (red)
        reduceInto(b->sharedPtr(off), v.data(), es * n, op, t);
      else
        writeShared(*b, off, es * n, v.data(), ag, line);
      completeOn(*b, mo, ag, es * n);
    });
  });
}
void decodeAsyncStore(Decoder& d, bool red) {
  Ty t = d.type();
  std::vector<Operand> vals;
  if (d.arg(1).kind == PtxOperand::Vector)
    for (auto& e : d.arg(1).list) vals.push_back(d.src(e, t));
  else
    vals.push_back(d.src(d.arg(1), t));
  int64_t* disp = keepDisps(d);
  Operand a = d.addressBase(d.arg(0), disp[0], Space::Shared), m = d.addressBase(d.arg(2), disp[1], Space::Shared);
  int op = red ? parseAtomOp(d) : 0;
  Inst& in = d.emit(asyncStoreH, Cls::Async, {a, m});
  in.imm = (int64_t)disp;
  in.sub = (uint8_t)t;
  in.sub2 = (uint8_t)op;
  in.sub3 = red;
  d.setExt(in, vals);
}

}  // namespace

void decodeStAsync(Decoder& d) {
  decodeAsyncStore(d, false);
}
void decodeRedAsync(Decoder& d) {
  decodeAsyncStore(d, true);
}

// st.bulk.weak.shared::cta [a], size, 0: zeroes shared memory.
static void stBulkH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) {
    uint32_t n = I.op[1].width == 8 ? (uint32_t)w.reg<uint64_t>(I.op[1])[i] : w.reg<uint32_t>(I.op[1])[i], off;
    Block* b = sharedTarget(w, plainShared(addr[i]), n, i, off);
    std::vector<uint8_t> zero(n);
    if (w.launch->raceOn) {
      checkPending(w, *b, off, n, I.line, true);
      raceWrite(*b, off, n, actorOf(w, I.line), zero.data());
    }
    memset(b->sharedPtr(off), 0, n);
  });
}
void decodeStBulk(Decoder& d) {
  int64_t disp;
  Operand a = d.addressBase(d.arg(0), disp, Space::Shared), n = d.src(d.arg(1), Ty::B64);
  d.emit(stBulkH, Cls::LdStShared, {a, n}).imm = disp;
}

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

namespace {

// --- tensormap.replace, tensormap.cp_fenceproxy
enum Field : uint8_t { FAddress, FRank, FBox, FDim, FStride, FElemStride, FType, FInterleave, FSwizzle, FFill };
void replaceH(Warp& w, const Inst& I) {
  uint64_t addr[32];
  laneAddresses(w, I.op[0], I.imm, addr);
  eachLane(w.m, [&](int i) {
    TensorMap* t = (TensorMap*)resolveOne(w, (Space)I.sub2, addr[i], 128, 64, Access::Write, i);
    if (t->magic != kTensorMapMagic) {  // zeroed memory is a map whose fields are still to be set
      static const TensorMap zero = {};
      if (memcmp(t, &zero, sizeof zero))
        throw Fault(kFaultIllegalInstruction, "tensormap.replace on memory that holds no tensor map", i);
      t->magic = kTensorMapMagic;
      t->rank = 1;
      for (auto& e : t->elemStride) e = 1;
    }
    uint64_t v = I.op[1].width == 8 ? w.reg<uint64_t>(I.op[1])[i] : w.reg<uint32_t>(I.op[1])[i];
    const int o = (int)I.imm2;
    static const uint8_t types[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};  // PTX order to CUtensorMapDataType
    switch ((Field)I.sub) {
      case FAddress: t->address = v; break;
      case FRank: t->rank = (uint8_t)(v + 1); break;
      case FBox: t->box[o] = (uint16_t)v; break;
      case FDim: t->dim[o] = (uint32_t)v; break;
      case FStride: t->stride[o] = v; break;
      case FElemStride: t->elemStride[o] = (uint8_t)v; break;
      case FType:
        if (v >= sizeof types) throw Fault(kFaultIllegalInstruction, "tensor element type not supported", i);
        t->dtype = types[v];
        break;
      case FInterleave: t->interleave = (uint8_t)v; break;
      case FSwizzle: t->swizzle = (uint8_t)v; break;
      case FFill: t->oobNan = (uint8_t)v; break;
    }
  });
  w.launch->progress++;
}
void copyMapH(Warp& w, const Inst& I) {
  if (!converge(w, ~0u)) return;
  uint64_t dst[32], src[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dst);
  laneAddresses(w, I.op[1], disp[1], src);
  int i = w.firstLane();
  uint8_t* d = resolveOne(w, Space::Global, dst[i], 128, 128, Access::Write, i);
  memcpy(d, resolveOne(w, Space::Shared, plainShared(src[i]), 128, 128, Access::Read, i), 128);
  w.launch->progress++;
}
OpcodeEntry eTensormap({"tensormap"}, [](Decoder& d) {
  if (d.mod(1, "cp_fenceproxy")) {
    int64_t* disp = keepDisps(d);
    Operand a = d.addressBase(d.arg(0), disp[0], Space::Global), b = d.addressBase(d.arg(1), disp[1], Space::Shared);
    d.emit(copyMapH, Cls::Async, {a, b}).imm = (int64_t)disp;
    return;
  }
  static const std::map<std::string, int> fields = {{"global_address", FAddress},
                                                    {"rank", FRank},
                                                    {"box_dim", FBox},
                                                    {"global_dim", FDim},
                                                    {"global_stride", FStride},
                                                    {"element_stride", FElemStride},
                                                    {"elemtype", FType},
                                                    {"interleave_layout", FInterleave},
                                                    {"swizzle_mode", FSwizzle},
                                                    {"fill_mode", FFill}};
  auto it = d.p->op.size() > 3 ? fields.find(d.p->op[3]) : fields.end();
  if (!d.mod(1, "replace") || !d.mod(2, "tile") || it == fields.end()) d.fail("unknown tensormap instruction");
  // The address may be 64-bit although it names shared memory.
  Space sp = d.has("global") ? Space::Global : d.has("shared::cta") ? Space::Shared : Space::None;
  int64_t disp;
  Operand a = d.addressBase(d.arg(0), disp, sp);
  bool ord = d.nargs() == 3;
  Operand v = d.src(d.arg(ord ? 2 : 1), d.has("b64") ? Ty::B64 : Ty::B32);
  Inst& in = d.emit(replaceH, Cls::Async, {a, v});
  in.imm = disp;
  in.imm2 = ord ? (int64_t)d.arg(1).bits : 0;
  in.sub = (uint8_t)it->second;
  in.sub2 = (uint8_t)sp;
});

}  // namespace
}  // namespace cudasim
