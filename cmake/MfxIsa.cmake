# CPU kernels are compiled once per instruction set, each into its own namespace (MFX_ISA), and chosen at run time
# by csrc/core/isa.cpp. Only *_cpu_kernel.cpp files carry the flags, so no shared inline function can pick them up.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(MFX_ISAS_KNOWN baseline avx2 avx512 avx512_bf16)
  set(MFX_ISA_MACROS __SSE2__ __AVX2__ __AVX512DQ__ __AVX512BF16__)  # what compilers define where it may be used
else()
  set(MFX_ISAS_KNOWN baseline)
  set(MFX_ISA_MACROS "")
endif()
set(MFX_FLAGS_baseline "")
set(MFX_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(MFX_FLAGS_avx512 ${MFX_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
set(MFX_FLAGS_avx512_bf16 ${MFX_FLAGS_avx512} -mavx512bf16 -mavx512vnni)  # no processor has the one alone

if(NOT MFX_CPU_ISAS AND MFX_NATIVE)  # the best that this processor has, and baseline, which is a must
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -march=native -dM -E -x c++ /dev/null
    OUTPUT_VARIABLE MFX_NATIVE_MACROS COMMAND_ERROR_IS_FATAL ANY)
  set(MFX_CPU_ISAS baseline)
  foreach(isa macro IN ZIP_LISTS MFX_ISAS_KNOWN MFX_ISA_MACROS)
    if(MFX_NATIVE_MACROS MATCHES "#define ${macro} 1\n" AND NOT isa STREQUAL "baseline")
      set(MFX_CPU_ISAS baseline ${isa})
    endif()
  endforeach()
elseif(NOT MFX_CPU_ISAS)
  set(MFX_CPU_ISAS ${MFX_ISAS_KNOWN})
endif()
foreach(isa IN LISTS MFX_CPU_ISAS)
  if(NOT isa IN_LIST MFX_ISAS_KNOWN)
    message(FATAL_ERROR "MFX_CPU_ISAS: unknown instruction set '${isa}', expected some of: ${MFX_ISAS_KNOWN}")
  endif()
endforeach()
if(NOT "baseline" IN_LIST MFX_CPU_ISAS)
  message(FATAL_ERROR "MFX_CPU_ISAS must contain 'baseline', got: ${MFX_CPU_ISAS}")
endif()

list(JOIN MFX_CPU_ISAS " " MFX_ISA_NAMES)

function(mfx_add_isa_sources target)
  add_library(${target}_isa_objects INTERFACE)
  foreach(isa IN LISTS MFX_CPU_ISAS)
    string(TOUPPER "${isa}" upper)
    target_compile_definitions(${target} PRIVATE MFX_HAVE_${upper}=1)
    add_library(${target}_${isa} OBJECT ${ARGN})
    target_link_libraries(${target}_${isa} PRIVATE mfx_flags)
    target_compile_definitions(${target}_${isa} PRIVATE MFX_ISA=${isa} MFX_ISA_${upper}=1)
    # -fno-math-errno and no traps let gcc vectorise; contraction gives fused multiply-adds. Nothing here may
    # assume away NaN or infinity.
    target_compile_options(${target}_${isa} PRIVATE
      ${MFX_FLAGS_${isa}} -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi
      $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized>)  # gcc's own intrinsics trip over these
    target_sources(${target}_isa_objects INTERFACE $<TARGET_OBJECTS:${target}_${isa}>)
  endforeach()
  target_link_libraries(${target} PUBLIC ${target}_isa_objects)
endfunction()
