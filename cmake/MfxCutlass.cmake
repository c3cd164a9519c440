# CUTLASS is header-only and comes from PyPI; see third_party/README.md.
if(MFX_CUTLASS_DIR)
  set(MFX_CUTLASS_INCLUDE "${MFX_CUTLASS_DIR}")
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.util, pathlib
spec = importlib.util.find_spec("cutlass_library")
print(pathlib.Path(spec.origin).parent / "source" / "include" if spec else "", end="")
]]
    OUTPUT_VARIABLE MFX_CUTLASS_INCLUDE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${MFX_CUTLASS_INCLUDE}/cutlass/cutlass.h")
  message(FATAL_ERROR
    "The CUDA kernels need the CUTLASS headers (looked in '${MFX_CUTLASS_INCLUDE}'). Install them with "
    "`pip install --no-deps nvidia-cutlass==4.2.0.0`, set MFX_CUTLASS_DIR to a CUTLASS include directory, or build "
    "without CUDA kernels (MFX_CUDA=OFF).")
endif()
