# MFX_CUTLASS_INCLUDE: the folder of CUTLASS's headers, which the sm_90a kernels are built on, or empty. MFX_CUTLASS_DIR
# names a checkout of CUTLASS or that folder; else it is looked for in the Python package nvidia-cutlass, which brings them.
set(MFX_CUTLASS_INCLUDE "")
foreach(folder "${MFX_CUTLASS_DIR}/include" "${MFX_CUTLASS_DIR}")
  if(MFX_CUTLASS_DIR AND NOT MFX_CUTLASS_INCLUDE AND EXISTS "${folder}/cute/arch/mma_sm90_gmma.hpp")
    set(MFX_CUTLASS_INCLUDE "${folder}")
  endif()
endforeach()
if(MFX_CUTLASS_DIR AND NOT MFX_CUTLASS_INCLUDE)
  message(FATAL_ERROR "MFX_CUTLASS_DIR=${MFX_CUTLASS_DIR} has no include/cute/arch/mma_sm90_gmma.hpp; see docs/build.md")
endif()
if(NOT MFX_CUTLASS_INCLUDE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as i; print(*i.find_spec('cutlass_library').submodule_search_locations)"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(folder AND EXISTS "${folder}/source/include/cute/arch/mma_sm90_gmma.hpp")
    set(MFX_CUTLASS_INCLUDE "${folder}/source/include")
  endif()
endif()
