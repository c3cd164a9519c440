#include "stats.h"

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "machine.h"

namespace cudasim {

void Footprint::touch(uint64_t addr, uint32_t bytes) {
  while (bytes) {
    uint64_t key = addr >> 12;
    uint32_t o = addr & 4095, n = std::min(bytes, 4096 - o);
    if (key != lastKey_) {
      last_ = &pages_[key];  // value-initialised when new; references stay valid
      lastKey_ = key;
    }
    addr += n;
    bytes -= n;
    while (n) {
      uint32_t b = o & 63, k = std::min(n, 64 - b);
      last_->bits[o >> 6] |= (k == 64 ? ~0ull : ((1ull << k) - 1)) << b;
      o += k;
      n -= k;
    }
  }
}
uint64_t Footprint::count() const {
  uint64_t c = 0;
  for (auto& p : pages_)
    for (uint64_t b : p.second.bits) c += __builtin_popcountll(b);
  return c;
}

void Footprint::merge(const Footprint& o) {
  for (auto& p : o.pages_) {
    Page& q = pages_[p.first];
    for (int i = 0; i < 64; i++) q.bits[i] |= p.second.bits[i];
  }
}
void Stats::merge(const Stats& o) {
  for (int i = 0; i < (int)Cls::Count; i++) cls[i] += o.cls[i];
  uint64_t Stats::* sums[] = {&Stats::warpInsts,
                              &Stats::threadInsts,
                              &Stats::mmaFlops,
                              &Stats::globalLoadRequests,
                              &Stats::globalStoreRequests,
                              &Stats::globalLoadSectors,
                              &Stats::globalStoreSectors,
                              &Stats::atomics,
                              &Stats::sharedRequests,
                              &Stats::sharedWavefronts,
                              &Stats::sharedExcess,
                              &Stats::cpAsyncBytes,
                              &Stats::bulkBytes,
                              &Stats::barriers,
                              &Stats::races,
                              &Stats::uninitReads};
  for (auto m : sums) this->*m += o.*m;
  readSet.merge(o.readSet);
  writeSet.merge(o.writeSet);
}

uint32_t countSectors(const uint64_t* addr, uint32_t mask, uint32_t bytes) {
  uint64_t s[32];
  int n = 0;
  bool sorted = true;
  uint32_t extra = 0;
  for (uint32_t m = mask; m; m &= m - 1) {
    int i = __builtin_ctz(m);
    uint64_t v = addr[i] >> 5;
    if (bytes > 32) extra += (bytes - 1) / 32;  // aligned, so it covers whole sectors
    if (n && v < s[n - 1]) sorted = false;
    if (n && v == s[n - 1]) continue;
    s[n++] = v;
  }
  if (!sorted) {
    std::sort(s, s + n);
    n = (int)(std::unique(s, s + n) - s);
  }
  return n + extra;
}

void bankWavefronts(const uint32_t* off, uint32_t mask, uint32_t bytes, uint32_t& waves, uint32_t& ideal) {
  // Wide accesses are served in phases of 16 (8 B) or 8 (16 B) lanes.
  const int words = bytes <= 4 ? 1 : (int)bytes / 4;
  const int lanes = 32 / words;
  waves = ideal = 0;
  for (int base = 0; base < 32; base += lanes) {
    uint32_t pm = mask >> base & (lanes == 32 ? ~0u : (1u << lanes) - 1);
    if (!pm) continue;
    ideal++;
    // Fast path: consecutive words.
    if (pm == (lanes == 32 ? ~0u : (1u << lanes) - 1)) {
      bool linear = true;
      for (int i = 1; i < lanes; i++) linear &= off[base + i] == off[base] + (uint32_t)i * words * 4;
      if (linear && words * 4 == (int)std::max<uint32_t>(bytes, 4)) {
        waves++;
        continue;
      }
    }
    uint32_t seen[32][8];
    uint8_t count[32] = {};
    uint32_t worst = 1;
    for (uint32_t m = pm; m; m &= m - 1) {
      int i = base + __builtin_ctz(m);
      for (int k = 0; k < words; k++) {
        uint32_t word = (off[i] >> 2) + k, bank = word & 31;
        int c = count[bank], j = 0;
        for (; j < c && j < 8; j++)
          if (seen[bank][j] == word) break;
        if (j < c && j < 8) continue;
        if (c < 8) seen[bank][c] = word;
        count[bank]++;
        worst = std::max<uint32_t>(worst, count[bank]);
      }
    }
    waves += worst;
  }
}

namespace {
std::mutex g_mutex;
std::vector<std::string> g_records;
std::string escape(const std::string& s) {
  std::string o;
  for (char c : s) {
    if (c == '"' || c == '\\') o += '\\';
    o += c;
  }
  return o;
}
}  // namespace

std::string Stats::json() const {
  std::string s = "{\"kernel\": \"" + escape(kernel) + "\"";
  auto dim = [&](const char* n, const uint32_t* d) { s += format(", \"%s\": [%u, %u, %u]", n, d[0], d[1], d[2]); };
  auto num = [&](const char* n, uint64_t v) { s += format(", \"%s\": %llu", n, (unsigned long long)v); };
  dim("grid", grid);
  dim("block", block);
  dim("cluster", cluster);
  num("dynamic_smem", dynamicShared);
  num("static_smem", staticShared);
  num("warp_instructions", warpInsts);
  num("thread_instructions", threadInsts);
  s += format(", \"mean_active_lanes\": %.4f", warpInsts ? (double)threadInsts / warpInsts : 0.0);
  s += ", \"issued\": {";
  for (int i = 0; i < (int)Cls::Count; i++)
    s += format("%s\"%s\": %llu", i ? ", " : "", clsName((Cls)i), (unsigned long long)cls[i]);
  s += "}";
  num("mma_flops", mmaFlops);
  num("global_load_requests", globalLoadRequests);
  num("global_store_requests", globalStoreRequests);
  num("global_load_sectors", globalLoadSectors);
  num("global_store_sectors", globalStoreSectors);
  num("unique_bytes_read", readSet.count());
  num("unique_bytes_written", writeSet.count());
  num("atomics", atomics);
  num("shared_requests", sharedRequests);
  num("shared_wavefronts", sharedWavefronts);
  num("shared_excess_wavefronts", sharedExcess);
  num("cp_async_bytes", cpAsyncBytes);
  num("bulk_bytes", bulkBytes);
  num("barriers", barriers);
  num("races", races);
  num("uninitialised_shared_reads", uninitReads);
  s += format(", \"seconds\": %.6f}", seconds);
  return s;
}

static std::string join() {
  std::string s = "[";
  for (size_t i = 0; i < g_records.size(); i++) s += (i ? ",\n " : "\n ") + g_records[i];
  return s + "\n]\n";
}
void recordStats(const Stats& st) {
  std::lock_guard<std::mutex> g(g_mutex);
  static bool atExit = false;
  g_records.push_back(st.json());
  if (!atExit && !config().statsFile.empty()) {
    atExit = true;
    atexit([] {
      if (FILE* f = fopen(config().statsFile.c_str(), "w")) {
        std::string s = allStatsJson();
        fwrite(s.data(), 1, s.size(), f);
        fclose(f);
      }
    });
  }
}
std::string allStatsJson() {
  std::lock_guard<std::mutex> g(g_mutex);
  return join();
}
void resetStats() {
  std::lock_guard<std::mutex> g(g_mutex);
  g_records.clear();
}

}  // namespace cudasim
