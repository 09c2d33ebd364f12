// Calls the kernels of a recorded pass, one after the other; see calls.py.

#include <cstdint>

extern "C" {

struct Call {
    void (*kernel)(const void *arguments, int64_t num_rows, int32_t num_threads);
    const void *arguments;
};

void tokasaurus_replay(const Call *calls, int64_t num_calls, int64_t num_rows,
                       int32_t num_threads) {
    for (int64_t i = 0; i < num_calls; i++) calls[i].kernel(calls[i].arguments, num_rows, num_threads);
}
}
