// The method of sampling. A draw inverts the cumulative distribution over the remaining tokens, in order of token id.
// This takes one random number per row, and neither the logarithms of the Gumbel-max method nor a sort.
//
// Truncation (top_k, top_p, min_p) does not sort either. First a lower bound selects the few tokens that can remain:
//   top_k  the k-th largest of the maxima of many disjoint groups of logits, which is at most the k-th largest logit;
//   top_p  a weight of (1 - top_p) * total / vocab: all tokens below it weigh less than (1 - top_p) * total together.
// Then bisection over floats finds, among those few, the smallest logit that remains.
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

namespace octavo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Map floats to integers in the same order, adjacent floats to adjacent integers. (-0 and 0 differ as integers, not as
// floats.)
int32_t key_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float float_of(int32_t key) { return std::bit_cast<float>(key < 0 ? key ^ 0x7fffffff : key); }

// Return the largest float t in [low, high] with holds(t), which is true up to some t >= low and false above.
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

// Return the random number for output token `position` of a request: uniform in [0, 1), of 53 bits.
double uniform(uint64_t seed, int64_t position) {
    const auto word = [](uint64_t x, int32_t i) { return static_cast<uint32_t>(x >> (32 * i)); };
    const auto counter = static_cast<uint64_t>(position);
    const auto random = philox4x32({word(counter, 0), word(counter, 1), 0, 0}, {word(seed, 0), word(seed, 1)});
    return static_cast<double>((uint64_t{random[1]} << 32 | random[0]) >> 11) * 0x1p-53;
}

}  // namespace

// Samples one row in the steps that SamplingBatch defines. The candidates are the tokens that may be drawn, in order of
// id: `count_` entries of the scratch's values, weights and tokens. A candidate is dropped by setting its weight to 0.
class RowSampler {
public:
    RowSampler(float* logits, int32_t vocab, const SamplingRow& row, const Scan& scan, SamplerScratch& scratch)
        : logits_(logits), vocab_(vocab), row_(row), scan_(scan), scratch_(scratch) {}

    SampledToken sample(int32_t* top_tokens, float* top_logprobs) {
        const bool wants_logprobs = row_.num_logprobs >= 0;
        double log_total = 0;
        if (wants_logprobs) {
            const float max = scan_.find_maxima(logits_, vocab_, maxima()).max;
            log_total = max + std::log(scan_.weigh(logits_, vocab_, max, kLog2e, weights(), chunk_sums()));
        }
        const bool masked = row_.mask_length > 0;
        if (masked && wants_logprobs) scratch_.raw.assign(logits_, logits_ + vocab_);
        adjust();
        if (masked) mask();
        const Range range = scan_.find_maxima(logits_, vocab_, maxima());
        if (range.damaged || range.max == -kInfinity) return {-1, kNaN, 0};
        const int32_t token = row_.temperature > 0 ? draw(range.max) : first_of(range.max);
        if (!wants_logprobs) return {token, kNaN, 0};

        restore();
        if (row_.num_logprobs > 0) find_likeliest(log_total, top_tokens, top_logprobs);
        const float raw = logits_[token];
        const int32_t before = scan_.count_from(logits_, token, raw),
                      behind = scan_.count_above(logits_ + token, vocab_ - token, raw);
        return {token, static_cast<float>(raw - log_total), 1 + before + behind};
    }

private:
    float* maxima() { return scratch_.lane_maxima.data(); }
    double* chunk_sums() { return scratch_.chunk_sums.data(); }
    float* values() { return scratch_.values.data(); }
    float* weights() { return scratch_.weights.data(); }
    int32_t* tokens() { return scratch_.tokens.data(); }

    void change(int32_t token) { scratch_.changes.push_back({token, logits_[token]}); }

    // Add biases, then apply penalties as vLLM defines them: repetition over the whole history, the others over the
    // output.
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
        std::vector<int32_t>& seen = scratch_.seen;  // 1 + occurrences in the output; 0 between calls
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

    // Ban the tokens that the mask does not allow. NaN and +inf stay, so that the row still fails.
    void mask() {
        const int32_t words = std::min(row_.mask_length, (vocab_ + 31) / 32);
        for (int32_t w = 0; w < words; ++w) {
            const uint32_t allowed = row_.mask[w];
            if (allowed == ~uint32_t{0}) continue;
            const int32_t end = std::min(vocab_, 32 * (w + 1));
            for (int32_t token = 32 * w; token < end; ++token)
                if (!(allowed >> (token % 32) & 1)) ban(token);
        }
        for (int32_t token = 32 * words; token < vocab_; ++token) ban(token);
    }

    void ban(int32_t token) { logits_[token] = logits_[token] < kInfinity ? -kInfinity : logits_[token]; }

    void restore() {
        auto& changes = scratch_.changes;
        if (row_.mask_length > 0) {
            std::copy(scratch_.raw.begin(), scratch_.raw.end(), logits_);
            scan_.find_maxima(logits_, vocab_, maxima());
            return;
        }
        for (auto c = changes.rbegin(); c != changes.rend(); ++c) logits_[c->token] = c->logit;
        if (!changes.empty()) scan_.find_maxima(logits_, vocab_, maxima());
    }

    int32_t first_of(float max) {
        const auto group = std::find(scratch_.lane_maxima.begin(), scratch_.lane_maxima.end(), max);
        const auto chunk = static_cast<int32_t>(group - scratch_.lane_maxima.begin()) / kScanLanes;
        return static_cast<int32_t>(std::find(logits_ + chunk * kScanChunk, logits_ + vocab_, max) - logits_);
    }

    float kth_largest(const float* x, int32_t n, int32_t k) {
        return last_true(-kInfinity, kInfinity, [&](float t) { return scan_.count_from(x, n, t) >= k; });
    }

    // Return a lower bound of the k-th largest logit: the k-th largest of the groups' maxima.
    float bound_of(int32_t k) {
        const auto groups = static_cast<int32_t>(scratch_.lane_maxima.size());
        return k > groups ? -kInfinity : kth_largest(maxima(), groups, k);
    }

    void find_likeliest(double log_total, int32_t* top_tokens, float* top_logprobs) {
        const int32_t n = std::min(row_.num_logprobs, vocab_);
        count_ = scan_.gather(logits_, vocab_, bound_of(n), values(), tokens());
        std::partial_sort(tokens(), tokens() + n, tokens() + count_, [&](int32_t a, int32_t b) {
            return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
        });
        for (int32_t i = 0; i < n; ++i) {
            top_tokens[i] = tokens()[i];
            top_logprobs[i] = static_cast<float>(logits_[tokens()[i]] - log_total);
        }
    }

    int32_t draw(float max) {
        const float scale = std::min(kLog2e / row_.temperature, std::numeric_limits<float>::max());
        const bool top_k = row_.top_k > 0 && row_.top_k < vocab_;
        double total = 0;
        float bound = -kInfinity;
        if (top_k) {
            bound = bound_of(row_.top_k);
        } else {
            total = scan_.weigh(logits_, vocab_, max, scale, weights(), chunk_sums());
            double least = row_.top_p < 1 ? (1.0 - row_.top_p) * total / vocab_ : 0;
            least = std::max(least, static_cast<double>(row_.min_p));
            if (!(least > 0)) return pick(total, vocab_);
            bound = static_cast<float>(max + std::log2(least / 2) / scale);  // halved, to be safe from rounding
        }
        count_ = scan_.gather(logits_, vocab_, bound, values(), tokens());
        scan_.weigh(values(), count_, max, scale, weights(), chunk_sums());
        if (top_k) {
            keep_largest(row_.top_k);
            total = scan_.sum_chunks(weights(), count_, chunk_sums());
        }
        if (row_.top_p < 1) keep_weight(row_.top_p * total, bound, max);
        if (row_.min_p > 0) scan_.drop_below(weights(), count_, row_.min_p, weights());
        return tokens()[pick(scan_.sum_chunks(weights(), count_, chunk_sums()), count_)];
    }

    // Drop the candidates below `threshold`, and all but the first `ties` of those equal to it.
    void keep_from(float threshold, int32_t ties) {
        scan_.drop_below(values(), count_, threshold, weights());
        const int32_t above = scan_.count_above(values(), count_, threshold);
        if (scan_.count_from(values(), count_, threshold) <= above + ties) return;
        for (int32_t i = 0; i < count_; ++i)
            if (values()[i] == threshold && ties-- <= 0) weights()[i] = 0;
    }

    void keep_largest(int32_t k) {
        const float last = kth_largest(values(), count_, k);
        keep_from(last, k - scan_.count_above(values(), count_, last));
    }

    // Keep the fewest of the largest candidates that together weigh at least `target`; all of them if they weigh less.
    void keep_weight(double target, float low, float high) {
        const auto enough = [&](float t) { return scan_.weight_from(values(), weights(), count_, t) >= target; };
        if (!enough(low)) return;
        const float last = last_true(low, high, enough);
        const double above = scan_.weight_from(values(), weights(), count_, std::nextafter(last, kInfinity));
        const float weight = weights()[std::find(values(), values() + count_, last) - values()];
        keep_from(last, std::max(1, static_cast<int32_t>(std::ceil((target - above) / weight))));
    }

    // Return the first index of `weights` [n] at which the running sum exceeds u * total, for the row's random number
    // u.
    int32_t pick(double total, int32_t n) {
        double rest = uniform(row_.seed, row_.position) * total;
        int32_t chunk = 0, last = 0;
        for (int32_t c = 0; c * kScanChunk < n; ++c) {
            if (chunk_sums()[c] > 0) chunk = c;
            if (rest < chunk_sums()[c]) break;
            rest -= chunk_sums()[c];
        }
        // If rounding leaves a remainder at the end, the last token with any weight is drawn.
        for (int32_t i = chunk * kScanChunk; i < std::min(n, (chunk + 1) * kScanChunk); ++i) {
            if (weights()[i] > 0) last = i;
            if (rest < weights()[i]) break;
            rest -= weights()[i];
        }
        return last;
    }

    float* logits_;
    const int32_t vocab_;
    const SamplingRow& row_;
    const Scan& scan_;
    SamplerScratch& scratch_;
    int32_t count_ = 0;
};

SamplerScratch::SamplerScratch(int32_t vocab)
    : values(vocab), weights(vocab), tokens(vocab), seen(vocab),
      lane_maxima((vocab + kScanChunk - 1) / kScanChunk * kScanLanes),
      chunk_sums((vocab + kScanChunk - 1) / kScanChunk) {}

SampledToken sample_row(float* logits, int32_t vocab, const SamplingRow& row, const Scan& scan, SamplerScratch& scratch,
                        int32_t* top_tokens, float* top_logprobs, int32_t top) {
    std::fill_n(top_tokens, top, -1);
    std::fill_n(top_logprobs, top, kNaN);
    return RowSampler(logits, vocab, row, scan, scratch).sample(top_tokens, top_logprobs);
}

SamplingRow SamplingBatch::row(int32_t r) const {
    return {temperature[r],
            top_k[r],
            top_p[r],
            min_p[r],
            seeds[r],
            positions[r],
            num_logprobs[r],
            repetition[r],
            presence[r],
            frequency[r],
            history + history_start[r],
            history_start[r + 1] - history_start[r],
            history_outputs[r],
            bias_tokens + bias_start[r],
            bias_values + bias_start[r],
            bias_start[r + 1] - bias_start[r],
            masks + mask_start[r],
            mask_start[r + 1] - mask_start[r]};
}

int32_t SamplingBatch::max_logprobs() const {
    return rows == 0 ? -1 : *std::max_element(num_logprobs, num_logprobs + rows);
}

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
