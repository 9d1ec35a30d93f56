#include <unistd.h>

#include <cerrno>

#include "bindings/bindings.h"

namespace py = pybind11;

// Elements at ascending places of an open file, a read each: no map, for a file that shrinks must be an error and not a
// signal. Returns how many were read before the file ended or a read failed.
static int64_t gather(int descriptor, int64_t place, int64_t itemsize, const int64_t* positions, int64_t n, char* out) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t done = 0;
        while (done < itemsize) {
            const int64_t got = pread(descriptor, out + i * itemsize + done, size_t(itemsize - done),
                                      off_t(place + positions[i] * itemsize + done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return i;
            done += got;
        }
    }
    return n;
}

void pse::register_files(py::module_& m) {
    m.def(
        "file_gather",
        [](int descriptor, int64_t place, int64_t itemsize, uintptr_t positions, int64_t n, uintptr_t out) {
            return without_gil([&] {
                return gather(descriptor, place, itemsize, pointer<const int64_t>(positions), n, pointer<char>(out));
            });
        },
        py::arg("descriptor"), py::arg("place"), py::arg("itemsize"), py::arg("positions"), py::arg("n"),
        py::arg("out"), "read single elements of a file; returns how many came");
}
