// A model's forward pass as a flat list of instructions: recorded once, then run in one call per step.
//
// Usage: record ops (vector() to finish()), pack() the weights, allocate_kv(), then call step() any number of times.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "ceilings.h"
#include "formats/pack.h"
#include "isa.h"
#include "kernels/sampler.h"
#include "memory.h"
#include "rank_group.h"
#include "thread_pool.h"

namespace octavo {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

struct Sizes {
    int64_t vocab, heads, kv_heads, head_dim, layers;
    double norm_eps;
    int64_t page_size, max_rows, max_sampled;
    bool int8_kv;
};

// The arrays of StepBatch (src/octavo/backends/base.py), borrowed from the caller: tokens and positions [rows],
// query_start [sequences + 1], page_tables [sequences, pages_per_sequence], sample_rows [sampled].
struct Batch {
    int64_t rows, sequences, pages_per_sequence, sampled;
    const int32_t *tokens, *positions, *query_start, *page_tables, *sample_rows;
};

// Pointers to the arrays of StepResult: tokens, logprobs and ranks [sampled], top_* [sampled, top]. If no row wants
// logprobs, `top` is 0 and all pointers but `tokens` are null.
struct Sampled {
    int32_t* tokens;
    float* logprobs;
    int32_t* ranks;
    int32_t top;
    int32_t* top_tokens;
    float* top_logprobs;
};

// The total size of the weights of some linear layers.
struct LinearWeights {
    int64_t bytes = 0, values = 0, integers = 0;  // integers: how many of the values are stored as 8 or 4 bits
};

class Program {
public:
    // `processors`: as for ThreadPool. `ranks`: null, or the processes that run this program together, each with its
    // part of the weights. kv: a memfd for the KV pool, which other processes may map; -1: memory of this process.
    Program(const std::string& isa, std::vector<std::vector<int>> processors, const Sizes& sizes,
            std::vector<double> frequencies, std::unique_ptr<RankGroup> ranks = nullptr, int kv = -1);

    // Recording. Ints are handles: of vectors (norm weights and biases), of weights, and of buffers of activations.
    // Each op returns the buffer that it writes. src/octavo/model/ops.py and the kernels describe what an op computes.
    int vector(const float* values, int64_t length);
    // `spans`: the last column + 1 of each span (Spans in kernels.h); empty: one span.
    int weight(int64_t rows, int64_t columns, Encoding encoding, const std::vector<int64_t>& spans = {});
    // `ends`: for ranks on several nodes, the last token + 1, or column + 1, of each node's part of the result.
    int embed(int weight, int64_t first_token = 0, std::vector<int64_t> ends = {});  // of the weight's first row
    int norm(int x, int vector);
    int linear(int x, int weight, int bias, int residual);  // -1: no bias, no residual
    int rope_and_cache(int qkv, int layer, int q_norm, int k_norm);
    int attention(int q, int layer, int64_t window);
    int gated(int gate_up, Activation activation);  // fused into the linear before it
    int all_reduce(int x, int bias, int residual);  // x: written by the linear before it
    int all_gather(int x, int64_t first_column, int64_t columns, int residual, std::vector<int64_t> ends = {});  // too
    int gather_rows(int x);             // x: written by the attention before it, of which each rank does some rows
    void pool_rows(int x, int vector);  // at most once
    int sampled_rows(int x);
    int observe(int x);       // returns a handle for squares()
    void finish(int logits);  // lay out the memory; `logits` is the buffer to sample from

    int64_t weight_bytes() const { return weight_bytes_; }
    // Write a weight that is stored in `parts`, which have its rows in order. `importance` [columns] or null: the
    // weight of squared errors in each column, for weights rounded to 4 bits. Returns the result of pack_block.
    int pack(int weight, const std::vector<Part>& parts, int64_t rows, int64_t columns, const float* importance);

    int64_t page_bytes() const;
    void allocate_kv(int64_t pages);
    std::shared_ptr<const Memory> kv_memory() const { return kv_; }
    std::byte* page(int64_t page) const;  // [page_bytes]; throws std::invalid_argument if there is no such page

    // Run the forward pass; then sample, or copy the logits out. Both throw std::invalid_argument for a batch that
    // would index outside of an array, or if another thread is running a step; and std::runtime_error if the ranks have
    // been stopped.
    void step(const Batch& batch, const SamplingBatch& sampling, const Pooling& pooling, const Sampled& result);
    void logits(const Batch& batch, float* result);  // [sampled, logits_width]

    // Ranks other than 0: run their part of every step that rank 0 runs, until the group is stopped.
    void follow();

    int nodes() const { return ranks_ ? ranks_->nodes() : 1; }
    int64_t logits_width() const { return logits_width_; }
    int64_t pooled_width() const { return pooled_width_; }  // of the sums of pool_rows; 0 without it

    // Return, for an observed buffer, the sum of the squares of each column over all rows of all steps.
    const std::vector<double>& squares(int observed) const { return squares_.at(observed); }

    // Return the size of the weights that a step reads: those of the layers, or those of the head.
    LinearWeights linears(bool head) const;
    Ceilings ceilings() { return measure_ceilings(kernels_, pool_); }
    void profile(bool on);                        // start measuring from zero, or stop
    std::map<std::string, double> times() const;  // seconds by kind of instruction; "head" is the last linear
    double sampling_seconds() const;              // those of "sample" since the start, measured in every step

private:
    static constexpr int64_t kBatchBytes = int64_t{1} << 30;  // for published_; takes physical memory as it is written

    struct Vector {
        int64_t length;
        std::vector<float> values;  // padded with zeros
    };
    // Memory of this rank; or of all ranks of a node: a buffer for each, for each node, or one for all.
    enum class Home { own, each, nodes, common };
    // What each node has written of a buffer, and sends to the others: its slot of Home::nodes; some columns of all
    // rows; the rows of its tokens; or those of its attention.
    enum class Crossing { none, slot, columns, tokens, attention };
    struct Buffer {
        int64_t width;
        Element element;
        bool sampled;                    // one row per sampled row, else one per token
        Element finest = Element::bf16;  // the last of bf16, i8_groups, i8_rows that its writer can produce
        int64_t last_use = -1;
        Spans spans = {};  // of i8_rows
        int storage = -1;
        Home home = Home::own;
    };
    struct Recorded {
        Instruction instruction;
        int x, out, residual;
        int64_t first_column = 0;  // of `out` that the instruction writes
        Crossing crossing = Crossing::none;
        std::vector<int64_t> ends = {};  // of each node's columns or tokens
    };
    using Work = std::function<void(int64_t row, int thread)>;

    int record(Instruction instruction, int x, int64_t width, Element element, int residual = -1);
    int quantized(int x, Element element, const Spans& spans);
    void share(Home home, Crossing crossing = Crossing::none, std::vector<int64_t> ends = {});
    Recorded& linear_before(int x);
    const float* values_of(int vector, int64_t length) const;
    std::vector<Buffer> assign_storage();
    void lay_out_arena();
    void lay_out_weights();
    void make_scratch();
    void validate(const Batch& batch, const Pooling& pooling) const;
    void prepare(const Batch& batch, const Pooling& pooling);
    void cut_attention(const Batch& batch);
    Cut cut_linear(const Instruction& instruction) const;
    int64_t count_tiles(const Instruction& instruction, const Cut& cut) const;
    int64_t rows_of(const Instruction& instruction) const;
    Ahead panel_memory(int instruction, int64_t tile) const;
    void run_tile(int instruction, int64_t tile, bool more, int thread);
    void run_tiles(int instruction, int thread);
    void add_squares(const Instruction& instruction, int64_t tile);
    void compute_rotary(int64_t begin, int64_t end);
    std::pair<int64_t, int64_t> own_rows(const Instruction& instruction) const;
    void sum_ranks(const Instruction& instruction, int64_t begin, int64_t end);
    Transfer part_of(int node, int index) const;
    bool cross(int index);
    void publish(const Batch& batch);
    bool wait_for_step();
    Batch published() const;
    void wait_for_all(bool exchanged, int written);
    bool run(const Batch& batch, const Pooling& pooling, const Work& finish_row);

    const Kernels& kernels_;
    ThreadPool pool_;
    const std::unique_ptr<RankGroup> ranks_;
    const int kv_file_;
    Sizes sizes_;
    Shape shape_;
    std::vector<double> frequencies_;  // radians per position

    std::deque<Vector> vectors_;
    std::deque<Weight> weights_;
    std::deque<std::vector<double>> squares_;
    std::vector<Buffer> buffers_;
    std::vector<Recorded> recorded_;
    std::vector<Instruction> instructions_;
    bool divides_rows_ = false;  // whether each rank computes the attention of some rows, or that of its heads
    bool followed_ = false;      // by other ranks: rank 0 alone samples; else each rank runs the same steps by itself
    int64_t logits_width_ = 0, pooled_width_ = 0, weight_bytes_ = 0;
    Memory weight_memory_, arena_;
    int32_t* published_ = nullptr;      // the batch of the step, for other ranks
    int64_t shared_bytes_ = 0;          // of the buffers that ranks share
    std::shared_ptr<const Memory> kv_;  // shared with the pages that Python has exported
    int64_t pages_ = 0;
    float* rotary_ = nullptr;

    std::vector<double> seconds_;  // of each instruction since profile(true); empty if profiling is off
    double sampling_seconds_ = 0;

    // State of the step that is running.
    mutable std::mutex running_;
    Step step_{};
    const Work* finish_row_ = nullptr;
    std::atomic<bool> stopped_ = false;  // the ranks have been stopped
    std::vector<RowTile> cache_tiles_;
    std::vector<AttentionTile> attention_tiles_;
    std::vector<std::vector<RowTile>> tiles_of_nodes_;  // if divides_rows_: the attention of each node
    Memory part_sums_;                                  // Step::part_sums; grows to what a step needs
    std::vector<int32_t> parts_done_;                   // Step::parts_done; all 0 between instructions
    struct Plan {
        int64_t tiles;
        Cut cut;          // if it is a linear
        int next_linear;  // index of the next linear, or -1
    };
    std::vector<Plan> plans_;  // of each instruction
    struct alignas(64) Counter {
        std::atomic<int64_t> taken;
    };
    std::vector<Counter> counters_;  // [instructions][threads]: how many of the thread's own tiles are taken
    std::vector<Memory> scratch_memory_;
    std::vector<Scratch> scratch_;
    std::vector<SamplerScratch> sampler_scratch_;
};

}  // namespace octavo
