/* Control interface of the CUDA emulator. The functions are exported by its
 * libcudart.so.13; look them up with dlsym or link against it. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Declares a host range as a valid device allocation. Registering anything, like
 * cudaMalloc, makes global accesses outside every known range an error (see
 * CUDASIM_STRICT). */
void cudasim_register(const void* ptr, size_t bytes, const char* name);
void cudasim_unregister(const void* ptr);
/* Device memory of the emulator itself (poisoned with 0xff). */
void* cudasim_malloc(size_t bytes);
void cudasim_free(void* ptr);

/* Statistics of all launches since the last reset, a JSON array. The string
 * stays valid until the next call. */
const char* cudasim_stats_json(void);
void cudasim_reset_stats(void);

/* Text of the last fault, "" if there was none, and its cudaError_t. */
const char* cudasim_last_fault(void);
int cudasim_last_fault_code(void);
void cudasim_clear_fault(void);

/* Distinct races, missing waits and uninitialised reads reported so far. */
uint64_t cudasim_race_count(void);
void cudasim_reset_races(void);
/* Text of the last one, "" if there was none. */
const char* cudasim_last_report(void);
/* 0 off, 1 report, 2 report and fail the launch. Returns the mode before. */
int cudasim_set_race_mode(int mode);
/* Report reads of shared memory that was never written. Returns the setting before. */
int cudasim_set_uninit(int on);
/* Look for races between the lanes of a warp, too. */
void cudasim_set_race_warp(int on);
/* -1 automatic, 0 off, 1 on. */
void cudasim_set_strict(int mode);

/* Order of warps and landing times of asynchronous copies; 0 is the fixed order. */
void cudasim_set_seed(uint64_t seed);

/* Instructions a warp runs before the next one gets its turn; a small number is
 * close to the lockstep of hardware. */
void cudasim_set_slice(int n);
/* Look for races between the warps of a block in global memory, too. */
void cudasim_set_race_global(int on);
/* Whether tensor cores truncate their sums, as hardware does. Returns the setting before. */
int cudasim_set_tensor_truncate(int on);
/* Whether approximate instructions (ex2.approx and the like) err within what is documented for them. Returns the
 * setting before. */
int cudasim_set_approx_error(int on);
/* How many multiprocessors the device says it has; 0: as many as the product. With few of them persistent kernels have
 * more than one round to go. Returns the setting before. */
int cudasim_set_multiprocessors(int n);
/* Makes one instruction of a registered kernel do nothing, for tests of what is caught without it: the one with this
 * index, from 0 on, among those whose opcode begins with `opcode` ("bar.sync"); a loop that polls finds its wait over.
 * Returns how many of them the kernel has, -1 where there is no such kernel. */
int cudasim_drop(const char* kernel, const char* opcode, int index);
/* All instructions do what they did. Returns how often those were reached that did nothing. */
uint64_t cudasim_restore(void);
/* Workers that run independent blocks. */
void cudasim_set_threads(int n);

/* Captures what is submitted to the legacy stream, which CUDA itself does not, for callers that have no other stream.
 * Calls that a capture does not allow fail and spoil it. All return a cudaError_t. */
int cudasim_capture_begin(void);
int cudasim_capture_end(void** graph);
int cudasim_graph_launch(void* graph);
void cudasim_graph_destroy(void* graph);

/* Bare PTX. A null result means that loading failed (see cudasim_last_fault). */
typedef struct cudasim_module cudasim_module;
cudasim_module* cudasim_module_load(const char* ptx);
void cudasim_module_unload(cudasim_module* m);
/* Parameter count of an entry, -1 if there is none; sizes[] receives up to n of their sizes. */
int cudasim_kernel_params(cudasim_module* m, const char* entry, uint32_t* sizes, int n);
/* grid, block, cluster: 3 values each, cluster may be null. args: one pointer
 * per parameter. Returns a cudaError_t. */
int cudasim_launch(cudasim_module* m, const char* entry, const uint32_t* grid, const uint32_t* block,
                   const uint32_t* cluster, uint32_t dynamic_smem, void** args, int cooperative);
/* Address and size of a module variable, null if there is none. */
void* cudasim_module_symbol(cudasim_module* m, const char* name, size_t* bytes);

#ifdef __cplusplus
}
#endif
