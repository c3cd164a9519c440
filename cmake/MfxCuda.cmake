# CUDA kernels and launchers: a torch-free shared library, linked to the shared cudart, opened by _C when first
# needed. No GPU is looked for, except by MFX_NATIVE. Sources are csrc/*/*_cuda.cu.
set(MFX_CUDA_STATUS "off")
install(CODE [[file(REMOVE "${CMAKE_INSTALL_PREFIX}/libmoduleformer_ext_cuda.so")]])  # an earlier build's
if(MFX_CUDA STREQUAL "OFF" OR (MFX_CUDA STREQUAL "AUTO" AND MFX_NATIVE AND NOT EXISTS /dev/nvidiactl))
  return()
endif()
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # not found by an earlier configuration: it may have come since
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MFX_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MFX_CUDA=ON, but no nvcc was found. Put it on PATH, or set CUDACXX to it.")
  endif()
  set(MFX_CUDA_STATUS "off (no nvcc found)")
  return()
endif()
if(MFX_CUDA_ARCHS)
  set(CMAKE_CUDA_ARCHITECTURES ${MFX_CUDA_ARCHS})
elseif(MFX_NATIVE)
  set(CMAKE_CUDA_ARCHITECTURES native)
else()
  set(CMAKE_CUDA_ARCHITECTURES 80 90a)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
enable_language(CUDA)
if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
  if(NOT CMAKE_CUDA_ARCHITECTURES_NATIVE)
    message(FATAL_ERROR "MFX_NATIVE: nvcc finds no GPU to build for; name its architecture in MFX_CUDA_ARCHS")
  endif()
  # From Hopper on, an architecture's own instructions (wgmma, ...) are in its "a" variant alone.
  string(REGEX REPLACE "(90|1[0-9][0-9])-real" "\\1a-real" CMAKE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
endif()
string(REGEX MATCH "^[0-9]+" MFX_CUDA_MAJOR "${CMAKE_CUDA_COMPILER_VERSION}")
if(MFX_TORCH_CUDA AND NOT MFX_TORCH_CUDA MATCHES "^${MFX_CUDA_MAJOR}\\.")
  message(WARNING
    "nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, torch ${MFX_TORCH_VERSION} is built for CUDA ${MFX_TORCH_CUDA}: the "
    "kernels will need libcudart.so.${MFX_CUDA_MAJOR}, which this torch does not bring. Put the nvcc of the same major "
    "version on PATH (or set CUDACXX to it), or install a torch for CUDA ${MFX_CUDA_MAJOR}.")
endif()
set_source_files_properties(csrc/bindings/cuda_library.cpp PROPERTIES
  COMPILE_DEFINITIONS MFX_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")

list(JOIN CMAKE_CUDA_ARCHITECTURES " " MFX_CUDA_ARCH_NAMES)
file(GLOB MFX_CUDA_SOURCES CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
add_library(moduleformer_ext_cuda SHARED ${MFX_CUDA_SOURCES})
target_include_directories(moduleformer_ext_cuda PRIVATE "${CMAKE_SOURCE_DIR}/include" "${CMAKE_SOURCE_DIR}/csrc")
# -DNDEBUG whatever the build type: assert() calls make ptxas serialise wgmma.
target_compile_definitions(moduleformer_ext_cuda PRIVATE NDEBUG MFX_CUDA_ARCHS="${MFX_CUDA_ARCH_NAMES}")
target_compile_options(moduleformer_ext_cuda PRIVATE -O3 --expt-relaxed-constexpr)
install(TARGETS moduleformer_ext_cuda LIBRARY DESTINATION .)
set(MFX_CUDA_STATUS "${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
