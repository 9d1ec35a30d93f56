#include <tuple>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// Field by field as in csrc/cpu/stream.h; prosocial_ext/ops/_stream.py fills them and keeps what they point to alive.
template <class Call, class T>
void bind_address(py::class_<Call>& call, const char* name, T* Call::* field) {
    call.def_property(
        name, [field](const Call& c) { return reinterpret_cast<uintptr_t>(c.*field); },
        [field](Call& c, uintptr_t address) { c.*field = pse::pointer<T>(address); });
}

void bind_chunk(py::module_& m) {
    using pse::StreamChunk;
    py::class_<StreamChunk> call(m, "StreamChunk", "a chunk of two tensors that is looked at (csrc/cpu/stream.h)");
    call.def(py::init([] { return StreamChunk{}; }))
        .def_readwrite("base_dtype", &StreamChunk::base_dtype)
        .def_readwrite("tuned_dtype", &StreamChunk::tuned_dtype)
        .def_readwrite("importance_dtype", &StreamChunk::importance_dtype)
        .def_readwrite("by_score", &StreamChunk::by_score)
        .def_readwrite("n", &StreamChunk::n)
        .def_readwrite("wide", &StreamChunk::wide)
        .def_readwrite("wide_keys", &StreamChunk::wide_keys)
        .def_readwrite("edge_key", &StreamChunk::edge_key)
        .def_readwrite("edge_index", &StreamChunk::edge_index)
        .def_readonly("kept", &StreamChunk::kept)
        .def_readonly("bad_values", &StreamChunk::bad_values)
        .def_readonly("bad_weights", &StreamChunk::bad_weights)
        .def_readonly("bad_scores", &StreamChunk::bad_scores)
        .def_readonly("energy", &StreamChunk::energy)
        .def_readonly("effect", &StreamChunk::effect)
        .def_readonly("word_sum", &StreamChunk::word_sum);
    bind_address(call, "base", &StreamChunk::base);
    bind_address(call, "tuned", &StreamChunk::tuned);
    bind_address(call, "importance", &StreamChunk::importance);
    bind_address(call, "histogram", &StreamChunk::histogram);
    bind_address(call, "offsets", &StreamChunk::offsets);
    bind_address(call, "values", &StreamChunk::values);
    bind_address(call, "scores", &StreamChunk::scores);
}

void bind_entries(py::module_& m) {
    using pse::StreamEntries;
    using pse::StreamMeasure;
    py::class_<StreamEntries> call(m, "StreamEntries", "entries that collect kept, and a cut (csrc/cpu/stream.h)");
    call.def(py::init([] { return StreamEntries{}; }))
        .def_readwrite("first", &StreamEntries::first)
        .def_readwrite("n", &StreamEntries::n)
        .def_readwrite("wide", &StreamEntries::wide)
        .def_readwrite("wide_keys", &StreamEntries::wide_keys)
        .def_readwrite("key", &StreamEntries::key)
        .def_readwrite("index", &StreamEntries::index);
    bind_address(call, "offsets", &StreamEntries::offsets);
    bind_address(call, "values", &StreamEntries::values);
    bind_address(call, "scores", &StreamEntries::scores);
    bind_address(call, "effects", &StreamEntries::effects);
    py::class_<StreamMeasure>(m, "StreamMeasure", "of the entries that a cut holds (csrc/cpu/stream.h)")
        .def_readonly("held", &StreamMeasure::held)
        .def_readonly("first", &StreamMeasure::first)
        .def_readonly("last", &StreamMeasure::last)
        .def_readonly("gap_bytes", &StreamMeasure::gap_bytes)
        .def_readonly("energy", &StreamMeasure::energy)
        .def_readonly("effect", &StreamMeasure::effect);
}

void bind_subtraction(py::module_& m) {
    using pse::StreamSubtraction;
    py::class_<StreamSubtraction> call(m, "StreamSubtraction", "entries subtracted from a chunk (csrc/cpu/stream.h)");
    call.def(py::init([] { return StreamSubtraction{}; }))
        .def_readwrite("dtype", &StreamSubtraction::dtype)
        .def_readwrite("first", &StreamSubtraction::first)
        .def_readwrite("wide_values", &StreamSubtraction::wide_values)
        .def_readwrite("n", &StreamSubtraction::n)
        .def_readwrite("scale", &StreamSubtraction::scale)
        .def_readonly("unchanged", &StreamSubtraction::unchanged)
        .def_readonly("requested", &StreamSubtraction::requested)
        .def_readonly("effective", &StreamSubtraction::effective)
        .def_readonly("smallest", &StreamSubtraction::smallest);
    bind_address(call, "elements", &StreamSubtraction::elements);
    bind_address(call, "positions", &StreamSubtraction::positions);
    bind_address(call, "values", &StreamSubtraction::values);
    bind_address(call, "before", &StreamSubtraction::before);
}

}  // namespace

void pse::register_stream(py::module_& m) {
    bind_chunk(m);
    bind_entries(m);
    bind_subtraction(m);
    m.def(
        "stream_collect", [](StreamChunk& c) { without_gil([&] { cpu().stream->collect(c); }); }, py::arg("chunk"),
        "look at a chunk and keep what an edge holds (csrc/cpu/stream.cpp)");
    m.def(
        "stream_subtract", [](StreamSubtraction& c) { without_gil([&] { cpu().stream->subtract(c); }); },
        py::arg("edit"), "subtract entries from a chunk (csrc/cpu/stream.cpp)");
    m.def(
        "stream_measure",
        [](const StreamEntries& entries) {
            StreamMeasure found = {};
            without_gil([&] { cpu().stream->measure(entries, found); });
            return found;
        },
        py::arg("entries"), "what a cut holds of them");
    m.def(
        "stream_keep",
        [](const StreamEntries& entries, uintptr_t positions, uintptr_t values) {
            return without_gil(
                [&] { return cpu().stream->keep(entries, pointer<int64_t>(positions), pointer(values)); });
        },
        py::arg("entries"), py::arg("positions"), py::arg("values"), "copy what a cut holds; returns their number");
    m.def(
        "stream_add_digits",
        [](uintptr_t scores, int64_t n, bool wide, bool wide_keys, uint64_t prefix, int round, uintptr_t histogram) {
            without_gil([&] {
                cpu().stream->add_digits(pointer(scores), n, wide, wide_keys, prefix, round,
                                         pointer<int64_t>(histogram));
            });
        },
        py::arg("scores"), py::arg("n"), py::arg("wide"), py::arg("wide_keys"), py::arg("prefix"), py::arg("round"),
        py::arg("histogram"), "add the digits of keys to a histogram");
    m.def(
        "stream_find_ties",
        [](uintptr_t scores, int64_t n, bool wide, bool wide_keys, uint64_t key, int64_t most) {
            int64_t place = -1;
            const int64_t found = without_gil(
                [&] { return cpu().stream->find_ties(pointer(scores), n, wide, wide_keys, key, most, &place); });
            return std::pair<int64_t, int64_t>(found, place);
        },
        py::arg("scores"), py::arg("n"), py::arg("wide"), py::arg("wide_keys"), py::arg("key"), py::arg("most"),
        "(scores of this key, up to most; place of the last of these)");
    m.def(
        "stream_gap_bytes",
        [](uintptr_t positions, int64_t n, int64_t previous) {
            return without_gil([&] { return cpu().stream->gap_bytes(pointer<const int64_t>(positions), n, previous); });
        },
        py::arg("positions"), py::arg("n"), py::arg("previous"), "bytes of the gaps in LEB128");
    m.def(
        "stream_encode_gaps",
        [](uintptr_t positions, int64_t n, int64_t previous, uintptr_t out) {
            return without_gil([&] {
                return cpu().stream->encode_gaps(pointer<const int64_t>(positions), n, previous, pointer<uint8_t>(out));
            });
        },
        py::arg("positions"), py::arg("n"), py::arg("previous"), py::arg("out"), "returns the bytes written");
    m.def(
        "stream_decode_gaps",
        [](uintptr_t bytes, int64_t n, int64_t most, int64_t previous, int64_t numel, uintptr_t positions) {
            int64_t used = 0, found = 0;
            int inside = 1;
            without_gil([&] {
                found = cpu().stream->decode_gaps(pointer<const uint8_t>(bytes), n, most, previous, numel,
                                                  pointer<int64_t>(positions), &used, &inside);
            });
            return std::tuple<int64_t, int64_t, bool>(found, used, inside != 0);
        },
        py::arg("bytes"), py::arg("n"), py::arg("most"), py::arg("previous"), py::arg("numel"), py::arg("positions"),
        "(gaps decoded or -1, bytes used, all positions below numel)");
    m.def(
        "stream_set_bits",
        [](uintptr_t positions, int64_t n, int64_t first, uintptr_t bitmap) {
            without_gil(
                [&] { cpu().stream->set_bits(pointer<const int64_t>(positions), n, first, pointer<uint8_t>(bitmap)); });
        },
        py::arg("positions"), py::arg("n"), py::arg("first"), py::arg("bitmap"), "set a bit per position");
    m.def(
        "stream_count_bits",
        [](uintptr_t bitmap, int64_t bytes) {
            return without_gil([&] { return cpu().stream->count_bits(pointer<const uint8_t>(bitmap), bytes); });
        },
        py::arg("bitmap"), py::arg("bytes"), "set bits");
    m.def(
        "stream_get_bits",
        [](uintptr_t bitmap, int64_t bytes, int64_t first, uintptr_t positions) {
            without_gil([&] {
                cpu().stream->get_bits(pointer<const uint8_t>(bitmap), bytes, first, pointer<int64_t>(positions));
            });
        },
        py::arg("bitmap"), py::arg("bytes"), py::arg("first"), py::arg("positions"), "a position per set bit");
    m.def(
        "stream_word_sum",
        [](uintptr_t data, int64_t bytes) {
            return without_gil([&] { return cpu().stream->word_sum(pointer(data), bytes); });
        },
        py::arg("data"), py::arg("bytes"), "the sum of the 64-bit words modulo 2^64");
    m.def(
        "stream_sum_squares",
        [](uintptr_t values, bool wide, int64_t n) {
            return without_gil([&] { return cpu().stream->sum_squares(pointer(values), wide, n); });
        },
        py::arg("values"), py::arg("wide"), py::arg("n"), "in float64, in a fixed order");
    m.def(
        "stream_all_finite",
        [](uintptr_t data, int dtype, int64_t n) {
            return without_gil([&] { return cpu().stream->all_finite(pointer(data), dtype, n) != 0; });
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), "no NaN and no infinity");
}
