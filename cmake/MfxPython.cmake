# The interpreter that runs the build decides: its headers, its module suffix, its torch.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'), end='')"
  OUTPUT_VARIABLE MFX_PYTHON_EXT_SUFFIX COMMAND_ERROR_IS_FATAL ANY)
file(READ "${CMAKE_SOURCE_DIR}/python/moduleformer_ext/_version.py" MFX_VERSION_FILE)
string(REGEX MATCH "__version__ = \"([^\"]+)\"" _ "${MFX_VERSION_FILE}")
set(MFX_VERSION "${CMAKE_MATCH_1}")
