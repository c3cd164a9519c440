// Bulk and tensor copies out of shared memory. They read it when the issuing thread waits for the group, or at the end
// of the block; with a seed some at once.
#include "bulk_copy.h"
#include "tensor_box.h"

namespace cudasim {

// op: dst/map, src, size; ext: coordinates
void bulkStoreH(Warp& w, const Inst& I) {
  auto& f = *(const BulkInfo*)I.aux;
  uint64_t dstA[32], srcA[32];
  auto disp = (const int64_t*)I.imm;
  laneAddresses(w, I.op[0], disp[0], dstA);
  laneAddresses(w, I.op[1], disp[1], srcA);
  eachLane(w.m, [&](int i) {
    uint64_t src = plainShared(srcA[i]);
    checkAligned(src, f.tensor ? 128 : 16, i, "bulk copy source");
    TensorMap t;
    int32_t coord[5] = {};
    uint32_t bytes;
    if (f.tensor) {
      t = readMap(w, dstA[i], f.dims, i);
      for (int k = 0; k < f.dims; k++) coord[k] = w.reg<int32_t>(I.ext[k])[i];
      bytes = boxBytes(t);
    } else {
      bytes = w.reg<uint32_t>(I.op[2])[i];
      checkAligned(bytes, 16, i, "bulk copy size");
      checkAligned(dstA[i], 16, i, "bulk copy destination");
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

}  // namespace cudasim
