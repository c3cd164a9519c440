// Layout (as found in the output of fatbinary): a 16-byte file header, then
// per entry a header whose size it states, followed by the payload. PTX
// payloads may be compressed with LZ4 or zstd.
#include "fatbin.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>

#include "fault.h"

namespace cudasim {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1, kFatbinMagic = 0xba55ed50;
constexpr uint16_t kKindPtx = 1;
constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;

struct Wrapper {
  uint32_t magic, version;
  const void* data;
  void* filename;
};
struct FileHeader {
  uint32_t magic;
  uint16_t version, headerSize;
  uint64_t size;
};
struct EntryHeader {
  uint16_t kind, version;
  uint32_t headerSize;
  uint64_t paddedSize;
  uint32_t compressedSize, optionsOffset;
  uint16_t minor, major;
  uint32_t arch;
  uint32_t nameOffset, nameSize;
  uint64_t flags;
  uint64_t zero;
  uint64_t uncompressedSize;
};

std::string lz4(const uint8_t* in, size_t n, size_t outSize) {
  std::string out;
  out.reserve(outSize);
  const uint8_t* end = in + n;
  auto length = [&](size_t v) {
    if (v == 15) {
      uint8_t b;
      do {
        if (in >= end) break;
        b = *in++;
        v += b;
      } while (b == 255);
    }
    return v;
  };
  while (in < end && out.size() < outSize) {
    uint8_t token = *in++;
    size_t lit = length(token >> 4);
    if (lit > (size_t)(end - in)) throw Fault(kFaultInvalidPtx, "corrupt LZ4 data in the fat binary");
    out.append((const char*)in, lit);
    in += lit;
    if (in >= end || out.size() >= outSize) break;
    if (end - in < 2) throw Fault(kFaultInvalidPtx, "corrupt LZ4 data in the fat binary");
    size_t dist = in[0] | in[1] << 8;
    in += 2;
    size_t len = length(token & 15) + 4;
    if (dist == 0 || dist > out.size()) throw Fault(kFaultInvalidPtx, "corrupt LZ4 data in the fat binary");
    for (size_t i = 0; i < len; i++) out.push_back(out[out.size() - dist]);
  }
  return out;
}

std::string zstd(const uint8_t* in, size_t n, size_t outSize) {
  using Fn = size_t (*)(void*, size_t, const void*, size_t);
  static Fn decompress = [] {
    void* lib = nullptr;
    for (const char* name : {"libzstd.so.1", "libzstd.so"})
      if ((lib = dlopen(name, RTLD_NOW))) break;
    return lib ? (Fn)dlsym(lib, "ZSTD_decompress") : nullptr;
  }();
  if (!decompress)
    throw Fault(kFaultInvalidPtx,
                "the embedded PTX is compressed with zstd and libzstd.so.1 is not installed; "
                "compile with `nvcc --no-compress` or `--compress-mode=speed`");
  std::string out(outSize, '\0');
  size_t r = decompress(&out[0], outSize, in, n);
  if (r > outSize) throw Fault(kFaultInvalidPtx, "corrupt zstd data in the fat binary");
  out.resize(r);
  return out;
}

}  // namespace

PtxImage imageOf(std::string text) {
  PtxImage im;
  size_t z = text.find('\0');
  if (z != std::string::npos) text.resize(z);
  size_t p = text.find(".target");
  p = p == std::string::npos ? p : text.find("sm_", p);
  if (p != std::string::npos) {
    p += 3;
    while (p < text.size() && text[p] >= '0' && text[p] <= '9') im.arch = im.arch * 10 + (text[p++] - '0');
    if (p < text.size() && (text[p] == 'a' || text[p] == 'f')) im.suffix = text[p];
  }
  im.text = std::move(text);
  return im;
}

std::vector<PtxImage> readFatbin(const void* ptr) {
  std::vector<PtxImage> out;
  auto* w = (const Wrapper*)ptr;
  if (w->magic != kWrapperMagic) throw Fault(kFaultInvalidPtx, "not a fat binary wrapper");
  auto* f = (const FileHeader*)w->data;
  if (f->magic != kFatbinMagic) throw Fault(kFaultInvalidPtx, "not a fat binary");
  const uint8_t* p = (const uint8_t*)f + f->headerSize;
  const uint8_t* end = p + f->size;
  while (p + sizeof(EntryHeader) <= end) {
    auto* e = (const EntryHeader*)p;
    const uint8_t* data = p + e->headerSize;
    if (e->kind == kKindPtx) {
      std::string text;
      if (e->flags & kFlagZstd)
        text = zstd(data, e->compressedSize, e->uncompressedSize);
      else if (e->flags & kFlagLz4)
        text = lz4(data, e->compressedSize, e->uncompressedSize);
      else
        text.assign((const char*)data, e->paddedSize);
      out.push_back(imageOf(std::move(text)));
    }
    p = data + e->paddedSize;
  }
  return out;
}

int chooseImage(const std::vector<PtxImage>& images, int arch) {
  int best = -1;
  for (size_t i = 0; i < images.size(); i++) {
    const PtxImage& m = images[i];
    if (m.arch > arch || (m.suffix == 'a' && m.arch != arch) || (m.suffix == 'f' && m.arch / 10 != arch / 10)) continue;
    if (best < 0 || m.arch > images[best].arch || (m.arch == images[best].arch && m.suffix)) best = (int)i;
  }
  return best;
}

}  // namespace cudasim
