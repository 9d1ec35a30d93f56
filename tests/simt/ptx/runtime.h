// The devices that launches run on.
#pragma once
#include <stdint.h>

namespace pse {
namespace ptx {

constexpr int kCapabilities[] = {90, 80, 75};  // of the devices 0, 1 and 2, ten times the compute capability

extern uint64_t seed;       // draws the order of blocks and warps
extern int64_t launches;    // so far
extern int current_device;  // of cudaSetDevice()

}  // namespace ptx
}  // namespace pse
