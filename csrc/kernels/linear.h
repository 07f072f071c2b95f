// Linear layers. With x [rows, k], weight [n, k], bias [n] or none, residual [rows, n] or none:
//
//   out [rows, n] = x * weight^T + bias + residual                                  float
//   out [rows, n / 2] = activation(gate) * up, [gate, up] = x * weight^T + bias     bf16 or int8; with an activation
//
// The elementwise part is applied to each tile while its sums are in the cache.
#pragma once

#include "spans.h"

namespace octavo::OCTAVO_ISA {

OCTAVO_INLINE F32 sigmoid(F32 x) { return splat(1.0f) / (splat(1.0f) + exp2(x * splat(-kLog2E))); }

// silu(x) = x sigmoid(x), or gelu_tanh.
OCTAVO_INLINE F32 activate(F32 x, Activation activation) {
    if (activation == Activation::silu) return x * sigmoid(x);
    // gelu_tanh (Hendrycks and Gimpel, 2016): 0.5 x (1 + tanh(u)) = x sigmoid(2u)
    const F32 u = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    return x * sigmoid(u + u);
}

// out = sums + bias + residual.
OCTAVO_INLINE void write_sums(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                              const float* sums) {
    for (int64_t r = 0; r < rows; r++) {
        const float* from = sums + r * kSumsStride;
        float* to = op.out.f32(row + r) + block * kBlock;
        const float* bias = op.vector ? op.vector + block * kBlock : nullptr;
        const float* residual = op.residual.data ? op.residual.f32(row + r) + block * kBlock : nullptr;
        for (int64_t i = 0; i < blocks * kBlock; i += kLanes) {
            F32 v = load(from + i);
            if (bias) v = v + load(bias + i);
            if (residual) v = v + load(residual + i);
            store(to + i, v);
        }
    }
}

// out = activation(gate + bias) * (up + bias). Gate and up are alternating blocks of the sums, which are overwritten.
// With int8, a tile has whole groups of the result, except at the end of a row.
OCTAVO_INLINE void write_gated(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                               float* sums) {
    const float* gate_bias = op.vector ? op.vector + block / 2 * kBlock : nullptr;
    const float* up_bias = gate_bias + op.weight->rows / 2;
    const int64_t first = block / 2 * kBlock, columns = blocks / 2 * kBlock;
    for (int64_t r = 0; r < rows; r++, sums += kSumsStride) {
        for (int64_t i = 0; i < columns; i += kLanes) {
            const float* pair = sums + i / kBlock * 2 * kBlock + i % kBlock;
            F32 gate = load(pair), up = load(pair + kBlock);
            if (op.vector) gate = gate + load(gate_bias + i);
            if (op.vector) up = up + load(up_bias + i);
            const F32 value = activate(gate, op.activation) * up;
            if (op.out.element == Element::i8_groups)
                store(sums + i, value);
            else
                store_bf16(op.out.b16(row + r) + first + i, value);
        }
        for (int64_t i = 0; op.out.element == Element::i8_groups && i < columns; i += kQuantGroup) {
            F32 values[kGroupVectors] = {};
            for (int j = 0; j < kGroupVectors && i + j * kLanes < columns; j++) values[j] = load(sums + i + j * kLanes);
            store_group(op.out, row + r, first + i, values);
        }
    }
}

// Compute one tile of the instruction.
void linear(const Instruction& op, const Cut& cut, int64_t rows, int64_t tile, Ahead ahead, Scratch& scratch) {
    const int64_t block = tile / cut.row_tiles * cut.panel;
    const int64_t blocks = op.weight->blocks - block < cut.panel ? op.weight->blocks - block : cut.panel;
    const int64_t begin = tile % cut.row_tiles * cut.rows;
    const int64_t end = begin + cut.rows < rows ? begin + cut.rows : rows;
    const int64_t most = op.x.element == Element::i8_groups ? kIntegerGroupRows : kGroupRows;
    const int64_t groups = (end - begin + most - 1) / most;
    for (int64_t row = begin, index = 0, group; row < end; row += group, index++) {
        group = even_step(end - row, most);
        if (op.x.element == Element::i8_groups)
            group_product(op, row, group, block, blocks, ahead.part(index, groups), scratch);
        else if (op.x.element == Element::i8_rows)
            span_product<I32>(op, row, group, block, blocks, ahead.part(index, groups), scratch);
        else
            span_product<F32>(op, row, group, block, blocks, ahead.part(index, groups), scratch);
        if (op.activation == Activation::none)
            write_sums(op, row, group, block, blocks, scratch.sums);
        else
            write_gated(op, row, group, block, blocks, scratch.sums);
    }
}

}  // namespace octavo::OCTAVO_ISA
