#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace octavo {

namespace {

constexpr int64_t kPad = 32;  // rows and columns of activations come in multiples of this

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

}  // namespace

Program::Program(const std::string& isa, std::vector<int> cores, const Sizes& sizes, std::vector<double> frequencies)
    : kernels_(kernels_for(isa)), pool_(std::move(cores)), sizes_(sizes),
      shape_{sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.page_size, float(sizes.norm_eps)},
      frequencies_(std::move(frequencies)) {
    require(pool_.size() > 0, "there must be at least one thread");
    require(sizes.head_dim > 0 && sizes.head_dim % kBlock == 0, "head_dim must be a multiple of 16");
    require(sizes.page_size > 0 && sizes.page_size % kSpan == 0, "page_size must be a multiple of 32");
    require(sizes.kv_heads > 0 && sizes.heads % sizes.kv_heads == 0, "heads must be a multiple of kv_heads");
    require(int64_t(frequencies_.size()) * 2 == sizes.head_dim, "there must be a frequency per pair of head_dim");
    instructions_.push_back({.op = Op::rotary});
    recorded_.push_back({{.op = Op::rotary}, -1, -1, -1});
}

// ---- Recording

int Program::vector(const float* values, int64_t length) {
    auto& vector = vectors_.emplace_back(round_up(length, kPad) + kPad);
    std::copy_n(values, length, vector.begin());
    return int(vectors_.size()) - 1;
}

int Program::weight(int64_t rows, int64_t columns, Encoding encoding) {
    weights_.push_back({.rows = rows, .columns = columns, .encoding = encoding});
    return int(weights_.size()) - 1;
}

// Appends an instruction that reads buffers x and residual, and writes a new one: the result.
int Program::record(Instruction instruction, int x, int64_t width, Element element, int residual) {
    const bool sampled = instruction.op == Op::sampled_rows || (x >= 0 && buffers_.at(x).sampled);
    instruction.sampled = sampled;
    for (int read : {x, residual})
        if (read >= 0) buffers_.at(read).last_use = int64_t(recorded_.size());
    buffers_.push_back({width, element, sampled});
    recorded_.push_back({instruction, x, int(buffers_.size()) - 1, residual});
    return int(buffers_.size()) - 1;
}

int Program::embed(int weight) {
    const Weight& w = weights_.at(weight);
    return record({.op = Op::embed, .weight = &w, .width = w.columns}, -1, w.columns, Element::f32);
}

int Program::norm(int x, int vector) {
    const int64_t width = buffers_.at(x).width;
    return record({.op = Op::norm, .vector = vectors_.at(vector).data(), .width = width}, x, width, Element::bf16);
}

int Program::linear(int x, int weight, int bias, int residual) {
    const Weight& w = weights_.at(weight);
    if (w.encoding.is_integer()) x = quantised(x);
    const Element wanted = w.encoding.is_integer() ? Element::i8 : Element::bf16;
    require(buffers_.at(x).element == wanted, "a linear reads bf16, or int8 if its weight has integers");
    require(buffers_.at(x).width == w.columns, "a linear reads as many columns as its weight has");
    require(residual < 0 || buffers_.at(residual).width == w.rows, "a residual has the width of the linear's output");
    return record({.op = Op::linear, .weight = &w, .vector = bias < 0 ? nullptr : vectors_.at(bias).data()}, x, w.rows,
                  Element::f32, residual);
}

// Buffer x in int8: written so in the first place, if nothing reads it as bf16 and its writer can.
int Program::quantised(int x) {
    Buffer& buffer = buffers_.at(x);
    if (buffer.element == Element::bf16 && buffer.whole && buffer.last_use < 0) buffer.element = Element::i8;
    if (buffer.element != Element::bf16) return x;
    return record({.op = Op::quantise}, x, buffer.width, Element::i8);
}

int Program::rope_and_cache(int qkv, int layer, int q_norm, int k_norm) {
    require(buffers_.at(qkv).width == (sizes_.heads + 2 * sizes_.kv_heads) * sizes_.head_dim, "qkv has the wrong width");
    return record({.op = Op::rope_and_cache,
                   .vector = q_norm < 0 ? nullptr : vectors_.at(q_norm).data(),
                   .vector2 = k_norm < 0 ? nullptr : vectors_.at(k_norm).data(),
                   .layer = layer},
                  qkv, sizes_.heads * sizes_.head_dim, Element::bf16);
}

int Program::attention(int q, int layer, int64_t window) {
    const Instruction instruction{.op = Op::attention, .layer = layer, .window = window};
    const int out = record(instruction, q, buffers_.at(q).width, Element::bf16);
    buffers_[out].whole = sizes_.head_dim % kQuantGroup == 0;
    return out;
}

int Program::gated(int gate_up, Activation activation) {
    Recorded& last = recorded_.back();
    require(last.instruction.op == Op::linear && last.out == gate_up && last.residual < 0,
            "gated must follow the linear that it reads");
    last.instruction.activation = activation;
    const_cast<Weight*>(last.instruction.weight)->gated = true;  // before it is packed
    buffers_.back() = {buffers_.back().width / 2, Element::bf16, buffers_.back().sampled};
    return gate_up;
}

int Program::sampled_rows(int x) { return record({.op = Op::sampled_rows}, x, buffers_.at(x).width, Element::f32); }

// Gives each buffer a place that no other one needs while it is in use; returns the places. Only buffers of the same
// shape share one, so that the columns past the width stay zero.
std::vector<Program::Buffer> Program::assign_storage() {
    std::vector<Buffer> places;
    std::vector<int> free;
    const auto take = [&](const Buffer& buffer) {
        const auto fits = [&](int place) {
            const Buffer& p = places[place];
            return p.width == buffer.width && p.element == buffer.element && p.sampled == buffer.sampled;
        };
        const auto found = std::find_if(free.begin(), free.end(), fits);
        if (found == free.end()) {
            places.push_back(buffer);
            return int(places.size()) - 1;
        }
        const int place = *found;
        free.erase(found);
        return place;
    };
    for (int64_t i = 0; i < int64_t(recorded_.size()); i++) {
        const auto [instruction, x, out, residual] = recorded_[i];
        const bool in_place = residual >= 0 && buffers_[residual].last_use == i;
        if (out >= 0) buffers_[out].storage = in_place ? buffers_[residual].storage : take(buffers_[out]);
        if (x >= 0 && buffers_[x].last_use == i) free.push_back(buffers_[x].storage);
    }
    return places;
}

void Program::finish(int logits) {
    const Buffer& result = buffers_.at(logits);
    require(result.sampled && result.element == Element::f32, "logits are float, of the sampled rows");
    logits_width_ = result.width;
    record({.op = Op::sample}, logits, 0, Element::f32);
    const std::vector<Buffer> places = assign_storage();

    // The arena: the buffers, then the rotations of the step's positions.
    const auto rows = [&](const Buffer& b) { return round_up(b.sampled ? sizes_.max_sampled : sizes_.max_rows, kPad); };
    const auto stride = [&](const Buffer& b) { return round_up(b.width, kPad); };
    std::vector<int64_t> offsets;
    int64_t bytes = 0;
    for (const Buffer& place : places) {
        offsets.push_back(bytes);
        const int64_t row_bytes = place.element == Element::i8     ? Matrix::quantised_bytes(stride(place))
                                  : place.element == Element::bf16 ? stride(place) * sizeof(bf16)
                                                                   : stride(place) * sizeof(float);
        bytes += round_up(rows(place) * row_bytes, 4096);
    }
    arena_ = Memory(bytes + sizes_.max_rows * sizes_.head_dim * sizeof(float));
    rotary_ = reinterpret_cast<float*>(arena_.data() + bytes);
    const auto matrix = [&](int buffer) -> Matrix {
        if (buffer < 0) return {};
        const int place = buffers_[buffer].storage;
        return {arena_.data() + offsets[place], stride(places[place]), places[place].element == Element::i8};
    };

    weight_bytes_ = 0;
    for (Weight& w : weights_) {
        w.blocks = w.gated ? 2 * (round_up(w.rows / 2, kBlock) / kBlock) : round_up(w.rows, kBlock) / kBlock;
        w.groups = round_up(w.columns, kQuantGroup) / kQuantGroup;
        const int64_t row_scales = w.encoding.per_row() ? w.encoding.line_bytes() : 0;
        w.block_bytes = round_up(w.groups * (w.encoding.value_bytes() + w.encoding.scale_bytes()) + row_scales, 64);
        weight_bytes_ += w.blocks * w.block_bytes;
    }
    weight_memory_ = Memory(weight_bytes_);
    std::byte* at = weight_memory_.data();
    for (Weight& w : weights_) {
        w.data = at;
        at += w.blocks * w.block_bytes;
    }

    instructions_.clear();
    for (const auto& [instruction, x, out, residual] : recorded_) {
        instructions_.push_back(instruction);
        instructions_.back().x = matrix(x);
        instructions_.back().out = matrix(out);
        instructions_.back().residual = matrix(residual);
    }
    plans_.resize(instructions_.size());
    for (int i = int(plans_.size()) - 1, next = -1; i >= 0; i--) {
        plans_[i].next_linear = next;
        if (instructions_[i].op == Op::linear) next = i;
    }
    counters_ = std::vector<Counter>(instructions_.size() * pool_.size());

    const int64_t pairs = std::max(kAttentionRows, sizes_.heads / sizes_.kv_heads);  // rows of a tile of attention
    int64_t groups = 0;
    for (const Weight& w : weights_) groups = std::max(groups, w.groups);
    const int64_t sizes[] = {kGroup * kMaxPanel * kBlock, pairs * kSpan, pairs * sizes_.head_dim, pairs, pairs * kBlock,
                             pairs * sizes_.head_dim / 2, pairs * kSpan / 2, groups * kW8.value_bytes() / 4};
    for (int i = 0; i < pool_.size(); i++) {
        float* parts[8];
        int64_t total = 0;
        for (int64_t size : sizes) total += round_up(size, 16);
        auto& memory = scratch_memory_.emplace_back(total * sizeof(float));
        parts[0] = reinterpret_cast<float*>(memory.data());
        for (int p = 1; p < 8; p++) parts[p] = parts[p - 1] + round_up(sizes[p - 1], 16);
        scratch_.push_back({parts[0], parts[1], parts[2], parts[3], parts[4], reinterpret_cast<bf16*>(parts[5]),
                            reinterpret_cast<bf16*>(parts[6]), reinterpret_cast<std::byte*>(parts[7])});
        sampler_scratch_.emplace_back(int32_t(logits_width_));
    }
}

void Program::pack(int weight, const std::vector<Part>& parts) {
    const Weight& w = weights_.at(weight);
    for (const Part& part : parts)
        require(!w.encoding.is_integer() || w.encoding == kW8 || w.encoding == kW4 ||
                    holds_losslessly(w.encoding, part.format),
                "this encoding is for the formats that it holds without loss");
    std::vector<std::vector<float>> scratch(pool_.size(), std::vector<float>((1 + kBlock) * (w.columns + kQuantGroup)));
    std::atomic<int64_t> next_block = 0;
    pool_.run([&](int thread) {
        for (int64_t block; (block = next_block.fetch_add(1)) < w.blocks;)
            pack_block(w, parts, block, scratch[thread].data());
    });
}

int64_t Program::page_bytes() const {
    return sizes_.layers * sizes_.kv_heads * sizes_.page_size * sizes_.head_dim * 2 * int64_t(sizeof(bf16));
}

void Program::allocate_kv(int64_t pages) {
    kv_ = Memory();  // the old pool goes first
    kv_ = Memory(pages * page_bytes());
    pages_ = pages;
}

// ---- Running

void Program::validate(const Batch& batch) const {
    require(batch.rows <= sizes_.max_rows, "more rows than max_batch_tokens");
    require(batch.sampled <= sizes_.max_sampled, "more sampled rows than max_batch_size");
    require(batch.query_start[0] == 0 && batch.query_start[batch.sequences] == batch.rows,
            "query_start must run from 0 to the number of rows");
    for (int64_t i = 0; i < batch.rows; i++)
        require(batch.tokens[i] >= 0 && batch.tokens[i] < sizes_.vocab, "a token is not in the vocabulary");
    for (int64_t i = 0; i < batch.sampled; i++)
        require(batch.sample_rows[i] >= 0 && batch.sample_rows[i] < batch.rows, "a sampled row is not in the batch");
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

// Cuts the sequences' rows into tiles for the KV cache and for attention.
void Program::prepare(const Batch& batch) {
    cache_tiles_.clear();
    attention_tiles_.clear();
    const int64_t span = std::max<int64_t>(1, kAttentionRows / (sizes_.heads / sizes_.kv_heads));
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int32_t begin = batch.query_start[s], end = batch.query_start[s + 1];
        for (int32_t row = begin, count; row < end; row += count) {
            count = std::min<int32_t>(end - row, kSpan - batch.positions[row] % kSpan);
            cache_tiles_.push_back({int32_t(s), row, count});
        }
        for (int32_t row = begin, count; row < end; row += count) {
            count = int32_t(std::min<int64_t>(end - row, span));
            attention_tiles_.push_back({int32_t(s), row, count});
        }
    }
    step_ = {.shape = &shape_, .rows = batch.rows, .sampled = batch.sampled, .tokens = batch.tokens,
             .positions = batch.positions, .sample_rows = batch.sample_rows, .page_tables = batch.page_tables,
             .pages_per_sequence = batch.pages_per_sequence, .kv = kv_.data(), .page_bytes = page_bytes(),
             .rotary = rotary_, .cache_tiles = cache_tiles_.data(), .attention_tiles = attention_tiles_.data(),
             .rows_per_tile = std::clamp<int64_t>(batch.rows / (4 * pool_.size()), 1, 16)};
    for (size_t i = 0; i < plans_.size(); i++) {
        if (instructions_[i].op == Op::linear) plans_[i].cut = cut_linear(instructions_[i]);
        plans_[i].tiles = count_tiles(instructions_[i], plans_[i].cut);
    }
    for (auto& counter : counters_) counter.taken.store(0, std::memory_order_relaxed);
}

int64_t Program::rows_of(const Instruction& instruction) const {
    return instruction.sampled ? step_.sampled : step_.rows;
}

// Wide tiles as long as every thread gets several; then narrower ones.
Cut Program::cut_linear(const Instruction& instruction) const {
    const int64_t rows = rows_of(instruction), blocks = instruction.weight->blocks, wanted = 4 * pool_.size();
    const int64_t tile_rows = std::clamp<int64_t>(round_up(rows, kGroup), kGroup, 128);
    const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows;
    if (instruction.out.quantised) return {4, tile_rows, row_tiles};  // whole groups of the result
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
        case Op::sample: return step_.sampled;
        default: return (rows_of(instruction) + step_.rows_per_tile - 1) / step_.rows_per_tile;
    }
}

void Program::compute_rotary(int64_t begin, int64_t end) {
    const int64_t half = sizes_.head_dim / 2;
    for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < half; i++) {
            const double angle = step_.positions[r] * frequencies_[i];
            rotary_[r * 2 * half + i] = float(std::cos(angle));
            rotary_[r * 2 * half + half + i] = float(std::sin(angle));
        }
}

// The part of the weight that a tile of a linear reads.
Ahead Program::panel_memory(int instruction, int64_t tile) const {
    const Cut& cut = plans_[instruction].cut;
    const Weight& weight = *instructions_[instruction].weight;
    const int64_t block = tile / cut.row_tiles * cut.panel;
    return {reinterpret_cast<const char*>(weight.block(block)),
            reinterpret_cast<const char*>(weight.block(std::min(weight.blocks, block + cut.panel)))};
}

// `more`: the thread goes on with the next tile.
void Program::run_tile(int index, int64_t tile, bool more, int thread) {
    const Instruction& instruction = instructions_[index];
    const Plan& plan = plans_[index];
    Scratch& scratch = scratch_[thread];
    const int64_t rows = rows_of(instruction);
    const int64_t begin = tile * step_.rows_per_tile, end = std::min(rows, begin + step_.rows_per_tile);
    switch (instruction.op) {
        case Op::rotary: return compute_rotary(begin, end);
        case Op::embed: return kernels_.embed(instruction, step_, begin, end);
        case Op::norm: return kernels_.norm(instruction, step_, begin, end);
        case Op::quantise: return kernels_.quantise(instruction, step_, begin, end);
        case Op::sampled_rows: return kernels_.sampled_rows(instruction, step_, begin, end);
        case Op::rope_and_cache: return kernels_.rope_and_cache(instruction, step_, tile, scratch);
        case Op::attention: return kernels_.attention(instruction, step_, tile, more ? tile + 1 : -1, scratch);
        case Op::sample: return (*finish_row_)(tile, thread);
        case Op::linear: {
            Ahead ahead;
            if (more)
                ahead = panel_memory(index, tile + 1);
            else if (const int next = plan.next_linear; next >= 0 && plans_[next].tiles)
                ahead = panel_memory(next, plans_[next].tiles * thread / pool_.size());
            return kernels_.linear(instruction, plan.cut, rows, tile, ahead, scratch);
        }
    }
}

// Each thread has a share of the tiles, in a row: so it knows what to fetch ahead, and finds much of what it needs in
// its own cache. When it is done with its share it helps with what is left of the others'.
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

void Program::run(const Batch& batch, const Work& finish_row) {
    validate(batch);
    prepare(batch);
    finish_row_ = &finish_row;
    pool_.run([&](int thread) {
        kernels_.start_thread();
        for (int i = 0; i < int(instructions_.size()); i++) {
            if (i > 0) pool_.barrier();
            run_tiles(i, thread);
        }
        kernels_.stop_thread();
    });
}

void Program::step(const Batch& batch, const SamplingBatch& sampling, const Sampled& result) {
    require(sampling.rows == batch.sampled, "sampling must have one entry per sampled row");
    const Matrix logits = instructions_.back().x;
    run(batch, [&](int64_t row, int thread) {
        const int64_t top = row * result.top;
        const SampledToken sampled = sample_row(
            logits.f32(row), int32_t(logits_width_), sampling.row(int32_t(row)), kernels_.scan, sampler_scratch_[thread],
            result.top ? result.top_tokens + top : nullptr, result.top ? result.top_logprobs + top : nullptr, result.top);
        result.tokens[row] = sampled.token;
        if (result.logprobs) result.logprobs[row] = sampled.logprob;
        if (result.ranks) result.ranks[row] = sampled.rank;
    });
}

void Program::logits(const Batch& batch, float* result) {
    const Matrix logits = instructions_.back().x;
    run(batch, [&](int64_t row, int) {
        std::memcpy(result + row * logits_width_, logits.f32(row), logits_width_ * sizeof(float));
    });
}

}  // namespace octavo
