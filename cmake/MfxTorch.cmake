# An own interface target instead of find_package(Torch): the latter needs a full CUDA toolkit whenever torch was
# built with CUDA, even for code that never touches it.
file(STRINGS "${CMAKE_SOURCE_DIR}/pyproject.toml" MFX_DEPENDENCIES REGEX "^dependencies")
string(REGEX MATCH "torch>=([0-9.]+)" _ "${MFX_DEPENDENCIES}")
set(MFX_OLDEST_TORCH "${CMAKE_MATCH_1}")
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c [[
import torch
from torch.utils.cpp_extension import include_paths, library_paths
print(torch.__version__, int(torch._C._GLIBCXX_USE_CXX11_ABI), torch.version.cuda or "", sep="|")
print(";".join(include_paths(device_type="cpu")))
print(";".join(library_paths(device_type="cpu")))
]]
  OUTPUT_VARIABLE MFX_TORCH_QUERY RESULT_VARIABLE MFX_TORCH_RESULT ERROR_VARIABLE MFX_TORCH_ERROR)
if(NOT MFX_TORCH_RESULT EQUAL 0)
  message(FATAL_ERROR
    "moduleformer_ext is built against the torch that is installed for ${Python_EXECUTABLE}, and it cannot be "
    "imported there:\n${MFX_TORCH_ERROR}\nInstall torch >= ${MFX_OLDEST_TORCH} first, then build with "
    "`pip install --no-build-isolation .`")
endif()
string(REGEX REPLACE "\n+$" "" MFX_TORCH_QUERY "${MFX_TORCH_QUERY}")
string(REGEX MATCH "^([^|]+)\\|([01])\\|([0-9.]*)\n([^\n]*)\n([^\n]*)$" _ "${MFX_TORCH_QUERY}")
set(MFX_TORCH_VERSION "${CMAKE_MATCH_1}")
set(MFX_TORCH_CXX11_ABI "${CMAKE_MATCH_2}")
set(MFX_TORCH_CUDA "${CMAKE_MATCH_3}")  # empty: a CPU build
set(MFX_TORCH_INCLUDES "${CMAKE_MATCH_4}")
set(MFX_TORCH_LIBDIRS "${CMAKE_MATCH_5}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" MFX_TORCH_RELEASE "${MFX_TORCH_VERSION}")
if(MFX_TORCH_RELEASE VERSION_LESS MFX_OLDEST_TORCH)
  message(FATAL_ERROR "moduleformer_ext needs torch >= ${MFX_OLDEST_TORCH}, found ${MFX_TORCH_VERSION} for ${Python_EXECUTABLE}")
endif()

find_package(OpenMP REQUIRED COMPONENTS CXX)  # at::parallel_for is serial without it, silently
add_library(mfx_torch INTERFACE)
target_include_directories(mfx_torch SYSTEM INTERFACE ${MFX_TORCH_INCLUDES})
target_link_directories(mfx_torch INTERFACE ${MFX_TORCH_LIBDIRS})
target_link_libraries(mfx_torch INTERFACE c10 torch_cpu torch torch_python OpenMP::OpenMP_CXX)
target_compile_definitions(mfx_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${MFX_TORCH_CXX11_ABI})
target_compile_options(mfx_torch INTERFACE -Wno-unknown-pragmas)
