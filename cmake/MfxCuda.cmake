# CUDA kernels and launchers: a torch-free shared library, linked to the shared cudart, opened by _C when first
# needed. No GPU is looked for, except by MFX_NATIVE. Sources are csrc/*/*_cuda.cu; of these *_sm90_cuda.cu are compiled
# for sm_90a alone, where that is asked for and CUTLASS is found.
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
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)  # PTX of sm_80 for GPUs to come, and those that are not named
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
enable_language(CUDA)
if(NOT MFX_CUDA_ARCHS AND NOT MFX_NATIVE AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real 120-real)  # Blackwell would compile PTX for a minute
endif()
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
set(MFX_SM90_SOURCES ${MFX_CUDA_SOURCES})
list(FILTER MFX_SM90_SOURCES INCLUDE REGEX "_sm90_cuda\\.cu$")
list(REMOVE_ITEM MFX_CUDA_SOURCES ${MFX_SM90_SOURCES})
include(MfxCutlass)  # MFX_CUTLASS_INCLUDE: CUTLASS's headers, or empty

# What every CUDA source is compiled with.
add_library(mfx_cuda_flags INTERFACE)
target_include_directories(mfx_cuda_flags INTERFACE "${CMAKE_SOURCE_DIR}/include" "${CMAKE_SOURCE_DIR}/csrc")
# -DNDEBUG whatever the build type: assert() calls make ptxas serialise wgmma.
target_compile_definitions(mfx_cuda_flags INTERFACE NDEBUG MFX_CUDA_ARCHS="${MFX_CUDA_ARCH_NAMES}")
target_compile_options(mfx_cuda_flags INTERFACE -O3 --expt-relaxed-constexpr $<$<BOOL:${MFX_LINEINFO}>:-lineinfo>)

add_library(moduleformer_ext_cuda SHARED ${MFX_CUDA_SOURCES})
target_link_libraries(moduleformer_ext_cuda PRIVATE mfx_cuda_flags)
install(TARGETS moduleformer_ext_cuda LIBRARY DESTINATION .)

set(MFX_SM90_STATUS "no sm_90a kernels: 90a is not among the architectures")
set(MFX_SM90_ARCHS ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER MFX_SM90_ARCHS INCLUDE REGEX "^90a")
if(MFX_SM90_ARCHS AND NOT MFX_CUTLASS_INCLUDE)
  set(MFX_SM90_STATUS "no sm_90a kernels: no CUTLASS was found, see docs/build.md")
elseif(MFX_SM90_ARCHS)
  # PTX of 90a runs on that architecture alone and never gets newer: a GPU needs the machine code, the emulated device
  # the PTX.
  list(TRANSFORM MFX_SM90_ARCHS REPLACE "^90a$" "90a-real")
  set(MFX_SM90_STATUS "sm_90a kernels on CUTLASS's headers")
  add_library(mfx_sm90 OBJECT ${MFX_SM90_SOURCES})
  set_target_properties(mfx_sm90 PROPERTIES CUDA_ARCHITECTURES "${MFX_SM90_ARCHS}")
  target_include_directories(mfx_sm90 SYSTEM PRIVATE "${MFX_CUTLASS_INCLUDE}")
  target_link_libraries(mfx_sm90 PRIVATE mfx_cuda_flags)
  target_link_libraries(moduleformer_ext_cuda PRIVATE mfx_sm90)
  set_source_files_properties(
    csrc/grouped_gemm/launches_cuda.cu csrc/stick_attention/stick_attention_forward_cuda.cu
    csrc/stick_attention/stick_attention_backward_cuda.cu
    PROPERTIES COMPILE_DEFINITIONS MFX_SM90)
endif()
# Beside PTX of another architecture that of 90a is for these alone.
set(MFX_OTHER_ARCHS ${CMAKE_CUDA_ARCHITECTURES})
list(REMOVE_ITEM MFX_OTHER_ARCHS 90a-virtual)
if(MFX_OTHER_ARCHS)
  set_target_properties(moduleformer_ext_cuda PROPERTIES CUDA_ARCHITECTURES "${MFX_OTHER_ARCHS}")
endif()
set_source_files_properties(csrc/core/build_info_cuda.cu PROPERTIES
  COMPILE_DEFINITIONS MFX_SM90_STATUS="${MFX_SM90_STATUS}")
set(MFX_CUDA_STATUS "${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}, ${MFX_SM90_STATUS}")
