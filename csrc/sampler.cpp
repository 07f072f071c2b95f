// How a row is sampled. Every pass over the vocabulary runs on 16 explicit lanes, whatever the machine's vectors are, and
// this file is compiled without contracting a * b + c: so sums have one order and the result is the same on every ISA.
//
// The draw inverts the cumulative distribution of the surviving tokens in order of token id: one random number per row,
// no pass of logarithms as Gumbel-max needs, no sort. Truncation needs no sort either. A bound gathers the few tokens
// that can survive (`gather`): for top_k, the k-th largest of many disjoint groups' maxima, which is no larger than the
// k-th largest logit; for top_p, weight (1 - top_p) * total / vocab, since all tokens below it weigh less than
// (1 - top_p) * total together. Among those, the logit at which the set closes is found by bisection (`last_true`).
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif
#define INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"  // how vectors are passed: nothing that takes or gives one is ever called

namespace octavo {
namespace {

constexpr int32_t kLanes = 16;
constexpr int32_t kChunk = 64 * kLanes;  // summed in float; chunks are added up in double
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));  // -1: true

__attribute__((noinline, cold)) void pad(const float* x, int32_t n, float fill, float* padded) {
    std::fill_n(std::copy_n(x, n, padded), kLanes - n, fill);
}

// The values from x[i] on; past n, `fill`.
INLINE Lanes load(const float* x, int32_t i, int32_t n, float fill) {
    Lanes values;
    if (__builtin_expect(i + kLanes <= n, true)) {
        std::memcpy(&values, x + i, sizeof values);
    } else {
        float padded[kLanes];
        pad(x + i, n - i, fill, padded);
        std::memcpy(&values, padded, sizeof values);
    }
    return values;
}

INLINE void store(float* x, int32_t i, int32_t n, const Lanes& values) {
    std::memcpy(x + i, &values, sizeof(float) * std::min(kLanes, n - i));
}

INLINE float sum_of(const Lanes& v) {  // pairwise
    float lane[kLanes];
    std::memcpy(lane, &v, sizeof v);
    for (int32_t half = kLanes / 2; half > 0; half /= 2)
        for (int32_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

INLINE int32_t sum_of(const Mask& v) {
    int32_t sum = 0;
    for (int32_t lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

// e^x for x <= 0, within 2 ulp, 0 below e^-87; e^0 is exactly 1. The polynomial is Cephes' expf (Moshier).
INLINE Lanes exp_of(const Lanes& exponent_of_e) {
    const Mask zero = exponent_of_e < -87.0f;
    const Lanes x = zero ? Lanes{} - 87.0f : exponent_of_e;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Lanes shifted = x * 1.44269504088896341f + kRound;
    const Lanes n = shifted - kRound;
    const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Lanes mantissa = p * (r * r) + r + 1.0f;
    const Mask exponent = ((Mask)shifted - std::bit_cast<int32_t>(kRound) + 127) << 23;
    return zero ? Lanes{} : mantissa * (Lanes)exponent;
}

struct Range {
    float max;
    bool damaged;  // a NaN or +inf is among the values

    bool usable() const { return !damaged && max > -kInfinity; }
};

// The maximum, and in `maxima` those of the lanes of each chunk: of disjoint groups of at most 64 values.
VECTORISED Range find_maxima(const float* x, int32_t n, float* maxima) {
    Lanes max = Lanes{} - kInfinity;
    Mask damaged{};
    for (int32_t start = 0; start < n; start += kChunk) {
        Lanes chunk = Lanes{} - kInfinity;
        for (int32_t i = start; i < std::min(n, start + kChunk); i += kLanes) {
            const Lanes v = load(x, i, n, -kInfinity);
            damaged |= ~(v < kInfinity);
            chunk = v > chunk ? v : chunk;
        }
        std::memcpy(maxima + start / kChunk * kLanes, &chunk, sizeof chunk);
        max = chunk > max ? chunk : max;
    }
    float highest = max[0];
    for (int32_t lane = 1; lane < kLanes; ++lane) highest = std::max(highest, max[lane]);
    return {highest, sum_of(damaged) != 0};
}

// w = e^((x - max) * scale) for max >= x, and its sum, as in sum_chunks.
VECTORISED double weigh(const float* x, int32_t n, float max, float scale, float* w, double* chunk_sums) {
    double total = 0;
    for (int32_t start = 0; start < n; start += kChunk) {
        Lanes sum{};
        for (int32_t i = start; i < std::min(n, start + kChunk); i += kLanes) {
            const Lanes weight = exp_of((load(x, i, n, -kInfinity) - max) * scale);
            store(w, i, n, weight);
            sum += weight;
        }
        total += chunk_sums[start / kChunk] = sum_of(sum);
    }
    return total;
}

VECTORISED double sum_chunks(const float* w, int32_t n, double* chunk_sums) {
    double total = 0;
    for (int32_t start = 0; start < n; start += kChunk) {
        Lanes sum{};
        for (int32_t i = start; i < std::min(n, start + kChunk); i += kLanes) sum += load(w, i, n, 0);
        total += chunk_sums[start / kChunk] = sum_of(sum);
    }
    return total;
}

// The sum of w where x >= threshold.
VECTORISED double weight_from(const float* x, const float* w, int32_t n, float threshold) {
    double total = 0;
    for (int32_t start = 0; start < n; start += kChunk) {
        Lanes sum{};
        for (int32_t i = start; i < std::min(n, start + kChunk); i += kLanes)
            sum += load(x, i, n, -kInfinity) >= threshold ? load(w, i, n, 0) : Lanes{};
        total += sum_of(sum);
    }
    return total;
}

VECTORISED int32_t count_above(const float* x, int32_t n, float threshold) {
    Mask count{};
    for (int32_t i = 0; i < n; i += kLanes) count -= load(x, i, n, -kInfinity) > threshold;
    return sum_of(count);
}

VECTORISED int32_t count_from(const float* x, int32_t n, float threshold) {
    Mask count{};
    for (int32_t i = 0; i < n; i += kLanes) count -= load(x, i, n, kNaN) >= threshold;
    return sum_of(count);
}

// Copies the values >= threshold and their indices, in order; returns how many there are.
VECTORISED int32_t gather(const float* x, int32_t n, float threshold, float* values, int32_t* indices) {
    constexpr int32_t kSkip = 4 * kLanes;
    int32_t count = 0;
    for (int32_t start = 0; start < n; start += kSkip) {
        Mask any{};
        for (int32_t i = start; i < std::min(n, start + kSkip); i += kLanes) any |= load(x, i, n, kNaN) >= threshold;
        if (sum_of(any) == 0) continue;
        for (int32_t i = start; i < std::min(n, start + kSkip); ++i) {
            values[count] = x[i];  // room for all n, so no branch is needed
            indices[count] = i;
            count += x[i] >= threshold;
        }
    }
    return count;
}

// Floats in order, as integers: neighbours differ by 1. (-0 and 0 are two, which a comparison takes for the same.)
int32_t key_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float float_of(int32_t key) { return std::bit_cast<float>(key < 0 ? key ^ 0x7fffffff : key); }

// The largest float t in [low, high] with holds(t). It holds for low, and not past some t.
template <class Holds>
float last_true(float low, float high, Holds holds) {
    int64_t first = key_of(low), last = key_of(high);
    while (first < last) {
        const int64_t middle = first + (last - first + 1) / 2;
        if (holds(float_of(static_cast<int32_t>(middle))))
            first = middle;
        else
            last = middle - 1;
    }
    return float_of(static_cast<int32_t>(first));
}

float kth_largest(const float* x, int32_t n, int32_t k) {
    return last_true(-kInfinity, kInfinity, [&](float t) { return count_from(x, n, t) >= k; });
}

// Output number `position` of a request has one uniform number in [0, 1), of 53 bits.
double uniform(uint64_t seed, int64_t position) {
    const auto word = [](uint64_t x, int32_t i) { return static_cast<uint32_t>(x >> (32 * i)); };
    const auto counter = static_cast<uint64_t>(position);
    const auto random = philox4x32({word(counter, 0), word(counter, 1), 0, 0}, {word(seed, 0), word(seed, 1)});
    return static_cast<double>((uint64_t{random[1]} << 32 | random[0]) >> 11) * 0x1p-53;
}

}  // namespace

// The sampling of one row, step by step as SamplingBatch says. The candidates are the tokens that may be drawn, in order
// of id: `count_` entries of the scratch's values, weights and tokens.
class RowSampler {
public:
    RowSampler(float* logits, int32_t vocab, const SamplingRow& row, SamplerScratch& scratch)
        : logits_(logits), vocab_(vocab), row_(row), scratch_(scratch) {}

    SampledToken sample(int32_t* top_tokens, float* top_logprobs) {
        const SampledToken none{-1, kNaN, 0};
        const bool wants_logprobs = row_.num_logprobs >= 0;
        double log_total = 0;
        if (wants_logprobs) {
            const Range raw = find_maxima(logits_, vocab_, maxima());
            if (!raw.usable()) return none;
            log_total = raw.max + std::log(weigh(logits_, vocab_, raw.max, 1.0f, weights(), chunk_sums()));
        }
        adjust();
        const Range range = find_maxima(logits_, vocab_, maxima());
        if (!range.usable()) return none;
        const int32_t token = row_.temperature > 0 ? draw(range.max) : first_of(range.max);
        if (!wants_logprobs) return {token, kNaN, 0};

        restore();
        if (row_.num_logprobs > 0) find_likeliest(log_total, top_tokens, top_logprobs);
        const float raw = logits_[token];
        const int32_t before = count_from(logits_, token, raw) + count_above(logits_ + token, vocab_ - token, raw);
        return {token, static_cast<float>(raw - log_total), 1 + before};
    }

private:
    float* maxima() { return scratch_.lane_maxima.data(); }
    double* chunk_sums() { return scratch_.chunk_sums.data(); }
    float* values() { return scratch_.values.data(); }
    float* weights() { return scratch_.weights.data(); }
    int32_t* tokens() { return scratch_.tokens.data(); }

    void change(int32_t token) { scratch_.changes.push_back({token, logits_[token]}); }

    // Bias, then penalties as vLLM defines them: repetition over all of the history, the others over the output.
    void adjust() {
        scratch_.changes.clear();
        const auto exists = [&](int32_t token) { return token >= 0 && token < vocab_; };
        for (int32_t i = 0; i < row_.bias_length; ++i) {
            const int32_t token = row_.bias_tokens[i];
            if (!exists(token)) continue;
            change(token);
            logits_[token] += row_.bias_values[i];
        }
        const size_t first = scratch_.changes.size();
        std::vector<int32_t>& seen = scratch_.seen;  // all 0 between calls; else 1 + occurrences in the output
        for (int32_t i = 0; i < row_.history_length; ++i) {
            const int32_t token = row_.history[i];
            if (!exists(token)) continue;
            if (seen[token] == 0) {
                seen[token] = 1;
                change(token);
            }
            seen[token] += i >= row_.history_length - row_.history_outputs;
        }
        for (size_t i = first; i < scratch_.changes.size(); ++i) {
            const int32_t token = scratch_.changes[i].token;
            const int32_t count = std::exchange(seen[token], 0) - 1;
            float& x = logits_[token];
            x = x > 0 ? x / row_.repetition : x * row_.repetition;
            x -= row_.frequency * static_cast<float>(count);
            if (count > 0) x -= row_.presence;
        }
    }

    void restore() {
        auto& changes = scratch_.changes;
        for (auto c = changes.rbegin(); c != changes.rend(); ++c) logits_[c->token] = c->logit;
        if (!changes.empty()) find_maxima(logits_, vocab_, maxima());
    }

    int32_t first_of(float max) {
        const auto group = std::find(scratch_.lane_maxima.begin(), scratch_.lane_maxima.end(), max);
        const auto chunk = static_cast<int32_t>(group - scratch_.lane_maxima.begin()) / kLanes;
        return static_cast<int32_t>(std::find(logits_ + chunk * kChunk, logits_ + vocab_, max) - logits_);
    }

    // A value that at least k logits reach, and as few more as is known from `maxima`.
    float bound_of(int32_t k) {
        const auto groups = (vocab_ + kChunk - 1) / kChunk * kLanes;
        return k > groups ? -kInfinity : kth_largest(maxima(), groups, k);
    }

    void find_likeliest(double log_total, int32_t* top_tokens, float* top_logprobs) {
        const int32_t n = std::min(row_.num_logprobs, vocab_);
        count_ = gather(logits_, vocab_, bound_of(n), values(), tokens());
        std::partial_sort(tokens(), tokens() + n, tokens() + count_, [&](int32_t a, int32_t b) {
            return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
        });
        for (int32_t i = 0; i < n; ++i) {
            top_tokens[i] = tokens()[i];
            top_logprobs[i] = static_cast<float>(logits_[tokens()[i]] - log_total);
        }
    }

    int32_t draw(float max) {
        const float scale = std::min(1 / row_.temperature, std::numeric_limits<float>::max());
        const bool top_k = row_.top_k > 0 && row_.top_k < vocab_;
        double total = 0;
        float bound = -kInfinity;
        if (top_k) {
            bound = bound_of(row_.top_k);
        } else {
            total = weigh(logits_, vocab_, max, scale, weights(), chunk_sums());
            double least = row_.top_p < 1 ? (1.0 - row_.top_p) * total / vocab_ : 0;
            least = std::max(least, static_cast<double>(row_.min_p));
            if (!(least > 0)) return pick(total, vocab_);
            bound = static_cast<float>(max + std::log(least / 2) / scale);  // half: beyond any rounding
        }
        count_ = gather(logits_, vocab_, bound, values(), tokens());
        weigh(values(), count_, max, scale, weights(), chunk_sums());
        if (top_k) {
            keep_largest(row_.top_k);
            total = sum_chunks(weights(), count_, chunk_sums());
        }
        if (row_.top_p < 1) keep_weight(row_.top_p * total);
        if (row_.min_p > 0) keep([&](int32_t i) { return weights()[i] >= row_.min_p; });
        return tokens()[pick(sum_chunks(weights(), count_, chunk_sums()), count_)];
    }

    template <class Wanted>
    void keep(Wanted wanted) {
        int32_t kept = 0;
        for (int32_t i = 0; i < count_; ++i) {
            const bool stays = wanted(i);
            values()[kept] = values()[i];
            weights()[kept] = weights()[i];
            tokens()[kept] = tokens()[i];
            kept += stays;
        }
        count_ = kept;
    }

    // Those above `threshold` and the first `ties` that equal it.
    void keep_from(float threshold, int32_t ties) {
        keep([&](int32_t i) { return values()[i] > threshold || (values()[i] == threshold && ties-- > 0); });
    }

    void keep_largest(int32_t k) {
        const float last = kth_largest(values(), count_, k);
        keep_from(last, k - count_above(values(), count_, last));
    }

    // The fewest of the largest that weigh `target` together; all, if they do not.
    void keep_weight(double target) {
        const auto enough = [&](float t) { return weight_from(values(), weights(), count_, t) >= target; };
        if (count_ == 0 || !enough(-kInfinity)) return;
        const float last = last_true(*std::min_element(values(), values() + count_),
                                     *std::max_element(values(), values() + count_), enough);
        const double above = weight_from(values(), weights(), count_, std::nextafter(last, kInfinity));
        const float weight = weights()[std::find(values(), values() + count_, last) - values()];
        keep_from(last, std::max(1, static_cast<int32_t>(std::ceil((target - above) / weight))));
    }

    // The entry of `weights` [n] at which their running sum passes a random part of `total`; `chunk_sums` are theirs.
    int32_t pick(double total, int32_t n) {
        double rest = uniform(row_.seed, row_.position) * total;
        int32_t chunk = 0, last = 0;
        for (int32_t c = 0; c * kChunk < n; ++c) {
            if (chunk_sums()[c] > 0) chunk = c;
            if (rest < chunk_sums()[c]) break;
            rest -= chunk_sums()[c];
        }
        // Rounding may leave a rest at the end: then it is the last token that has any weight.
        for (int32_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) {
            if (weights()[i] > 0) last = i;
            if (rest < weights()[i]) break;
            rest -= weights()[i];
        }
        return last;
    }

    float* logits_;
    const int32_t vocab_;
    const SamplingRow& row_;
    SamplerScratch& scratch_;
    int32_t count_ = 0;
};

SamplerScratch::SamplerScratch(int32_t vocab)
    : values(vocab), weights(vocab), tokens(vocab), seen(vocab), lane_maxima((vocab + kChunk - 1) / kChunk * kLanes),
      chunk_sums((vocab + kChunk - 1) / kChunk) {}

SampledToken sample_row(float* logits, int32_t vocab, const SamplingRow& row, SamplerScratch& scratch,
                        int32_t* top_tokens, float* top_logprobs, int32_t top) {
    std::fill_n(top_tokens, top, -1);
    std::fill_n(top_logprobs, top, kNaN);
    return RowSampler(logits, vocab, row, scratch).sample(top_tokens, top_logprobs);
}

SamplingRow SamplingBatch::row(int32_t r) const {
    return {temperature[r], top_k[r], top_p[r], min_p[r], seeds[r], positions[r], num_logprobs[r],
            repetition[r], presence[r], frequency[r],
            history + history_start[r], history_start[r + 1] - history_start[r], history_outputs[r],
            bias_tokens + bias_start[r], bias_values + bias_start[r], bias_start[r + 1] - bias_start[r]};
}

int32_t SamplingBatch::max_logprobs() const { return rows == 0 ? -1 : *std::max_element(num_logprobs, num_logprobs + rows); }

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
        key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
    }
    return counter;
}

}  // namespace octavo
