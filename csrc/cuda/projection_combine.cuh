// 4 of projection.cu: the combination of the gradients, rounded once.
#pragma once
#include "cuda/projection_view.cuh"

namespace pse {
namespace cuda {

constexpr int kCombineThreads = 256;

// Columns [first + thread() * kWidth, end) in strides of the block, kWidth neighbours a thread.
template <class T, int kWidth>
PSE_DEVICE void combine_columns(const Piece& piece, Shared<int64_t> addresses, Shared<double> coefficients, int active,
                                double start, Global<T> out, int first, int end) {
    constexpr int kRows = 4;  // rows in flight
    for (int column = first + thread() * kWidth; column < end; column += kCombineThreads * kWidth) {
        double sum[kWidth];
        PSE_UNROLL
        for (int v = 0; v < kWidth; ++v) sum[v] = start;
        for (int j = 0; j < active; j += kRows) {
            Vector<T, kWidth> raw[kRows] = {};
            PSE_UNROLL
            for (int u = 0; u < kRows; ++u)
                if (j + u < active)
                    raw[u] = load_vector<kWidth>(streamed<const T>(load(addresses, j + u), piece.count), column);
            PSE_UNROLL
            for (int u = 0; u < kRows; ++u) {
                if (j + u >= active) continue;
                const double coefficient = load(coefficients, j + u);
                PSE_UNROLL
                for (int v = 0; v < kWidth; ++v) sum[v] = add_rn(sum[v], mul_rn(coefficient, widened(raw[u].at[v])));
            }
        }
        Vector<T, kWidth> rounded = {};
        PSE_UNROLL
        for (int v = 0; v < kWidth; ++v) round_to(sum[v], rounded.at[v]);
        store_vector<kWidth>(out, column, rounded);
    }
}

template <class T>
PSE_DEVICE void combine_piece(const Piece& piece, Shared<int64_t> addresses, Shared<double> coefficients, int active,
                              double start, int64_t to) {
    constexpr int kWidth = 16 / int(sizeof(T));
    int64_t crooked = to;
    for (int j = 0; j < active; ++j) crooked |= load(addresses, j);
    const int whole = crooked % 16 == 0 ? piece.count / kWidth * kWidth : 0;
    const Global<T> out = streamed<T>(to, piece.count);
    combine_columns<T, kWidth>(piece, addresses, coefficients, active, start, out, 0, whole);
    combine_columns<T, 1>(piece, addresses, coefficients, active, start, out, whole, piece.count);
}

PSE_KERNEL(kCombineThreads, kAnyOccupancy) combine(Arrays a) {
    after_earlier_launches();
    PSE_SHARED(int64_t, addresses, kMostObjectives);
    PSE_SHARED(double, coefficients, kMostObjectives);
    const int64_t reversed = blocks() - 1 - block();
    const int64_t group = reversed / a.blocks;
    const Piece piece = piece_of(a, reversed % a.blocks);
    const bool finite = load(a.finite, group) != 0;
    const int active = finite ? load(a.active_count, group) : 0;
    for (int j = thread(); j < active; j += kCombineThreads) {
        store(addresses, j, row_address(a, piece, group, load(a.active, group * a.k + j)));
        store(coefficients, j, load(a.coefficients, group * a.k + j));
    }
    sync_block();
    // -0 + x is x: a lone -0 keeps its sign.
    const double start = !finite ? bits_double(0x7ff8000000000000ull) : active > 0 ? -0.0 : 0.0;
    const int64_t to = out_address(a, piece, group);
    switch (piece.dtype) {
        case DType::f32: return combine_piece<float>(piece, addresses, coefficients, active, start, to);
        case DType::f64: return combine_piece<double>(piece, addresses, coefficients, active, start, to);
        case DType::f16: return combine_piece<f16_t>(piece, addresses, coefficients, active, start, to);
        case DType::bf16: return combine_piece<bf16_t>(piece, addresses, coefficients, active, start, to);
    }
}

}  // namespace cuda
}  // namespace pse
