// The harness's own tests: kernels that are broken on purpose.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

namespace pse {
namespace simt {

std::vector<std::string> planted_names();
std::vector<int32_t> planted(const std::string& name);  // throws what the harness found; the data, then the ticket

}  // namespace simt
}  // namespace pse
