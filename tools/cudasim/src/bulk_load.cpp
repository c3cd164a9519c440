// Bulk and tensor copies into shared memory. They land when somebody waits for their mbarrier; with a seed some land at
// once.
#include "bulk_copy.h"
#include "tensor_box.h"

namespace cudasim {

namespace {

void fillNan(uint8_t* p, uint32_t bytes, Ty t) {  // CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
  const uint64_t pattern = t == Ty::F16 || t == Ty::BF16 ? 0x7fff7fff7fff7fffull
                           : t == Ty::F32                ? 0x7fffffff7fffffffull
                                                         : 0x7fffffffffffffffull;
  for (uint32_t i = 0; i + 8 <= bytes; i += 8) memcpy(p + i, &pattern, 8);
}

}  // namespace

// op: dst, src/map, mbar, size, mask; ext: coordinates
void bulkLoadH(Warp& w, const Inst& I) {
  auto& f = *(const BulkInfo*)I.aux;
  uint64_t dstA[32], srcA[32], mbarA[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dstA);
  laneAddresses(w, I.op[1], disp[1], srcA);
  laneAddresses(w, I.op[2], disp[2], mbarA);
  eachLane(w.m, [&](int i) {
    uint64_t dst = plainShared(dstA[i]);
    checkAligned(dst, f.tensor ? 128 : 16, i, "bulk copy destination");
    int32_t coord[5] = {};
    TensorMap t;
    uint32_t bytes;
    if (f.tensor) {
      t = readMap(w, srcA[i], f.dims, i);
      for (int k = 0; k < f.dims; k++) coord[k] = w.reg<int32_t>(I.ext[k])[i];
      bytes = boxBytes(t);
    } else {
      bytes = w.reg<uint32_t>(I.op[3])[i];
      checkAligned(bytes, 16, i, "bulk copy size");
      checkAligned(srcA[i], 16, i, "bulk copy source");
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

}  // namespace cudasim
