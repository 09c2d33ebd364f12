// Draws tokens from rows of logits, sums their weights up, and ranks them. The sampler in
// model/sampling/sampler.py defines the results.
//
// A row is the work of one thread, and nothing else decides its result: not the rows beside it, not
// the number of threads, and not the instruction set. Every operation is rounded by itself
// (none is fused with another), and sums have as many lanes in short vectors as in long ones.

#include <algorithm>
#include <cfloat>
#include <vector>

#include "vectors.h"

namespace {

// Tokens whose weights are summed up together, as in inversion.py.
constexpr int BLOCK = 256;
// Of a sum: weight i is added to lane i % LANES.
constexpr int LANES = 16;
// The part of the ranking that top_p looks at before it searches the whole vocabulary.
constexpr int FEWEST_CANDIDATES = 16, MOST_CANDIDATES = 64;
// Vocabularies in which looking at every token takes no longer than looking for its block.
constexpr int SMALL_VOCABULARY = 1024;
// Tokens that are sooner sorted than searched.
constexpr int FEW = 256;
// A token whose score is further below the best one has weight 0.
constexpr float WIDEST = 104.0f;
constexpr int32_t MAX_ID = INT32_MAX;

// What a row asks for: DRAW in base.py.
struct Draw {
    uint64_t seed;
    uint32_t sample_index, position;
    float temperature;  // 0 for the first token of the ranking
    int32_t top_k;      // 0 for all
    float top_p;        // 1 for all
    float log_min_p;    // -infinity for all
};

// --- random numbers: randomness.py ---------------------------------------------------------------

double uniform(const Draw &draw) {
    uint32_t c0 = draw.sample_index, c1 = draw.position, c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(draw.seed), k1 = uint32_t(draw.seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = uint64_t(c0) * 0xD2511F53u;
        const uint64_t product1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(product1);
        c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return double(((uint64_t(c0) << 32) | c1) >> 11) * 0x1p-53;
}

// --- vectors -------------------------------------------------------------------------------------

constexpr int HALF = WIDTH / 2;
typedef float HalfFloats __attribute__((vector_size(HALF * 4)));
typedef double Doubles __attribute__((vector_size(HALF * 8)));

// A sum in double precision.
struct Sum {
    Doubles lanes[LANES / HALF] = {};

    // Adds weights i to i + WIDTH.
    void add(int i, Vector weights) {
        HalfFloats halves[2];
        std::memcpy(halves, &weights, sizeof weights);
        Doubles *to = lanes + i % LANES / HALF;
        to[0] += __builtin_convertvector(halves[0], Doubles);
        to[1] += __builtin_convertvector(halves[1], Doubles);
    }

    double total() const {
        double sums[LANES];
        std::memcpy(sums, lanes, sizeof sums);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) sums[i] += sums[i + half];
        return sums[0];
    }
};

inline bool any(Integers mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(bits_as<__m512i>(mask), bits_as<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(bits_as<__m256>(mask)) != 0;
#else
    uint64_t words[sizeof mask / 8], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (uint64_t each : words) all |= each;
    return all != 0;
#endif
}

// e^x for x up to 0, within 1 unit of the last place; 0 below -87.
inline Vector exponential_below_0(Vector x) {
    const Vector shifted = x * 1.44269504088896341f + 0x1.8p23f;  // the addition rounds
    const Vector n = shifted - 0x1.8p23f;
    const Vector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    Vector q = r * (1.0f / 5040) + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    // 1 is added last, so that one rounding decides.
    const Vector p = (r * r) * q + r + 1.0f;
    // The low bits of `shifted` are n.
    const Vector result = p * bits_as<Vector>((bits_as<Words>(shifted) + 127u) << 23);
    return x < -87.0f ? Vector{} : result;
}

template <typename Element>
inline float load_one(const Element *from) {
    if constexpr (sizeof(Element) == sizeof(float)) return *from;
    return load(from, 1)[0];
}

template <>
inline float load_one(const BFloat16 *from) {
    return bits_as<float>(uint32_t(from->bits) << 16);
}

// --- a row ---------------------------------------------------------------------------------------

// Of all tokens: by logit, and equal ones by descending id, as in ranking.py.
inline int64_t rank_of(float logit, int id) {
    const int32_t bits = bits_as<int32_t>(logit + 0.0f);
    const int32_t ordered = bits ^ ((bits >> 31) & MAX_ID);
    return int64_t(ordered) * (int64_t(1) << 32) + (MAX_ID - id);
}

inline int id_of(int64_t rank) { return MAX_ID - int32_t(rank & MAX_ID); }

// What is found of one row. The memory serves one row after the other.
struct Scratch {
    std::vector<float> maxima;   // the highest logit of each block
    std::vector<float> kth;      // the same in another order
    std::vector<double> sums;    // the weight of each block, then cumulated
    std::vector<float> weights;  // of each token
    std::vector<int64_t> ranks;  // the beginning of the ranking
    std::vector<int> ids;        // of those that are kept
};

template <typename Element>
class Row {
   public:
    Row(const Element *logits, int size, float temperature)
        : logits_(logits), size_(size), temperature_(temperature),
          num_blocks_((size + BLOCK - 1) / BLOCK) {
        find_maxima();
        best_ = best_logit_ / temperature;
    }

    int draw(const Draw &draw) {
        const bool is_limited = draw.top_k > 0 && draw.top_k < size_;
        floor_ = best_ + draw.log_min_p;
        if (is_limited && can_list(draw.top_k)) {
            list(draw.top_k, 1.0f);
            return draw_listed(draw, false, 0);
        }
        double total = 0;
        if (!is_limited && draw.top_p < 1) {
            total = weigh();
            list(std::clamp(num_blocks_ / 2, FEWEST_CANDIDATES, MOST_CANDIDATES), 1.0f);
            const int id = draw_listed(draw, true, total);
            if (id >= 0) return id;
        }
        if (is_limited || draw.top_p < 1) cut(draw, is_limited, total);
        const bool is_filtered = is_cut_ || draw.log_min_p > -INFINITE;
        if (is_filtered)
            return temperature_ == 1 ? draw_kept<false, true>(draw) : draw_kept<true, true>(draw);
        return temperature_ == 1 ? draw_kept<false, false>(draw) : draw_kept<true, false>(draw);
    }

    // The first token of the ranking; if numbers have diverged, the first that is not a number.
    int first() const {
        int block = 0;
        if (!has_nan_)
            while (maxima()[block] != best_logit_) block++;
        for (int i = block * BLOCK; i < size_; i++) {
            const float logit = load_one(logits_ + i);
            if (has_nan_ ? logit != logit : logit == best_logit_) return i;
        }
        return size_ - 1;
    }

    // The logarithm of the sum of e^score.
    float log_sum() {
        if (!has_nan_ && std::abs(best_) == INFINITE) return best_;
        return float(double(best_) + std::log(weigh()));
    }

    int num_higher(int id) const {
        const float picked = load_one(logits_ + id) / temperature_;
        Integers count = {};
        for (int i = 0; i < size_; i += WIDTH) count -= padded(i) / temperature_ > picked;
        int result = 0;
        for (int lane = 0; lane < WIDTH; lane++) result += count[lane];
        return result;
    }

    // Lists the first `depth` tokens of the ranking by score.
    void rank(int depth, int64_t *ids, float *scores) {
        list(depth, temperature_);
        for (int64_t rank : scratch_.ranks) {
            *ids = id_of(rank);
            *scores++ = load_one(logits_ + *ids++) / temperature_;
        }
    }

   private:
    const Element *logits_;
    const int size_;
    const float temperature_;
    const int num_blocks_;
    float best_logit_, best_;  // without temperature, and with it
    bool has_nan_;
    float floor_;  // the lowest score that is kept
    // The last token of the ranking that is kept, once there is one.
    bool is_cut_ = false;
    float last_logit_ = -INFINITE;
    int last_id_ = 0;
    static thread_local Scratch scratch_;

    const float *maxima() const { return scratch_.maxima.data(); }

    // Logits i to i + WIDTH; -infinity beyond the vocabulary.
    Vector padded(int i) const {
        if (i + WIDTH <= size_) return load(logits_ + i);
        const Vector some = load(logits_ + i, std::max(size_ - i, 0));
        return lane_numbers() < size_ - i ? some : splat(-INFINITE);
    }

    void find_maxima() {
        scratch_.maxima.resize(num_blocks_);
        Integers is_nan = {};
        Vector all = splat(-INFINITE);
        for (int block = 0; block < num_blocks_; block++) {
            Vector best = splat(-INFINITE);
            for (int i = block * BLOCK; i < (block + 1) * BLOCK; i += WIDTH) {
                const Vector some = padded(i);
                best = larger(some, best);
                is_nan |= some != some;
            }
            all = larger(best, all);
            scratch_.maxima[block] = largest(best);
        }
        best_logit_ = largest(all);
        has_nan_ = any(is_nan);
    }

    // --- the whole vocabulary --------------------------------------------------------------------

    // Of tokens i to i + WIDTH: probabilities relative to that of the best token.
    template <bool DIVIDES, bool FILTERED>
    Vector weights_at(int i) const {
        const Vector some = padded(i);
        const Vector scores = DIVIDES ? some / temperature_ : some;
        const Vector weights = exponential_below_0(scores - best_);
        if constexpr (!FILTERED) return weights;
        const Integers is_removed = (some < last_logit_) | (scores < floor_) |
                                    ((some == last_logit_) & (lane_numbers() > last_id_ - i));
        return is_removed ? Vector{} : weights;
    }

    template <bool DIVIDES, bool FILTERED>
    void sum_blocks() {
        scratch_.sums.resize(num_blocks_);
        for (int block = 0; block < num_blocks_; block++) {
            Sum sum;
            for (int i = 0; i < BLOCK; i += WIDTH)
                sum.add(i, weights_at<DIVIDES, FILTERED>(block * BLOCK + i));
            scratch_.sums[block] = sum.total();
        }
    }

    // The weight of all tokens.
    double weigh() {
        temperature_ == 1 ? sum_blocks<false, false>() : sum_blocks<true, false>();
        double total = 0;
        for (double each : scratch_.sums) total += each;
        return total;
    }

    // Cumulates weights, and returns the first place where they exceed the target; the last place
    // where the target is not a number.
    static int place_beyond(double *weights, int count, double target) {
        const auto found = std::upper_bound(weights, weights + count, target);
        return std::min(int(found - weights), count - 1);
    }

    static double cumulate(double *weights, int count) {
        for (int i = 1; i < count; i++) weights[i] += weights[i - 1];
        return weights[count - 1];
    }

    // Rounding may have lifted the target to the total, and nothing is above that.
    static double reachable(double target, double total) {
        const double below = std::nextafter(total, 0.0);
        return target > below ? below : target;
    }

    // inversion.py explains how the token is found.
    template <bool DIVIDES, bool FILTERED>
    int draw_kept(const Draw &draw) {
        sum_blocks<DIVIDES, FILTERED>();
        double *sums = scratch_.sums.data();
        const double total = cumulate(sums, num_blocks_);
        const double target = reachable(uniform(draw) * total, total);
        const int block = place_beyond(sums, num_blocks_, target);
        const int width = std::min(BLOCK, size_ - block * BLOCK);
        double weights[BLOCK];
        for (int i = 0; i < width; i += WIDTH) {
            const Vector some = weights_at<DIVIDES, FILTERED>(block * BLOCK + i);
            for (int lane = 0; lane < WIDTH; lane++) weights[i + lane] = some[lane];
        }
        const double before = block ? sums[block - 1] : 0;
        const double inside = cumulate(weights, width);
        return block * BLOCK + place_beyond(weights, width, reachable(target - before, inside));
    }

    // --- the beginning of the ranking ------------------------------------------------------------

    // Whether few blocks have to be looked into, or few tokens.
    bool can_list(int depth) const {
        return depth <= num_blocks_ / 2 || size_ <= SMALL_VOCABULARY;
    }

    // Calls a function with the id and logit / divisor of all tokens from `low` to `high`, and of
    // those that are not numbers.
    template <typename Function>
    void for_tokens(int begin, int end, float divisor, float low, float high,
                    const Function &function) const {
        for (int i = begin; i < end; i += WIDTH) {
            const Vector values = divisor == 1 ? padded(i) : padded(i) / divisor;
            const Integers is_outside = (values < low) | (values > high);
            if (!any(~is_outside)) continue;
            for (int lane = 0; lane < WIDTH && i + lane < end; lane++)
                if (!is_outside[lane]) function(i + lane, float(values[lane]));
        }
    }

    // Finds the first `depth` tokens of the ranking by logit / divisor.
    void list(int depth, float divisor) {
        std::vector<int64_t> &ranks = scratch_.ranks;
        ranks.clear();
        // They lie in the `depth` blocks whose best tokens rank highest.
        float least = -INFINITE;
        std::vector<float> &kth = scratch_.kth;
        kth = scratch_.maxima;
        if (depth > num_blocks_) {
            // In a small vocabulary, each vector is a block.
            kth.clear();
            for (int i = 0; i < size_; i += WIDTH) kth.push_back(largest(padded(i)));
        }
        if (!has_nan_ && depth <= int(kth.size())) {
            std::nth_element(kth.begin(), kth.begin() + depth - 1, kth.end(),
                             std::greater<float>());
            least = kth[depth - 1] / divisor;
        }
        int num_least = 0;
        for (int block = 0; block < num_blocks_; block++) {
            if (!has_nan_ && maxima()[block] / divisor < least) continue;
            const int end = std::min((block + 1) * BLOCK, size_);
            for_tokens(block * BLOCK, end, divisor, least, INFINITE, [&](int id, float value) {
                if (value == least && num_least++ >= depth) return;
                ranks.push_back(rank_of(value, id));
            });
        }
        if (int(ranks.size()) > depth) {
            std::nth_element(ranks.begin(), ranks.begin() + depth, ranks.end(),
                             std::greater<int64_t>());
            ranks.resize(depth);
        }
        std::sort(ranks.begin(), ranks.end(), std::greater<int64_t>());
    }

    float score_of(int id) const { return load_one(logits_ + id) / temperature_; }

    // Weights of listed tokens, in double precision.
    void weigh_listed(const int *ids, int count, float best, double *weights) const {
        for (int i = 0; i < count; i += WIDTH) {
            Vector scores = {};
            const int some = std::min(WIDTH, count - i);
            for (int lane = 0; lane < some; lane++) scores[lane] = score_of(ids[i + lane]);
            const Vector result = exponential_below_0(scores - best);
            for (int lane = 0; lane < some; lane++) weights[i + lane] = result[lane];
        }
    }

    // Draws from the listed tokens, which are all that top_k keeps. Or they are the beginning of a
    // vocabulary with this weight in total: -1 if they do not hold the share of top_p.
    int draw_listed(const Draw &draw, bool is_beginning, double total) {
        std::vector<int> &ids = scratch_.ids;
        ids.clear();
        for (int64_t rank : scratch_.ranks) ids.push_back(id_of(rank));
        const int count = int(ids.size());
        const float best = score_of(ids[0]);
        std::vector<double> &weights = scratch_.sums;
        weights.resize(count);
        weigh_listed(ids.data(), count, best, weights.data());
        int kept = count;
        if (draw.top_p < 1) {
            double held = 0;
            for (double each : weights) held += each;
            if (!is_beginning || total < held) total = held;
            const double share = double(draw.top_p) * total;
            if (is_beginning && !(held >= share)) return -1;
            // A token is kept if those before it do not hold the share yet.
            double before = 0;
            for (kept = 0; kept < count && before < share; kept++) before += weights[kept];
        }
        if (draw.log_min_p > -INFINITE)
            while (kept > 1 && !(score_of(ids[kept - 1]) >= best + draw.log_min_p)) kept--;
        kept = std::max(kept, 1);
        std::sort(ids.begin(), ids.begin() + kept);
        weigh_listed(ids.data(), kept, best, weights.data());
        const double sum = cumulate(weights.data(), kept);
        const double target = reachable(uniform(draw) * sum, sum);
        return ids[place_beyond(weights.data(), kept, target)];
    }

    // --- the last token that is kept -------------------------------------------------------------

    struct Measured {
        int64_t count;  // of tokens above the middle
        double weight;  // of the same
        float lowest;   // of the same
        float highest;  // of the others
    };

    // Looks at the logits from `low` to `high`, on both sides of a middle.
    Measured measure(float low, float middle, float high) const {
        Sum sum;
        Integers count = {};
        Vector lowest = splat(INFINITE), highest = splat(-INFINITE);
        for (int i = 0; i < size_; i += WIDTH) {
            const Vector some = padded(i);
            const Integers is_above = (some > middle) & (some <= high);
            const Integers is_below = (some <= middle) & (some >= low);
            count -= is_above;
            sum.add(i, is_above ? load(scratch_.weights.data() + i) : Vector{});
            lowest = -larger(-lowest, is_above ? -some : splat(-INFINITE));
            highest = larger(highest, is_below ? some : splat(-INFINITE));
        }
        int64_t all = 0;
        for (int lane = 0; lane < WIDTH; lane++) all += count[lane];
        return {all, sum.total(), -largest(-lowest), largest(highest)};
    }

    // Finds the first token of the ranking at which it is enough to go so far, given the number of
    // tokens and their weight. All tokens are kept if those with a weight are not enough.
    //
    // Returns the weight that is kept.
    template <typename Enough>
    double cut_where(const Enough &enough) {
        // The token is one of those from `low` to `high`. The ones above `high` are not enough.
        float low = std::max(best_logit_ - WIDEST * temperature_, -FLT_MAX), high = best_logit_;
        Measured inside = measure(low, std::nextafter(low, -INFINITE), high);
        if (!enough(inside.count, inside.weight)) return inside.weight;
        low = inside.lowest;
        int64_t num_inside = inside.count, num_above = 0;
        double above = 0;
        while (num_inside > FEW && low < high) {
            float middle = low + (high - low) / 2;
            if (middle >= high) middle = low;  // they are neighbours
            inside = measure(low, middle, high);
            if (enough(num_above + inside.count, above + inside.weight)) {
                num_inside = inside.count;
                low = inside.lowest;
            } else {
                num_inside -= inside.count;
                num_above += inside.count;
                above += inside.weight;
                high = inside.highest;
            }
        }
        std::vector<int64_t> &ranks = scratch_.ranks;
        ranks.clear();
        for_tokens(0, size_, 1.0f, low, high,
                   [&](int id, float logit) { ranks.push_back(rank_of(logit, id)); });
        // Equal logits are in order.
        if (low < high) std::sort(ranks.begin(), ranks.end(), std::greater<int64_t>());
        for (int64_t rank : ranks) {
            last_id_ = id_of(rank);
            above += scratch_.weights[last_id_];
            if (enough(++num_above, above)) break;
        }
        is_cut_ = true;
        last_logit_ = load_one(logits_ + last_id_);
        return above;
    }

    // The total is the weight of the whole vocabulary, for rows without top_k.
    void cut(const Draw &draw, bool is_limited, double total) {
        if (has_nan_ || std::abs(best_) == INFINITE) return;
        scratch_.weights.resize(num_blocks_ * BLOCK);
        for (int i = 0; i < size_; i += WIDTH) {
            const Vector some = temperature_ == 1 ? weights_at<false, false>(i)
                                                  : weights_at<true, false>(i);
            store(scratch_.weights.data() + i, some);
        }
        if (is_limited)
            total = cut_where([&](int64_t count, double) { return count >= draw.top_k; });
        if (draw.top_p < 1) {
            const double share = double(draw.top_p) * total;
            cut_where([&](int64_t, double weight) { return weight >= share; });
        }
    }
};

template <typename Element>
thread_local Scratch Row<Element>::scratch_;

// Some rows of logits. Strides are in elements.
struct Rows {
    const void *logits;
    int64_t stride;
    const int64_t *index;  // of the rows; null if they are the first ones
    int64_t num_rows;
    int size, num_threads;

    // Calls a function with the place among these rows and the row's logits.
    template <typename Element, typename Function>
    void for_each(const Function &function) const {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (num_threads > 1)
        for (int64_t place = 0; place < num_rows; place++) {
            const int64_t row = index ? index[place] : place;
            function(place, static_cast<const Element *>(logits) + row * stride);
        }
    }
};

template <typename Element>
void draw_rows(const Rows &rows, const uint8_t *draws, int64_t *ids) {
    rows.for_each<Element>([=](int64_t place, const Element *logits) {
        Draw draw;
        std::memcpy(&draw, draws + place * sizeof draw, sizeof draw);
        const bool is_greedy = draw.temperature == 0;
        Row<Element> row(logits, rows.size, is_greedy ? 1.0f : draw.temperature);
        ids[place] = is_greedy ? row.first() : row.draw(draw);
    });
}

template <typename Element>
void sum_rows(const Rows &rows, const float *temperatures, const int64_t *ids, float *norms,
              int64_t *num_higher) {
    rows.for_each<Element>([=](int64_t place, const Element *logits) {
        Row<Element> row(logits, rows.size, temperatures ? temperatures[place] : 1.0f);
        norms[place] = row.log_sum();
        if (num_higher) num_higher[place] = row.num_higher(int(ids[place]));
    });
}

template <typename Element>
void rank_rows(const Rows &rows, const float *temperatures, int depth, int64_t *ids,
               float *scores) {
    rows.for_each<Element>([=](int64_t place, const Element *logits) {
        Row<Element> row(logits, rows.size, temperatures ? temperatures[place] : 1.0f);
        row.rank(depth, ids + place * depth, scores + place * depth);
    });
}

}  // namespace

// Called by sampling.py. Elements are 0 fp32, 1 bf16, 2 fp16.
#define TOKASAURUS_BY_ELEMENT(function, ...)               \
    switch (element) {                                     \
        case 0: return function<float>(__VA_ARGS__);       \
        case 1: return function<BFloat16>(__VA_ARGS__);    \
        default: return function<Float16>(__VA_ARGS__);    \
    }

extern "C" {

int64_t tokasaurus_draw_size() { return sizeof(Draw); }

void tokasaurus_draw_rows(int element, const Rows *rows, const uint8_t *draws, int64_t *ids) {
    TOKASAURUS_BY_ELEMENT(draw_rows, *rows, draws, ids)
}

void tokasaurus_sum_rows(int element, const Rows *rows, const float *temperatures,
                         const int64_t *ids, float *norms, int64_t *num_higher) {
    TOKASAURUS_BY_ELEMENT(sum_rows, *rows, temperatures, ids, norms, num_higher)
}

void tokasaurus_rank_rows(int element, const Rows *rows, const float *temperatures, int depth,
                          int64_t *ids, float *scores) {
    TOKASAURUS_BY_ELEMENT(rank_rows, *rows, temperatures, depth, ids, scores)
}
}
