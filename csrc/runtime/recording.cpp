// Recording a program, and laying out its memory once all ops are recorded.
#include "program.h"

#include <algorithm>
#include <bit>

namespace octavo {

namespace {
constexpr int64_t kPad = 64;  // rows and columns of activations are allocated in multiples of this

// Return the spans of `groups` groups; `ends`: in columns.
Spans spans_of(int64_t columns, int64_t groups, const std::vector<int64_t>& ends) {
    if (ends.empty()) return {1, {groups}};
    Spans spans{int64_t(ends.size()), {}};
    require(spans.count <= kMaxSpans && std::has_single_bit(ends.size()), "a weight has 1, 2, 4 or 8 spans");
    require(ends.back() == columns, "the last span ends at the last column");
    for (int64_t i = 0; i < spans.count; i++) {
        require(ends[i] > (i ? ends[i - 1] : 0), "a span must have columns");
        require(ends[i] % kRotated == 0 || ends[i] == columns, "spans end at multiples of 64 columns");
        spans.ends[i] = ends[i] / kQuantGroup;
    }
    spans.ends[spans.count - 1] = groups;
    return spans;
}
}  // namespace

int Program::vector(const float* values, int64_t length) {
    auto& vector = vectors_.emplace_back(Vector{length, std::vector<float>(round_up(length, kPad) + kPad)});
    std::copy_n(values, length, vector.values.begin());
    return int(vectors_.size()) - 1;
}

// Return the values of a vector, which must have this length; null for handle -1.
const float* Program::values_of(int vector, int64_t length) const {
    if (vector < 0) return nullptr;
    require(vectors_.at(vector).length == length, "a norm or bias has the wrong length");
    return vectors_.at(vector).values.data();
}

int Program::weight(int64_t rows, int64_t columns, Encoding encoding, const std::vector<int64_t>& spans) {
    require(rows > 0 && columns > 0, "a weight must have rows and columns");
    const int64_t groups = round_up(columns, encoding.column_multiple()) / kQuantGroup;
    weights_.push_back({.rows = rows,
                        .columns = columns,
                        .encoding = encoding,
                        .spans = spans_of(columns, groups, spans),
                        .groups = groups});
    return int(weights_.size()) - 1;
}

// Append an instruction that reads buffers x and residual and writes a new buffer; return that buffer.
int Program::record(Instruction instruction, int x, int64_t width, Element element, int residual) {
    const bool sampled = instruction.op == Op::sampled_rows || (x >= 0 && buffers_.at(x).sampled);
    instruction.sampled = sampled;
    for (int read : {x, residual})
        if (read >= 0) buffers_.at(read).last_use = int64_t(recorded_.size());
    buffers_.push_back({width, element, sampled});
    recorded_.push_back({instruction, x, int(buffers_.size()) - 1, residual});
    return int(buffers_.size()) - 1;
}

int Program::embed(int weight, int64_t first_token) {
    const Weight& w = weights_.at(weight);
    require(w.spans.count == 1, "an embedding has one span");
    require(ranks_ || w.rows >= sizes_.vocab, "an embedding must have a row per token of the vocabulary");
    const int out = record({.op = Op::embed, .weight = &w, .width = w.columns, .first_token = first_token}, -1,
                           w.columns, Element::f32);
    if (ranks_) share(Home::common);
    return out;
}

int Program::norm(int x, int vector) {
    const int64_t width = buffers_.at(x).width;
    const bool divided = recorded_.back().instruction.op == Op::all_reduce && recorded_.back().out == x;
    if (divided) recorded_.back().instruction.shared = false;  // each rank reads the rows that it has written
    const Instruction instruction{
        .op = Op::norm, .vector = values_of(vector, width), .width = width, .divided = divided};
    const int out = record(instruction, x, width, Element::bf16);
    buffers_[out].finest = Element::i8_rows;
    if (divided) share(Home::common);
    return out;
}

int Program::linear(int x, int weight, int bias, int residual) {
    const Weight& w = weights_.at(weight);
    const Element wanted = w.encoding.per_row()      ? Element::i8_rows
                           : w.encoding.is_integer() ? Element::i8_groups
                                                     : Element::bf16;
    const Spans spans = wanted == Element::i8_rows ? w.spans : Spans{};
    if (wanted != Element::bf16) x = quantized(x, wanted, spans);
    require(buffers_.at(x).element == wanted && buffers_.at(x).spans == spans,
            "linears that read the same buffer must read it in the same form");
    require(buffers_.at(x).width == w.columns, "a linear reads as many columns as its weight has");
    require(residual < 0 || buffers_.at(residual).width == w.rows, "a residual has the width of the linear's output");
    return record({.op = Op::linear, .weight = &w, .vector = values_of(bias, w.rows)}, x, w.rows, Element::f32,
                  residual);
}

// Return buffer x as int8: x itself, written as int8 by its writer, if that is possible and nothing reads x as bf16;
// else a new buffer that an extra instruction fills.
int Program::quantized(int x, Element element, const Spans& spans) {
    Buffer& buffer = buffers_.at(x);
    if (buffer.element == Element::bf16 && buffer.finest >= element && buffer.last_use < 0)
        buffer.element = element, buffer.spans = spans;
    if (buffer.element != Element::bf16) return x;
    const int out = record({.op = Op::quantize}, x, buffer.width, element);
    buffers_[out].spans = spans;
    return out;
}

int Program::rope_and_cache(int qkv, int layer, int q_norm, int k_norm) {
    const int64_t all_heads = sizes_.heads + 2 * sizes_.kv_heads;
    require(buffers_.at(qkv).width == all_heads * sizes_.head_dim, "qkv has the wrong width");
    require(layer >= 0 && layer < sizes_.layers, "there is no such layer");
    return record({.op = Op::rope_and_cache,
                   .vector = values_of(q_norm, sizes_.head_dim),
                   .vector2 = values_of(k_norm, sizes_.head_dim),
                   .layer = layer},
                  qkv, sizes_.heads * sizes_.head_dim, Element::bf16);
}

int Program::attention(int q, int layer, int64_t window) {
    require(layer >= 0 && layer < sizes_.layers, "there is no such layer");
    const Instruction instruction{.op = Op::attention, .layer = layer, .window = window};
    const int out = record(instruction, q, buffers_.at(q).width, Element::bf16);
    if (sizes_.head_dim % kQuantGroup == 0) buffers_[out].finest = Element::i8_groups;
    return out;
}

int Program::gated(int gate_up, Activation activation) {
    Recorded& last = recorded_.back();
    require(last.instruction.op == Op::linear && last.out == gate_up && last.residual < 0,
            "gated must follow the linear that it reads");
    last.instruction.activation = activation;
    for (Weight& weight : weights_)
        if (&weight == last.instruction.weight) weight.gated = true;  // weights are packed after recording
    buffers_.back() = {buffers_.back().width / 2, Element::bf16, buffers_.back().sampled, Element::i8_groups};
    return gate_up;
}

// Let the last instruction write to memory that other ranks read.
void Program::share(Home home) {
    buffers_.back().home = home;
    recorded_.back().instruction.shared = true;
}

// Return the last instruction, which must be the linear that writes buffer x.
Program::Recorded& Program::linear_before(int x) {
    Recorded& last = recorded_.back();
    require(ranks_ && last.instruction.op == Op::linear && last.out == x && last.residual < 0 &&
                last.instruction.activation == Activation::none,
            "ranks exchange the result of the linear before, without a residual");
    return last;
}

int Program::all_reduce(int x, int bias, int residual) {
    const int64_t width = buffers_[linear_before(x).out].width;
    share(Home::each);
    const int out = record({.op = Op::all_reduce, .vector = values_of(bias, width), .divided = true}, x, width,
                           Element::f32, residual);
    share(Home::common);
    return out;
}

int Program::all_gather(int x, int64_t first_column, int64_t columns, int residual) {
    Recorded& last = linear_before(x);
    Buffer& buffer = buffers_.back();
    require(first_column >= 0 && first_column % kBlock == 0 && first_column + buffer.width <= columns,
            "a rank's columns begin at a multiple of 16");
    require(residual < 0 || (buffers_.at(residual).width == columns && buffers_[residual].home == Home::common),
            "the residual has the columns of all ranks");
    buffer.width = columns;
    last.first_column = first_column, last.residual = residual;
    if (residual >= 0) buffers_[residual].last_use = int64_t(recorded_.size()) - 1;
    share(Home::common);
    return x;
}

int Program::gather_rows(int x) {
    require(ranks_ && recorded_.back().instruction.op == Op::attention && recorded_.back().out == x,
            "ranks exchange the rows of the attention before");
    share(Home::common);
    divides_rows_ = true;
    return x;
}

void Program::pool_rows(int x, int vector) {
    require(pooled_width_ == 0, "pool_rows is recorded at most once");
    pooled_width_ = buffers_.at(x).width;
    record({.op = Op::pool_rows, .vector = values_of(vector, pooled_width_), .width = pooled_width_}, x, 0,
           Element::f32);
}

int Program::sampled_rows(int x) { return record({.op = Op::sampled_rows}, x, buffers_.at(x).width, Element::f32); }

int Program::observe(int x) {
    const Buffer& buffer = buffers_.at(x);
    require(buffer.element == Element::bf16, "only a buffer of bf16 can be observed");
    squares_.emplace_back(buffer.width);
    record({.op = Op::observe, .squares = squares_.back().data(), .width = buffer.width}, x, 0, Element::f32);
    return int(squares_.size()) - 1;
}

// Assign each buffer a place in the arena that no other buffer uses at the same time; return the places. Only buffers
// of the same shape share a place, so that the columns past the width stay zero.
std::vector<Program::Buffer> Program::assign_storage() {
    std::vector<Buffer> places;
    std::vector<int> free;
    const auto take = [&](const Buffer& buffer) {
        const auto fits = [&](int place) {
            const Buffer& p = places[place];
            return p.width == buffer.width && p.element == buffer.element && p.sampled == buffer.sampled &&
                   p.home == buffer.home;
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
        const auto& [instruction, x, out, residual, _] = recorded_[i];
        const bool in_place = residual >= 0 && buffers_[residual].last_use == i;
        if (out >= 0) buffers_[out].storage = in_place ? buffers_[residual].storage : take(buffers_[out]);
        if (x >= 0 && buffers_[x].last_use == i) free.push_back(buffers_[x].storage);
    }
    return places;
}

// The arena holds the buffers, then the table of rotary embeddings of the step's positions. The memory of all ranks holds
// the buffers that they share, then the batch.
void Program::lay_out_arena() {
    const std::vector<Buffer> places = assign_storage();
    const auto stride = [](const Buffer& b) { return round_up(b.width, kPad); };
    const auto size = [&](const Buffer& b) {
        const int64_t rows = round_up(b.sampled ? sizes_.max_sampled : sizes_.max_rows, kPad);
        return round_up(rows * bytes_of_row(b.element, stride(b)), 4096);
    };
    std::vector<int64_t> offsets;
    int64_t own = 0, shared = 0;
    for (const Buffer& place : places) {
        int64_t& bytes = place.home == Home::own ? own : shared;
        offsets.push_back(bytes);
        bytes += size(place) * (place.home == Home::each ? ranks_->size() : 1);
    }
    arena_ = Memory(own + sizes_.max_rows * sizes_.head_dim * sizeof(float));
    rotary_ = reinterpret_cast<float*>(arena_.data() + own);
    std::byte* memory = ranks_ ? ranks_->map(shared + kBatchBytes) : nullptr;
    shared_bytes_ = shared;
    published_ = reinterpret_cast<int32_t*>(memory + shared);

    const auto matrix = [&](int buffer, int rank) -> Matrix {
        if (buffer < 0) return {};
        const int index = buffers_[buffer].storage;
        const Buffer& place = places[index];
        std::byte* at = (place.home == Home::own ? arena_.data() : memory) + offsets[index];
        if (place.home == Home::each) at += rank * size(place);
        return {at, stride(place), place.element, bytes_of_row(place.element, stride(place)), buffers_[buffer].spans};
    };
    const int rank = ranks_ ? ranks_->rank() : 0;
    for (const auto& [recorded, x, out, residual, first_column] : recorded_) {
        Instruction& instruction = instructions_.emplace_back(recorded);
        const bool reduces = instruction.op == Op::all_reduce;
        instruction.x = matrix(x, reduces ? 0 : rank);
        if (reduces) instruction.rank_bytes = size(places[buffers_[x].storage]);
        instruction.out = matrix(out, rank).from_column(first_column);
        instruction.residual = matrix(residual, rank).from_column(first_column);
    }
}

void Program::lay_out_weights() {
    for (Weight& w : weights_) {
        w.blocks = w.gated ? 2 * (round_up(w.rows / 2, kBlock) / kBlock) : round_up(w.rows, kBlock) / kBlock;
        const int64_t row_scales = w.encoding.per_row() ? w.spans.count * w.encoding.line_bytes() : 0;
        w.block_bytes = round_up(w.groups * (w.encoding.value_bytes() + w.encoding.scale_bytes()) + row_scales, 64);
        weight_bytes_ += w.blocks * w.block_bytes;
    }
    weight_memory_ = Memory(weight_bytes_);
    std::byte* at = weight_memory_.data();
    for (Weight& w : weights_) {
        w.data = at;
        at += w.blocks * w.block_bytes;
    }
}

void Program::make_scratch() {
    // Rows of a tile of attention, and 16 more, since AMX reads and writes 16 rows at a time.
    const int64_t pairs = std::max(kAttentionRows, sizes_.heads / sizes_.kv_heads) + 16;
    const int64_t sums = pairs * shape_.sums_stride();
    const int64_t spans = kGroup * kMostSpanBlocks * kBlock;
    const int64_t floats[] = {kGroup * kMaxPanel * kBlock, pairs * kSpan, sums, sums, spans, spans, spans, spans};
    const int64_t halves[] = {pairs * sizes_.head_dim, pairs * kSpan, shape_.int8_kv ? shape_.block_elements() : 0};
    int64_t groups = 0;
    for (const Weight& w : weights_) groups = std::max(groups, w.groups);
    const int64_t widened = groups * kW8.value_bytes(), row = groups * kQuantGroup;
    int64_t bytes = round_up(widened, 64) + round_up(row * int64_t(sizeof(float)), 64);
    for (int64_t size : floats) bytes += round_up(size * int64_t(sizeof(float)), 64);
    for (int64_t size : halves) bytes += round_up(size * int64_t(sizeof(bf16)), 64);
    for (int i = 0; i < pool_.size(); i++) {
        std::byte* at = scratch_memory_.emplace_back(bytes).data();
        const auto take = [&]<class T>(T*& part, int64_t size) {
            part = reinterpret_cast<T*>(at);
            at += round_up(size * int64_t(sizeof(T)), 64);
        };
        Scratch& scratch = scratch_.emplace_back();
        take(scratch.sums, floats[0]);
        for (float** buffer : {&scratch.even, &scratch.odd, &scratch.waiting[0], &scratch.waiting[1]})
            take(*buffer, spans);
        take(scratch.scores, floats[1]);
        take(scratch.part_sums, floats[2]);
        take(scratch.sums_so_far, floats[3]);
        take(scratch.queries, halves[0]);
        take(scratch.shares, halves[1]);
        take(scratch.kv, halves[2]);
        take(scratch.row, row);
        take(scratch.widened, widened);
        sampler_scratch_.emplace_back(int32_t(logits_width_));
    }
}

void Program::finish(int logits) {
    require(instructions_.empty(), "a program is finished once");
    const Buffer& result = buffers_.at(logits);
    require(result.sampled && result.element == Element::f32, "logits are float, of the sampled rows");
    logits_width_ = result.width;
    followed_ = result.home == Home::common;
    record({.op = Op::sample}, logits, 0, Element::f32);
    lay_out_arena();
    lay_out_weights();
    make_scratch();
    plans_.resize(instructions_.size());
    for (int i = int(plans_.size()) - 1, next = -1; i >= 0; i--) {
        plans_[i].next_linear = next;
        if (instructions_[i].op == Op::linear) next = i;
    }
    counters_ = std::vector<Counter>(instructions_.size() * pool_.size());
}

}  // namespace octavo
