// Running a program. Recording is in recording.cpp.
#include "program.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "formats/quantize.h"
#include "waiting.h"

namespace octavo {

namespace {

constexpr int64_t kTilesPerThread = 8;  // attention: a tile larger than 1 / (8 threads) of the work is cut into parts

using Clock = std::chrono::steady_clock;

constexpr char kStopped[] = "the ranks of the engine have been stopped";

constexpr int64_t kCounts = 4;     // of a published batch
constexpr int64_t kObserved = 64;  // columns in a tile of the op `observe`

// Return the seconds since `since`, and set `since` to now.
double lap(Clock::time_point& since) {
    const auto before = std::exchange(since, Clock::now());
    return std::chrono::duration<double>(since - before).count();
}

bool is_head(const Instruction& instruction) { return instruction.op == Op::linear && instruction.sampled; }

const char* name_of(const Instruction& instruction) {
    switch (instruction.op) {
        case Op::rotary: return "rotary";
        case Op::embed: return "embed";
        case Op::norm: return "norm";
        case Op::linear: return is_head(instruction) ? "head" : "linear";
        case Op::rope_and_cache: return "rope_and_cache";
        case Op::attention: return "attention";
        case Op::quantize: return "quantize";
        case Op::all_reduce: return "all_reduce";
        case Op::observe: return "observe";
        case Op::pool_rows: return "pool_rows";
        case Op::sampled_rows: return "sampled_rows";
        case Op::sample: return "sample";
    }
    return "";
}

}  // namespace

Program::Program(const std::string& isa, std::vector<std::vector<int>> processors, const Sizes& sizes,
                 std::vector<double> frequencies, std::unique_ptr<RankGroup> ranks, int kv)
    : kernels_(kernels_for(isa)), pool_(std::move(processors)), ranks_(std::move(ranks)), kv_file_(kv), sizes_(sizes),
      shape_{sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.page_size, float(sizes.norm_eps), sizes.int8_kv},
      frequencies_(std::move(frequencies)) {
    require(pool_.size() > 0, "there must be at least one thread");
    require(sizes.head_dim > 0 && sizes.head_dim % kBlock == 0, "head_dim must be a multiple of 16");
    require(sizes.page_size > 0 && sizes.page_size % kSpan == 0, "page_size must be a multiple of 32");
    require(sizes.kv_heads > 0 && sizes.heads % sizes.kv_heads == 0, "heads must be a multiple of kv_heads");
    require(int64_t(frequencies_.size()) * 2 == sizes.head_dim, "there must be a frequency per pair of head_dim");
    recorded_.push_back({{.op = Op::rotary}, -1, -1, -1});
}

int Program::pack(int weight, const std::vector<Part>& parts, int64_t rows, int64_t columns, const float* importance) {
    const Weight& w = weights_.at(weight);
    require(rows == w.rows && columns == w.columns, "a weight is packed in the shape that it was recorded with");
    require(w.data, "a weight is packed when the program is finished");
    for (const Part& part : parts)
        require(!w.encoding.is_integer() || w.encoding == kW8 || w.encoding == kW4 ||
                    holds_losslessly(w.encoding, part.format),
                "this encoding is for the formats that it holds without loss");
    const std::vector<float> weights = column_weights(importance, w.columns);
    const size_t floats = (1 + kBlock) * (w.columns + kRotated) + kMostSkipped;
    std::vector<std::vector<float>> scratch(pool_.size(), std::vector<float>(floats));
    std::atomic<int64_t> next_block = 0;
    std::atomic<int> damaged = -1;
    pool_.run([&](int thread) {
        for (int64_t block; (block = next_block.fetch_add(1)) < w.blocks;) {
            const int part =
                pack_block(w, parts, weights.data(), kernels_.quantize_to_4, block, scratch[thread].data());
            if (part >= 0) damaged = part;
        }
    });
    return damaged;
}

int64_t Program::page_bytes() const {
    return sizes_.layers * sizes_.kv_heads * shape_.blocks_per_page() * 2 * shape_.kv_bytes();
}

// Take physical memory for the first pages of a KV pool, which are used first, while the engine starts: where a virtual
// machine's host must find it, that can take several milliseconds for each 2 MiB. Ends early if the pool is freed.
static void take_ahead(const std::shared_ptr<const Memory>& kv) {
    constexpr size_t kAhead = size_t{128} << 20;
    for (size_t at = 0; at < std::min(kv->size(), kAhead) && kv.use_count() > 1; at += Memory::kHugePage) kv->touch(at);
}

void Program::allocate_kv(int64_t pages) {
    require(pages >= 0, "the number of pages must not be negative");
    const std::lock_guard not_in_a_step(running_);
    pages_ = 0;
    kv_ = nullptr;  // free the old pool first: the memory may not suffice for both
    const size_t bytes = pages * page_bytes();
    kv_ = std::make_shared<const Memory>(Memory::shared(kv_file_, 0, bytes));
    if (kv_file_ >= 0) {
        kv_->take(bytes);
    } else {
        std::thread([kv = kv_] { take_ahead(kv); }).detach();
    }
    if (ranks_) ranks_->take(shared_bytes_);
    pages_ = pages;
}

std::byte* Program::page(int64_t page) const {
    require(page >= 0 && page < pages_, "a page is not in the KV pool");
    return kv_->data() + page * page_bytes();
}

void Program::validate(const Batch& batch, const Pooling& pooling) const {
    require(batch.rows <= sizes_.max_rows, "more rows than max_batch_tokens");
    require(batch.sampled <= sizes_.max_sampled, "more sampled rows than max_batch_size");
    require(batch.query_start[0] == 0 && batch.query_start[batch.sequences] == batch.rows,
            "query_start must run from 0 to the number of rows");
    for (int64_t i = 0; i < batch.rows; i++)
        require(batch.tokens[i] >= 0 && batch.tokens[i] < sizes_.vocab, "a token is not in the vocabulary");
    for (int64_t i = 0; i < batch.sampled; i++)
        require(batch.sample_rows[i] >= 0 && batch.sample_rows[i] < batch.rows, "a sampled row is not in the batch");
    for (int64_t i = 0; i < pooling.ranges; i++)
        require(0 <= pooling.first[i] && pooling.first[i] <= pooling.end[i] && pooling.end[i] <= batch.rows,
                "a pooled row is not in the batch");
    for (int64_t i = 0; i < pooling.labels; i++) {
        require(pooling.label_rows[i] >= 0 && pooling.label_rows[i] < batch.sampled, "a label's row is not sampled");
        require(pooling.label_tokens[i] >= 0 && pooling.label_tokens[i] < logits_width_, "a label is not a token");
    }
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int64_t begin = batch.query_start[s], end = batch.query_start[s + 1];
        require(begin <= end && end <= batch.rows, "query_start must not descend");
        if (begin == end) continue;
        require(batch.positions[begin] >= 0, "a position is negative");
        for (int64_t i = begin + 1; i < end; i++)
            require(batch.positions[i] == batch.positions[i - 1] + 1, "a sequence's rows must be in order of position");
        const int64_t pages = batch.positions[end - 1] / sizes_.page_size + 1;
        require(pages <= batch.pages_per_sequence, "a position is past the end of its page table");
        for (int64_t p = 0; p < pages; p++) {
            const int32_t page = batch.page_tables[s * batch.pages_per_sequence + p];
            require(page >= 0 && page < pages_, "a page is not in the KV pool");
        }
    }
}

// Divide the sequences' rows into tiles of attention. A tile that would still run when the other threads are done is
// divided further, into parts of its context.
void Program::cut_attention(const Batch& batch) {
    const int64_t group = sizes_.heads / sizes_.kv_heads, span = std::max<int64_t>(1, kAttentionRows / group);
    const auto seen = [&](const RowTile& rows) { return int64_t(batch.positions[rows.first + rows.count - 1]) + 1; };
    std::vector<RowTile> tiles;
    int64_t work = 0;  // (row, visible position) pairs per kv head
    int64_t dealt = 0;
    tiles_of_nodes_.assign(divides_rows_ ? ranks_->nodes() : 0, {});
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int32_t end = batch.query_start[s + 1];
        for (int32_t row = batch.query_start[s], count; row < end; row += count) {
            count = int32_t(std::min<int64_t>(end - row, span));
            const RowTile tile{int32_t(s), row, count};
            if (divides_rows_) {
                const int64_t rank = dealt++ % ranks_->size();
                tiles_of_nodes_[rank / ranks_->ranks_per_node()].push_back(tile);
                if (rank != ranks_->rank()) continue;
            }
            tiles.push_back(tile);
            work += count * seen(tiles.back());
        }
    }
    attention_tiles_.clear();
    int32_t split = 0;
    int64_t queries = 0;  // that have sums in part_sums_
    for (const RowTile& rows : tiles) {
        const int64_t parts = (seen(rows) + kPart - 1) / kPart;
        const bool long_one = rows.count * seen(rows) * kTilesPerThread * pool_.size() > work * sizes_.kv_heads;
        if (pool_.size() == 1 || parts == 1 || !long_one) {
            attention_tiles_.push_back({rows, -1, split, queries});
            continue;
        }
        for (int32_t part = 0; part < parts; part++) attention_tiles_.push_back({rows, part, split, queries});
        split++;
        queries += parts * sizes_.kv_heads * rows.count * group;
    }
    const size_t bytes = queries * shape_.sums_stride() * sizeof(float), counters = split * sizes_.kv_heads;
    if (bytes > part_sums_.size()) part_sums_ = Memory(bytes);
    if (counters > parts_done_.size()) parts_done_.resize(counters);
}

// Cut the step's rows into tiles for the KV cache and for attention, and each instruction into its tiles.
void Program::prepare(const Batch& batch, const Pooling& pooling) {
    cut_attention(batch);
    cache_tiles_.clear();
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int32_t begin = batch.query_start[s], end = batch.query_start[s + 1];
        for (int32_t row = begin, count; row < end; row += count) {
            count = std::min<int32_t>(end - row, kSpan - batch.positions[row] % kSpan);
            cache_tiles_.push_back({int32_t(s), row, count});
        }
    }
    step_ = {.shape = &shape_,
             .rows = batch.rows,
             .sampled = batch.sampled,
             .tokens = batch.tokens,
             .positions = batch.positions,
             .sample_rows = batch.sample_rows,
             .page_tables = batch.page_tables,
             .pages_per_sequence = batch.pages_per_sequence,
             .kv = kv_ ? kv_->data() : nullptr,
             .page_bytes = page_bytes(),
             .rotary = rotary_,
             .cache_tiles = cache_tiles_.data(),
             .attention_tiles = attention_tiles_.data(),
             .part_sums = reinterpret_cast<float*>(part_sums_.data()),
             .parts_done = parts_done_.data(),
             .rows_per_tile = std::clamp<int64_t>(batch.rows / (4 * pool_.size()), 1, 16),
             .pooling = pooling};
    for (size_t i = 0; i < plans_.size(); i++) {
        if (instructions_[i].op == Op::linear) plans_[i].cut = cut_linear(instructions_[i]);
        plans_[i].tiles = count_tiles(instructions_[i], plans_[i].cut);
    }
    for (auto& counter : counters_) counter.taken.store(0, std::memory_order_relaxed);
}

int64_t Program::rows_of(const Instruction& instruction) const {
    return instruction.sampled ? step_.sampled : step_.rows;
}

// Return the first and the end of the rows that this rank computes.
std::pair<int64_t, int64_t> Program::own_rows(const Instruction& instruction) const {
    const int64_t rows = rows_of(instruction);
    if (!instruction.divided) return {0, rows};
    const int64_t rank = ranks_->rank_in_node(), ranks = ranks_->ranks_per_node();
    return {rows * rank / ranks, rows * (rank + 1) / ranks};
}

// out[r, :] = (sum of the partial sums x[r, :], of ranks or of nodes) + bias + residual[r, :], for rows begin to
// end - 1.
void Program::sum_ranks(const Instruction& instruction, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
        const float* x[RankGroup::kMostRanks];
        for (int64_t i = 0; i < instruction.partials; i++)
            x[i] = reinterpret_cast<const float*>(instruction.x.row(r) + i * instruction.rank_bytes);
        kernels_.sum_partials(x, instruction.partials, instruction.vector,
                              instruction.residual.data ? instruction.residual.f32(r) : nullptr, instruction.out.f32(r),
                              instruction.out.stride);
    }
}

// Choose the width of a linear's tiles: the widest that still gives every thread several.
Cut Program::cut_linear(const Instruction& instruction) const {
    const int64_t rows = rows_of(instruction), blocks = instruction.weight->blocks, wanted = 4 * pool_.size();
    const int64_t tile_rows = std::clamp<int64_t>(round_up(rows, kGroup), kGroup, 128);
    const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows;
    if (instruction.out.element == Element::i8_groups) return {4, tile_rows, row_tiles};  // whole groups of 32
    int64_t panel = kMaxPanel;
    while (panel > 2 && (blocks + panel - 1) / panel * row_tiles < wanted)
        panel = instruction.weight->gated ? panel - 2 : panel / 2;
    return {panel, tile_rows, row_tiles};
}

int64_t Program::count_tiles(const Instruction& instruction, const Cut& cut) const {
    switch (instruction.op) {
        case Op::linear: return (instruction.weight->blocks + cut.panel - 1) / cut.panel * cut.row_tiles;
        case Op::rope_and_cache: return int64_t(cache_tiles_.size());
        case Op::attention: return int64_t(attention_tiles_.size()) * sizes_.kv_heads;
        case Op::sample: return followed_ && ranks_->rank() > 0 ? 0 : step_.sampled;
        case Op::pool_rows: return step_.pooling.ranges;
        case Op::observe: return (instruction.width + kObserved - 1) / kObserved;
        default: {
            const auto [first, end] = own_rows(instruction);
            return (end - first + step_.rows_per_tile - 1) / step_.rows_per_tile;
        }
    }
}

// squares[i] += sum over rows r of x[r, i]^2, for the columns i of a tile: a tile has all rows, so that the order of
// the sum is fixed.
void Program::add_squares(const Instruction& instruction, int64_t tile) {
    const int64_t begin = tile * kObserved, end = std::min(instruction.width, begin + kObserved);
    for (int64_t row = 0; row < rows_of(instruction); row++)
        for (int64_t i = begin; i < end; i++) {
            const float x = std::bit_cast<float>(uint32_t(instruction.x.b16(row)[i]) << 16);
            instruction.squares[i] += double(x) * x;
        }
}

// rotary[r] = (cos, sin) of positions[r] * frequencies, for rows begin ... end - 1 (RoPE: Su et al., 2021).
void Program::compute_rotary(int64_t begin, int64_t end) {
    const int64_t half = sizes_.head_dim / 2;
    for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < half; i++) {
            const double angle = step_.positions[r] * frequencies_[i];
            rotary_[r * 2 * half + i] = float(std::cos(angle));
            rotary_[r * 2 * half + half + i] = float(std::sin(angle));
        }
}

// Return the part of the weight that a tile of a linear reads.
Ahead Program::panel_memory(int instruction, int64_t tile) const {
    const Cut& cut = plans_[instruction].cut;
    const Weight& weight = *instructions_[instruction].weight;
    const int64_t block = tile / cut.row_tiles * cut.panel;
    return {reinterpret_cast<const char*>(weight.block(block)),
            reinterpret_cast<const char*>(weight.block(std::min(weight.blocks, block + cut.panel)))};
}

// Run a tile of instruction `index`. `more`: the thread will run the next tile too, so that may be prefetched.
void Program::run_tile(int index, int64_t tile, bool more, int thread) {
    const Instruction& instruction = instructions_[index];
    const Plan& plan = plans_[index];
    Scratch& scratch = scratch_[thread];
    const auto [first_row, end_row] = own_rows(instruction);
    const int64_t begin = first_row + tile * step_.rows_per_tile;
    const int64_t end = std::min(end_row, begin + step_.rows_per_tile);
    switch (instruction.op) {
        case Op::rotary: return compute_rotary(begin, end);
        case Op::embed: return kernels_.embed(instruction, step_, begin, end, scratch);
        case Op::observe: return add_squares(instruction, tile);
        case Op::norm: return kernels_.norm(instruction, step_, begin, end, scratch);
        case Op::quantize: return kernels_.quantize(instruction, step_, begin, end, scratch);
        case Op::pool_rows: return kernels_.pool_rows(instruction, step_, tile, tile + 1, scratch);
        case Op::all_reduce: return sum_ranks(instruction, begin, end);
        case Op::sampled_rows: return kernels_.sampled_rows(instruction, step_, begin, end, scratch);
        case Op::rope_and_cache: return kernels_.rope_and_cache(instruction, step_, tile, scratch);
        case Op::attention: return kernels_.attention(instruction, step_, tile, more ? tile + 1 : -1, scratch);
        case Op::sample: return (*finish_row_)(tile, thread);
        case Op::linear: {
            Ahead ahead;
            if (more)
                ahead = panel_memory(index, tile + 1);
            else if (const int next = plan.next_linear; next >= 0 && plans_[next].tiles)
                ahead = panel_memory(next, plans_[next].tiles * thread / pool_.size());
            return kernels_.linear(instruction, plan.cut, rows_of(instruction), tile, ahead, scratch);
        }
    }
}

// Run instruction `index`. Each thread has a contiguous range of tiles, so it knows which memory to prefetch and finds
// much of its input in its own cache. A thread that has finished its range takes tiles from the ranges of others.
void Program::run_tiles(int index, int thread) {
    const int64_t tiles = plans_[index].tiles;
    const int threads = pool_.size();
    for (int i = 0; i < threads; i++) {
        const int owner = (thread + i) % threads;
        const int64_t begin = tiles * owner / threads, end = tiles * (owner + 1) / threads;
        auto& taken = counters_[index * threads + owner].taken;
        while (taken.load(std::memory_order_relaxed) < end - begin) {
            const int64_t tile = begin + taken.fetch_add(1, std::memory_order_relaxed);
            if (tile < end) run_tile(index, tile, tile + 1 < end, thread);
        }
    }
}

// Wait until all threads, and if `exchanged` all ranks, are here, and have what instruction `written` has written.
void Program::wait_for_all(bool exchanged, int written) {
    if (!exchanged) return pool_.barrier();
    pool_.barrier([&] { stopped_ = stopped_ || !ranks_->barrier() || !cross(written); });
}

// Return what a node has written of the result of an instruction.
Transfer Program::part_of(int node, int index) const {
    const Recorded& recorded = recorded_[index];
    const Instruction& instruction = instructions_[index];
    const Matrix out = instruction.out.from_column(-recorded.first_column);
    const int64_t rows = rows_of(instruction), own = ranks_->node();
    const auto begin = [&] { return node ? recorded.ends[node - 1] : 0; };
    Transfer part{node, false, {}};
    switch (recorded.crossing) {
        case Crossing::none: break;
        case Crossing::slot:  // which the next instruction, an all_reduce, adds to the others
            part.add(out.row(0) + (node - own) * instructions_[index + 1].rank_bytes, rows * out.row_bytes);
            break;
        case Crossing::columns:
            for (int64_t r = 0; r < rows; r++)
                part.add(out.row(r) + begin() * sizeof(float), (recorded.ends[node] - begin()) * sizeof(float));
            break;
        case Crossing::tokens:
            for (int64_t r = 0; r < rows; r++)
                if (step_.tokens[r] >= begin() && step_.tokens[r] < recorded.ends[node])
                    part.add(out.row(r), out.row_bytes);
            break;
        case Crossing::attention:
            for (const RowTile& tile : tiles_of_nodes_[node]) part.add(out.row(tile.first), tile.count * out.row_bytes);
    }
    return part;
}

// Send this node's part of the result of an instruction to the other nodes, and receive theirs. Return false if the
// ranks have been stopped.
bool Program::cross(int index) {
    if (recorded_[index].crossing == Crossing::none) return true;
    if (ranks_->rank_in_node() == 0) {
        const bool to_first = followed_ && is_head(instructions_[index]);  // logits are for the node that samples
        const int own = ranks_->node();
        std::vector<Transfer> transfers;
        for (int node = 0; node < ranks_->nodes(); node++) {
            if (node == own) continue;
            if (!to_first || own == 0) transfers.push_back(part_of(node, index));
            if (!to_first || node == 0) {
                transfers.push_back(part_of(own, index));
                transfers.back().node = node, transfers.back().sends = true;
            }
        }
        if (!ranks_->transfer(std::move(transfers), kBarrierPatience)) return false;
    }
    return ranks_->barrier();
}

// Return false if the ranks have been stopped.
bool Program::run(const Batch& batch, const Pooling& pooling, const Work& finish_row) {
    require(!instructions_.empty(), "a program is run when it is finished");
    const std::unique_lock one_at_a_time(running_, std::try_to_lock);
    require(one_at_a_time.owns_lock(), "another thread is running a step");
    validate(batch, pooling);
    prepare(batch, pooling);
    if (followed_ && ranks_->rank() == 0) publish(batch);  // last: what fails before concerns no other rank
    finish_row_ = &finish_row;
    const bool profiled = !seconds_.empty();
    const int sampling = int(instructions_.size()) - 1;
    Clock::time_point since, sampling_began;
    stopped_ = false;
    pool_.run([&](int thread) {
        const bool timing = profiled && thread == 0;
        kernels_.start_thread();
        if (timing) since = Clock::now();
        bool exchanged = ranks_ && !followed_;  // whether the next barrier is one of all ranks
        for (int i = 0; i < int(instructions_.size()) && !stopped_; i++) {
            if (i > 0 && (plans_[i].tiles || exchanged)) wait_for_all(std::exchange(exchanged, false), i - 1);
            if (timing && i > 0) seconds_[i - 1] += lap(since);
            if (thread == 0 && i == sampling) sampling_began = Clock::now();
            if (!stopped_) run_tiles(i, thread);
            exchanged |= instructions_[i].shared;
        }
        if (exchanged && !stopped_) wait_for_all(true, int(instructions_.size()) - 1);
        kernels_.stop_thread();
    });
    if (stopped_) return false;
    if (profiled) seconds_.back() += lap(since);
    sampling_seconds_ += lap(sampling_began);
    return true;
}

// Write the batch where the other ranks find it, and let them begin.
void Program::publish(const Batch& batch) {
    const int32_t counts[kCounts] = {int32_t(batch.rows), int32_t(batch.sequences), int32_t(batch.pages_per_sequence),
                                     int32_t(batch.sampled)};
    const int64_t tables = batch.sequences * batch.pages_per_sequence;
    const int64_t ints = kCounts + 2 * batch.rows + batch.sequences + 1 + tables + batch.sampled;
    require(ints * int64_t(sizeof(int32_t)) <= kBatchBytes, "the page tables are too large");
    int32_t* to = published_;
    const auto write = [&](const int32_t* from, int64_t count) { to = std::copy_n(from, count, to); };
    write(counts, kCounts);
    write(batch.tokens, batch.rows), write(batch.positions, batch.rows);
    write(batch.query_start, batch.sequences + 1), write(batch.page_tables, tables);
    write(batch.sample_rows, batch.sampled);
    if (ranks_->nodes() > 1) {
        int64_t bytes = ints * int64_t(sizeof(int32_t));
        std::vector<Transfer> transfers;
        for (int node = 1; node < ranks_->nodes(); node++) {
            Transfer& transfer = transfers.emplace_back(Transfer{node, true, {}});
            transfer.add(reinterpret_cast<std::byte*>(&bytes), sizeof bytes);
            transfer.add(reinterpret_cast<std::byte*>(published_), bytes);
        }
        if (!ranks_->transfer(std::move(transfers), kBarrierPatience)) return;  // the step finds the ranks stopped
    }
    ranks_->start_step();
}

// Ranks other than 0: wait for the next batch. Return false if the ranks have been stopped.
bool Program::wait_for_step() {
    if (ranks_->rank_in_node() > 0) return ranks_->wait_for_step();
    const auto receive = [&](void* to, int64_t bytes) {
        std::vector<Transfer> transfers{{0, false, {}}};
        transfers[0].add(static_cast<std::byte*>(to), bytes);
        return ranks_->transfer(std::move(transfers), kStepPatience);
    };
    int64_t bytes = 0;
    if (!receive(&bytes, sizeof bytes)) return false;
    if (bytes < 0 || bytes > kBatchBytes || !receive(published_, bytes)) return false;
    ranks_->start_step();
    return true;
}

// Return the batch that rank 0 has written.
Batch Program::published() const {
    const int32_t* counts = published_;
    const int64_t rows = counts[0], sequences = counts[1], pages_per_sequence = counts[2], sampled = counts[3];
    const int32_t *tokens = counts + kCounts, *positions = tokens + rows, *query_start = positions + rows;
    const int32_t* page_tables = query_start + sequences + 1;
    const int32_t* sample_rows = page_tables + sequences * pages_per_sequence;
    return {rows, sequences, pages_per_sequence, sampled, tokens, positions, query_start, page_tables, sample_rows};
}

void Program::follow() {
    require(ranks_ && ranks_->rank() > 0, "rank 0 does not follow");
    const Work none = [](int64_t, int) {};
    while (wait_for_step() && run(published(), {}, none)) {
    }
}

LinearWeights Program::linears(bool head) const {
    LinearWeights all;
    for (const Instruction& instruction : instructions_) {
        if (instruction.op != Op::linear || is_head(instruction) != head) continue;
        const Weight& w = *instruction.weight;
        all.bytes += w.blocks * w.block_bytes;
        all.values += w.rows * w.columns;
        if (w.encoding.is_integer()) all.integers += w.rows * w.columns;
    }
    return all;
}

void Program::profile(bool on) {
    const std::lock_guard not_in_a_step(running_);
    seconds_.assign(on ? instructions_.size() : 0, 0.0);
}

std::map<std::string, double> Program::times() const {
    const std::lock_guard not_in_a_step(running_);
    std::map<std::string, double> times;
    for (size_t i = 0; i < seconds_.size(); i++) times[name_of(instructions_[i])] += seconds_[i];
    return times;
}

double Program::sampling_seconds() const {
    const std::lock_guard not_in_a_step(running_);
    return sampling_seconds_;
}

void Program::step(const Batch& batch, const SamplingBatch& sampling, const Pooling& pooling, const Sampled& result) {
    require(sampling.rows == batch.sampled, "sampling must have one entry per sampled row");
    const bool done = run(batch, pooling, [&](int64_t row, int thread) {
        float* logits = instructions_.back().x.f32(row);
        for (int64_t i = 0; i < pooling.labels; i++)
            if (pooling.label_rows[i] == row) pooling.label_logits[i] = logits[pooling.label_tokens[i]];
        const int64_t top = row * result.top;
        const SampledToken sampled =
            sample_row(logits, int32_t(logits_width_), sampling.row(int32_t(row)), kernels_.scan,
                       sampler_scratch_[thread], result.top ? result.top_tokens + top : nullptr,
                       result.top ? result.top_logprobs + top : nullptr, result.top);
        result.tokens[row] = sampled.token;
        if (result.logprobs) result.logprobs[row] = sampled.logprob;
        if (result.ranks) result.ranks[row] = sampled.rank;
    });
    if (!done) throw std::runtime_error(kStopped);
}

void Program::logits(const Batch& batch, float* result) {
    const bool done = run(batch, {}, [&](int64_t row, int) {
        std::memcpy(result + row * logits_width_, instructions_.back().x.f32(row), logits_width_ * sizeof(float));
    });
    if (!done) throw std::runtime_error(kStopped);
}

}  // namespace octavo
