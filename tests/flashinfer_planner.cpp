// FlashInfer's planner of prefill kernels, without a device: it runs on the host, and asks the device
// for its multiprocessors and for one copy.

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>

#include <cuda_runtime.h>

// CUDA's compiler knows these without their namespace.
using std::max;
using std::min;

// Of a header whose other contents are for the device.
#define FLASHINFER_POS_ENC_CUH_
namespace flashinfer {
enum class PosEncodingMode { kNone = 0U, kRoPELlama = 1U, kALiBi = 2U };
}

#include <flashinfer/attention/scheduler.cuh>

namespace {
int num_multiprocessors = 0;
size_t num_copied = 0;
}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? num_multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void*, const void*, size_t size, cudaMemcpyKind, cudaStream_t) {
  num_copied = size;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "no error is possible here"; }

// Plans a call. Writes what the kernels get into `info`, behind the number of its values. Returns the
// bytes that are copied to the device, or -1 and an error.
long long plan_prefill(int* query_starts, int* page_starts, unsigned num_requests, unsigned num_heads,
                       unsigned num_kv_heads, unsigned head_dim, unsigned page_size, int is_graph,
                       int multiprocessors, char* numbers, size_t num_numbers, char* plan,
                       size_t num_plan, long long* info, char* error) {
  num_multiprocessors = multiprocessors;
  flashinfer::PrefillPlanInfo found;
  try {
    flashinfer::PrefillPlan<int>(numbers, num_numbers, plan, plan, num_plan, found, query_starts,
                                 page_starts, query_starts[num_requests], num_requests, num_heads,
                                 num_kv_heads, head_dim, head_dim, page_size, is_graph, 2, -1, -1,
                                 false, 0, nullptr);
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), 255);
    return -1;
  }
  const auto values = found.ToVector();
  info[0] = values.size();
  std::copy(values.begin(), values.end(), info + 1);
  return num_copied;
}
}
