// Fat binaries as nvcc embeds them.
#pragma once
#include <string>
#include <vector>

namespace cudasim {
struct PtxImage {
  std::string text;
  int arch = 0;     // 80, 90, ...
  char suffix = 0;  // 'a' or 'f' for architecture- or family-specific targets
};
// PTX images of the fat binary a __fatBinC_Wrapper_t points to.
std::vector<PtxImage> readFatbin(const void* wrapper);
// The image that fits best: the highest not above `arch`, 'a' only when equal. -1 if none.
int chooseImage(const std::vector<PtxImage>& images, int arch);
PtxImage imageOf(std::string text);
}  // namespace cudasim
