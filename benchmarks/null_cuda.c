/* A libcuda.so.1 that computes nothing: every call succeeds, kernel launches are counted. For host_time.py. */
#include <stdint.h>
#include <string.h>

typedef int CUresult;
#define OK 0

static uint64_t launched;
static int context_of_device_0;

uint64_t null_cuda_launches(void) { return launched; }

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "no error"; return OK; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return OK; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return OK; }
CUresult cuCtxGetCurrent(void **context) { *context = &context_of_device_0; return OK; }
CUresult cuCtxSetCurrent(void *context) { return OK; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = &context_of_device_0; return OK; }
CUresult cuCtxSetLimit(int limit, size_t value) { return OK; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return OK; }
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return OK; }

/* An H100's, for the attributes that Triton asks for (numbers of CUdevice_attribute in cuda.h). */
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;          /* warp size */
  case 12: *value = 65536; break;       /* registers per block */
  case 16: *value = 132; break;         /* multiprocessors */
  case 75: *value = 9; break;           /* compute capability, major */
  case 76: *value = 0; break;           /* minor */
  case 81: *value = 228 * 1024; break;  /* shared memory per multiprocessor */
  case 97: *value = 227 * 1024; break;  /* shared memory per block, opted in */
  default: *value = 1; break;
  }
  return OK;
}

CUresult cuModuleLoadData(void **module, const void *image) { *module = &context_of_device_0; return OK; }
CUresult cuModuleUnload(void *module) { return OK; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return OK; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads per block; registers, local and shared memory */
  return OK;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return OK; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return OK; }

CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return OK;
}

CUresult cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  ++launched;
  return OK;
}

CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return OK; }
CUresult cuTensorMapEncodeTiled(void) { return OK; }
CUresult cuTensorMapEncodeIm2col(void) { return OK; }
