// Philox4x32-10 (Salmon et al., SC11), the counter-based generator behind every random choice of this package.
// Law: the four words depend on key and counter alone. Held by Random123's known-answer vectors in the tests.
#pragma once
#include "core/macros.h"

namespace pse {
namespace PSE_ISA {

struct PhiloxBlock {
    uint32_t word[4];
};

PSE_HD PhiloxBlock philox4x32(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
        const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
        const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        c0 = n0;
        c2 = n2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

PSE_HD PhiloxBlock philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    return philox4x32(uint32_t(key), uint32_t(key >> 32), uint32_t(counter_low), uint32_t(counter_low >> 32),
                      uint32_t(counter_high), uint32_t(counter_high >> 32));
}

// One uniform 64-bit word: (word1 << 32) | word0.
PSE_HD uint64_t philox_u64(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    const PhiloxBlock block = philox(key, counter_low, counter_high);
    return (uint64_t(block.word[1]) << 32) | block.word[0];
}

}  // namespace PSE_ISA
}  // namespace pse
