// What products with packed weights share: panels and how threads deal them out, what is fetched
// ahead, and AMX's tiles.
//
// A weight is cut into panels of PANEL rows, which are columns of the result.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int PANEL = 32;
constexpr int TILE = 16;

// Numbers of a weight that justify another thread.
constexpr int64_t SIZE_PER_THREAD = 1 << 15;

// Bytes between what few rows read and what they fetch.
constexpr int64_t STREAM_AHEAD = 1024;

// Bytes of x that the loops over panels reuse: a part of the second-level cache.
constexpr int64_t REUSED_BYTES = 1 << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
inline T load(const void *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    return load<float>(&bits);
}

// To the nearest bf16, ties to even; NaN stays NaN.
inline void narrow(float value, uint16_t &to) {
    const uint32_t bits = load<uint32_t>(&value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    to = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void narrow(float value, float &to) { to = value; }

// The panels of a thread.
struct Share {
    int64_t thread, first, end;
};

inline Share share_of(int64_t thread, int64_t num_threads, int64_t out) {
    const int64_t panels = ceil_div(out, PANEL);
    return {thread, panels * thread / num_threads, panels * (thread + 1) / num_threads};
}

// Arguments are those of a product: the sizes ``in`` and ``out``, the packed ``weight``, and
// ``following``, the arguments of what is multiplied next, or null.
template <typename Arguments>
inline int64_t threads_of(const Arguments &a, int64_t num_threads) {
    return std::min(num_threads, 1 + a.in * a.out / SIZE_PER_THREAD);
}

// Memory that will be read soon. The loops fetch it into the second-level cache, bit by bit.
struct Ahead {
    const char *from = nullptr;
    int64_t size = 0;

    // One of equal parts, in whole lines of the cache.
    Ahead part(int64_t number, int64_t count) const {
        const int64_t lines = size / 64;
        const int64_t begin = lines * number / count, end = lines * (number + 1) / count;
        return {from + begin * 64, (end - begin) * 64};
    }
    void fetch_line() {
        __builtin_prefetch(from, 0, 2);
        from += 64;
        size -= 64;
    }
};

// What a thread reads after one of its panels: the next one, or the first one of what follows.
template <typename Product, typename Bytes>
inline Ahead after(const Product &p, const Share &share, int64_t panel, const Bytes &panel_bytes) {
    const int64_t bytes = panel_bytes(p);
    if (panel + 1 < share.end)
        return {reinterpret_cast<const char *>(p.weight) + (panel + 1) * bytes, bytes};
    if (!p.following) return {};
    const auto &f = *p.following;
    const int64_t num_threads = threads_of(f, p.max_threads);
    if (share.thread >= num_threads) return {};
    const int64_t first = share_of(share.thread, num_threads, f.out).first;
    const int64_t its_bytes = panel_bytes(f);
    return {reinterpret_cast<const char *>(f.weight) + first * its_bytes,
            std::min(bytes, its_bytes)};
}

#if defined(__AMX_TILE__)

// Asks the system for the right to use the tiles, once for the process.
inline bool may_use_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// Tiles 0 to 3 are sums: upper and lower rows by left and right columns. Tiles 4 and 5 are upper
// and lower rows of x; 6 and 7 left and right columns of a panel.
inline void configure(int upper, int lower) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, TILE, TILE};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = uint8_t(std::max(rows[tile], 1));
    }
    // The compiler does not know how much of it the instruction reads.
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
}

// The panels of one thread, for blocks of up to two tiles of rows.
//
//   row_bytes  of a row of x, as the tiles read it
//   ahead_of   panel -> Ahead, what is read after a panel
//   block      (row, number of rows, panel, Ahead)
template <typename AheadOf, typename Block>
inline void for_tile_blocks(int64_t num_rows, int64_t row_bytes, const Share &share,
                            const AheadOf &ahead_of, const Block &block) {
    constexpr int ROWS = 2 * TILE;
    const int64_t most = std::max<int64_t>(REUSED_BYTES / row_bytes / ROWS, 1) * ROWS;
    for (int64_t start = 0; start < num_rows; start += most) {
        const int64_t stop = std::min(num_rows, start + most);
        const int64_t whole = start + (stop - start) / ROWS * ROWS;
        const int64_t parts = ceil_div(stop - start, ROWS);
        const auto ahead = [&](int64_t row, int64_t panel) {
            return start ? Ahead{} : ahead_of(panel).part(row / ROWS, parts);
        };
        if (whole > start) {
            configure(TILE, TILE);
            for (int64_t panel = share.first; panel < share.end; panel++)
                for (int64_t row = start; row < whole; row += ROWS)
                    block(row, ROWS, panel, ahead(row, panel));
        }
        const int rest = int(stop - whole);
        if (rest == 0) continue;
        configure(std::min(rest, TILE), rest - TILE);
        for (int64_t panel = share.first; panel < share.end; panel++)
            block(whole, rest, panel, ahead(whole, panel));
    }
    _tile_release();
}

#endif

// The panels of one thread, for blocks of at most MAX_ROWS rows in registers. Few rows take all
// panels of the thread at once.
//
//   ahead_of   panel -> Ahead, what is read after a panel
//   block      (row, number of rows, first panel, last panel + 1, Ahead)
template <int MAX_ROWS, typename AheadOf, typename Block>
inline void for_row_blocks(int64_t num_rows, int64_t row_bytes, const Share &share,
                           const AheadOf &ahead_of, const Block &block) {
    const int64_t most = std::max<int64_t>(REUSED_BYTES / row_bytes / MAX_ROWS, 1) * MAX_ROWS;
    for (int64_t start = 0; start < num_rows; start += most) {
        const int64_t count = std::min(most, num_rows - start);
        const int64_t parts = ceil_div(count, MAX_ROWS);
        if (count * 4 <= 2 * MAX_ROWS) {
            block(start, count, share.first, share.end, Ahead{});
            continue;
        }
        for (int64_t panel = share.first; panel < share.end; panel++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t from = count * part / parts, to = count * (part + 1) / parts;
                const Ahead ahead = start ? Ahead{} : ahead_of(panel).part(part, parts);
                block(start + from, to - from, panel, panel + 1, ahead);
            }
    }
}

}  // namespace
