// Sums and gathers of ranks on one machine, through memory that they share; see shared_memory.py.
//
// A message travels in pieces. Each rank has two rooms for pieces, which it uses in turn, and the
// number of the last piece that it has written. Every rank counts the same pieces:
//
//     rank 0    room 0 │ piece 4 │   room 1 │ piece 3 │   written 4
//     rank 1    room 0 │ piece 2 │   room 1 │ piece 3 │   written 3
//
// A rank writes a piece once all others have written the one before: they read what it overwrites,
// the one before that, earlier. So a piece costs one wait, and no rank is two pieces ahead.
//
// Sums are in the order of the ranks, in fp32, and rounded once: all ranks get the same bits, and
// nothing depends on the size of a message or on which rank comes first.

#include <algorithm>
#include <atomic>
#include <climits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "vectors.h"

namespace {

// Bytes that justify another thread.
constexpr int64_t BYTES_PER_THREAD = 1 << 17;

// Where pieces begin: a line of the cache, and a neighbour that the processor may fetch with it.
constexpr int64_t ALIGNMENT = 128;

struct alignas(ALIGNMENT) Counter {
    std::atomic<uint32_t> written;
    std::atomic<uint32_t> num_sleepers;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes cannot share a lock");

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Sleeps until another rank has written a piece, unless it has done so already. May return early.
void sleep_while(Counter &counter, uint32_t seen) {
#if defined(__linux__)
    counter.num_sleepers.fetch_add(1);
    // The system compares once more. A rank that writes after that sees the sleeper.
    syscall(SYS_futex, &counter.written, FUTEX_WAIT, seen, nullptr, nullptr, 0);
    counter.num_sleepers.fetch_sub(1);
#else
    sched_yield();
#endif
}

void wake_sleepers(Counter &counter) {
#if defined(__linux__)
    if (counter.num_sleepers.load())
        syscall(SYS_futex, &counter.written, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

}  // namespace

extern "C" {

// Mirrored in shared_memory.py.
struct Ranks {
    char *memory;  // shared: a counter for each rank, then two rooms for each
    int64_t room_size;
    int32_t rank, size;
    int32_t num_spins;  // of a wait, before it sleeps
    uint32_t piece;     // number of the last one
};

struct Sum {
    Ranks *ranks;
    void *x;       // [rows, size]; replaced by the sum
    int64_t size;  // numbers of a row
    int32_t element;
};

struct Gather {
    Ranks *ranks;
    const void *x;             // [rows, this rank's part of a row]
    char *y;                   // of rank 0: [rows, all parts]
    const int64_t *row_bytes;  // [ranks], of each part
};
}

namespace {

Counter &counter(const Ranks &ranks, int rank) {
    return reinterpret_cast<Counter *>(ranks.memory)[rank];
}

char *room(const Ranks &ranks, int rank) {
    const int64_t number = 2 * rank + (ranks.piece & 1);
    return ranks.memory + ranks.size * int64_t(sizeof(Counter)) + number * ranks.room_size;
}

void wait_for(const Ranks &ranks, int rank, uint32_t piece) {
    Counter &of = counter(ranks, rank);
    for (int spins = 0;; spins++) {
        const uint32_t seen = of.written.load(std::memory_order_acquire);
        if (int32_t(seen - piece) >= 0) return;
        if (spins < ranks.num_spins)
            relax();
        else
            sleep_while(of, seen);
    }
}

void wait_for_all(const Ranks &ranks, uint32_t piece) {
    for (int rank = 0; rank < ranks.size; rank++)
        if (rank != ranks.rank) wait_for(ranks, rank, piece);
}

// Begins a piece. Returns the room to write it to.
char *begin_piece(Ranks &ranks) {
    wait_for_all(ranks, ranks.piece);
    ranks.piece++;
    return room(ranks, ranks.rank);
}

void end_writing(const Ranks &ranks) {
    Counter &own = counter(ranks, ranks.rank);
    own.written.store(ranks.piece);
    wake_sleepers(own);
}

// Calls a function for parts of a range of bytes, which begin at whole vectors, in several threads
// if there is work for them.
template <typename Function>
void for_parts(int64_t num_bytes, int64_t max_threads, const Function &function) {
    const int num_threads = int(std::min(max_threads, num_bytes / BYTES_PER_THREAD));
    if (num_threads <= 1) {
        function(0, num_bytes);
        return;
    }
    const int64_t step = (num_bytes / num_threads + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int part = 0; part < num_threads; part++) {
        const int64_t first = std::min(part * step, num_bytes);
        function(first, std::min(first + step, num_bytes));
    }
}

// x becomes the sum of what is in the rooms of all ranks; this rank's own is in x.
template <typename Element>
void add_up(const Ranks &ranks, Element *x, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += WIDTH) {
        const int count = int(std::min<int64_t>(end - i, WIDTH));
        Vector sum = {};
        for (int rank = 0; rank < ranks.size; rank++) {
            const Element *other = reinterpret_cast<const Element *>(room(ranks, rank));
            const Vector some = load((rank == ranks.rank ? x : other) + i, count);
            sum = rank ? sum + some : some;
        }
        store(x + i, sum, count);
    }
}

template <typename Element>
void sum(const Sum &a, int64_t num_rows, int num_threads) {
    Ranks &ranks = *a.ranks;
    const int64_t total = num_rows * a.size * int64_t(sizeof(Element));
    for (int64_t at = 0; at < total; at += ranks.room_size) {
        char *x = static_cast<char *>(a.x) + at;
        const int64_t num_bytes = std::min(ranks.room_size, total - at);
        char *own = begin_piece(ranks);
        for_parts(num_bytes, num_threads, [&](int64_t first, int64_t end) {
            std::memcpy(own + first, x + first, size_t(end - first));
        });
        end_writing(ranks);
        wait_for_all(ranks, ranks.piece);
        for_parts(num_bytes, num_threads, [&](int64_t first, int64_t end) {
            add_up(ranks, reinterpret_cast<Element *>(x), first / int64_t(sizeof(Element)),
                   end / int64_t(sizeof(Element)));
        });
    }
}

// Puts bytes of a rank's message, which are consecutive there, into its columns of y.
void spread(const Gather &a, int rank, int64_t at, const char *from, int64_t num_bytes) {
    int64_t stride = 0, column = 0;
    for (int each = 0; each < a.ranks->size; each++) {
        if (each == rank) column = stride;
        stride += a.row_bytes[each];
    }
    const int64_t row_bytes = a.row_bytes[rank];
    while (num_bytes > 0) {
        const int64_t row = at / row_bytes, offset = at % row_bytes;
        const int64_t some = std::min(row_bytes - offset, num_bytes);
        std::memcpy(a.y + row * stride + column + offset, from, size_t(some));
        at += some, from += some, num_bytes -= some;
    }
}

}  // namespace

extern "C" {

extern const int64_t tokasaurus_sizes[] = {sizeof(Sum), sizeof(Gather)};

// Bytes of the memory that ranks share. It is all zeros at first.
int64_t tokasaurus_shared_size(int32_t size, int64_t room_size) {
    return size * (int64_t(sizeof(Counter)) + 2 * room_size);
}

void tokasaurus_sum(const Sum *arguments, int64_t num_rows, int32_t num_threads) {
    switch (arguments->element) {
        case 0: return sum<float>(*arguments, num_rows, num_threads);
        case 1: return sum<BFloat16>(*arguments, num_rows, num_threads);
        default: return sum<Float16>(*arguments, num_rows, num_threads);
    }
}

void tokasaurus_gather(const Gather *arguments, int64_t num_rows, int32_t num_threads) {
    const Gather &a = *arguments;
    Ranks &ranks = *a.ranks;
    const char *x = static_cast<const char *>(a.x);
    const int64_t own_total = num_rows * a.row_bytes[ranks.rank];
    const int64_t longest =
        num_rows * *std::max_element(a.row_bytes, a.row_bytes + ranks.size);
    for (int64_t at = 0; at < longest; at += ranks.room_size) {
        const int64_t own_bytes = std::max<int64_t>(std::min(ranks.room_size, own_total - at), 0);
        char *own = begin_piece(ranks);
        if (ranks.rank) {
            for_parts(own_bytes, num_threads, [&](int64_t first, int64_t end) {
                std::memcpy(own + first, x + at + first, size_t(end - first));
            });
            end_writing(ranks);
            continue;
        }
        end_writing(ranks);
        for (int rank = 0; rank < ranks.size; rank++) {
            if (rank) wait_for(ranks, rank, ranks.piece);
            const int64_t left = num_rows * a.row_bytes[rank] - at;
            const char *from = rank ? room(ranks, rank) : x + at;
            for_parts(std::max<int64_t>(std::min(ranks.room_size, left), 0), num_threads,
                      [&](int64_t first, int64_t end) {
                          spread(a, rank, at + first, from + first, end - first);
                      });
        }
    }
}
}
