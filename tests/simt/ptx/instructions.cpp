// Each PTX instruction as C++, after the PTX ISA's own text. What kernels do not use is not here.
#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>

#include "core/dtype.h"
#include "lanes.h"

namespace pse {
namespace ptx {
namespace {

using pse::baseline::f16_to_float;
using pse::baseline::float_to_bf16;
using pse::baseline::float_to_f16;
using In = const Instruction&;

// ---- types: one set of bits may be read as several

template <class T>
bool is_type(const std::string& name) {
    if (std::is_floating_point<T>::value) return name == (sizeof(T) == 4 ? "f32" : "f64");
    const std::string bits = std::to_string(8 * sizeof(T));
    return name == (std::is_signed<T>::value ? "s" : "u") + bits || (!std::is_signed<T>::value && name == "b" + bits);
}
// For what is the same on signed and unsigned numbers.
template <class T>
bool is_width(const std::string& name) {
    return name.size() > 1 && name[0] != 'f' && name.substr(1) == std::to_string(8 * sizeof(T));
}

template <template <class> class Op, class... T>
Run of_type(const std::string& name) {
    Run run = nullptr;
    ((is_type<T>(name) ? void(run = &Op<T>::run) : void()), ...);
    return run;
}
template <template <class> class Op>
Run of_width(const std::string& name) {
    if (is_width<uint16_t>(name)) return &Op<uint16_t>::run;
    if (is_width<uint32_t>(name)) return &Op<uint32_t>::run;
    if (is_width<uint64_t>(name)) return &Op<uint64_t>::run;
    return nullptr;
}
template <template <class> class Op>
Run of_integer(const std::string& name) {
    return of_type<Op, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(name);
}
template <template <class> class Op>
Run of_float(const std::string& name) {
    return of_type<Op, float, double>(name);
}

float canonical(float x) {
    if (x == x) return x;
    const uint32_t bits = 0x7fffffffu;
    memcpy(&x, &bits, sizeof x);
    return x;
}
template <class T>
T canonical(T x) {
    return x;
}

// ---- operations of one, two and three operands

template <class F, class T>
struct Unary {
    static void run(Warp& w, In in, uint32_t lanes) {
        const int d = in.operands[0], a = in.operands[1];
        each(lanes, [&](int l) { w.set(d, l, T(canonical(T(F()(w.get<T>(a, l)))))); });
    }
};
template <class F, class T>
struct Binary {
    static void run(Warp& w, In in, uint32_t lanes) {
        const int d = in.operands[0], a = in.operands[1], b = in.operands[2];
        each(lanes, [&](int l) { w.set(d, l, T(canonical(T(F()(w.get<T>(a, l), w.get<T>(b, l)))))); });
    }
};
template <class F, class T>
struct Ternary {
    static void run(Warp& w, In in, uint32_t lanes) {
        const int d = in.operands[0], a = in.operands[1], b = in.operands[2], c = in.operands[3];
        each(lanes, [&](int l) { w.set(d, l, T(canonical(T(F()(w.get<T>(a, l), w.get<T>(b, l), w.get<T>(c, l)))))); });
    }
};
#define PTX_OP(kind, name, parameters, value) \
    struct name##F {                          \
        template <class T>                    \
        auto operator() parameters const {    \
            return value;                     \
        }                                     \
    };                                        \
    template <class T>                        \
    using name = kind<name##F, T>;

PTX_OP(Unary, Not, (T a), T(~a))
PTX_OP(Unary, Negate, (T a), T(T(0) - a))
PTX_OP(Unary, NegateFloat, (T a), -a)
PTX_OP(Unary, Absolute, (T a), std::fabs(a))
PTX_OP(Binary, Add, (T a, T b), T(a + b))
PTX_OP(Binary, Subtract, (T a, T b), T(a - b))
PTX_OP(Binary, Multiply, (T a, T b), T(uint64_t(a) * uint64_t(b)))
PTX_OP(Binary, MultiplyFloat, (T a, T b), a* b)
PTX_OP(Binary, And, (T a, T b), T(a& b))
PTX_OP(Binary, Or, (T a, T b), T(a | b))
PTX_OP(Binary, Xor, (T a, T b), T(a ^ b))
PTX_OP(Binary, Least, (T a, T b), std::min(a, b))
PTX_OP(Binary, Most, (T a, T b), std::max(a, b))
PTX_OP(Binary, DivideFloat, (T a, T b), a / b)
// Division by zero is not specified: all ones, as on cards.
PTX_OP(Binary, Divide, (T a, T b),
       b == 0                                   ? T(-1)
       : std::is_signed<T>::value && b == T(-1) ? T(0 - uint64_t(a))
                                                : T(a / b))
PTX_OP(Binary, Remainder, (T a, T b), b == 0 ? a : std::is_signed<T>::value && b == T(-1) ? T(0) : T(a % b))
PTX_OP(Ternary, MultiplyAdd, (T a, T b, T c), T(uint64_t(a) * uint64_t(b) + c))
PTX_OP(Ternary, Fused, (T a, T b, T c), std::fma(a, b, c))

// A NaN counts for nothing; -0 is less than 0.
PTX_OP(Binary, LeastFloat, (T a, T b), a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : std::min(a, b))
PTX_OP(Binary, MostFloat, (T a, T b), a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : std::max(a, b))
#undef PTX_OP

template <class T>
struct Move {  // bits, also those of a NaN
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes, [&](int l) { w.set(in.operands[0], l, w.get<T>(in.operands[1], l)); });
    }
};

// Shifts by the type's width or more give 0, or the sign.
template <class T>
struct Left {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes, [&](int l) {
            const uint32_t by = w.get<uint32_t>(in.operands[2], l);
            w.set(in.operands[0], l, by >= 8 * sizeof(T) ? T(0) : T(w.get<T>(in.operands[1], l) << by));
        });
    }
};
template <class T>
struct Right {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes, [&](int l) {
            const uint32_t by = std::min(w.get<uint32_t>(in.operands[2], l), uint32_t(8 * sizeof(T)));
            const T a = w.get<T>(in.operands[1], l);
            const T sign = std::is_signed<T>::value && a < T(0) ? T(-1) : T(0);
            w.set(in.operands[0], l, by == 8 * sizeof(T) ? sign : T(a >> by));
        });
    }
};

template <class T>
struct Whole {  // the product
    static void run(Warp& w, In in, uint32_t lanes) {
        using Signed = std::conditional_t<sizeof(T) == 2, int32_t, int64_t>;
        using D = std::conditional_t<std::is_signed<T>::value, Signed, std::make_unsigned_t<Signed>>;
        each(lanes, [&](int l) {
            w.set(in.operands[0], l, D(D(w.get<T>(in.operands[1], l)) * D(w.get<T>(in.operands[2], l))));
        });
    }
};
void multiply_high(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const unsigned __int128 a = w.get<uint64_t>(in.operands[1], l);
        w.set(in.operands[0], l, uint64_t((a * w.get<uint64_t>(in.operands[2], l)) >> 64));
    });
}

template <class T>
struct CountBits {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes,
             [&](int l) { w.set(in.operands[0], l, uint32_t(__builtin_popcountll(w.get<T>(in.operands[1], l)))); });
    }
};
template <class T>
struct LeadingZeros {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes, [&](int l) {
            const uint64_t a = w.get<T>(in.operands[1], l);
            const int width = int(8 * sizeof(T));
            w.set(in.operands[0], l, uint32_t(a == 0 ? width : __builtin_clzll(a) - (64 - width)));
        });
    }
};
template <class T>
struct InsertBits {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes, [&](int l) {
            const T a = w.get<T>(in.operands[1], l), b = w.get<T>(in.operands[2], l);
            const uint32_t width = 8 * sizeof(T), first = w.get<uint32_t>(in.operands[3], l) & 0xff;
            const uint32_t end = std::min(first + (w.get<uint32_t>(in.operands[4], l) & 0xff), width);
            T mask = 0;
            for (uint32_t i = first; i < end; ++i) mask = T(mask | T(1) << i);
            w.set(in.operands[0], l, first >= width ? b : T((b & T(~mask)) | (T(a << first) & mask)));
        });
    }
};

// ---- predicates are 0 and 1

template <class F>
void predicates(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        w.set(in.operands[0], l, uint64_t(F()(w.is_true(in.operands[1], l), w.is_true(in.operands[2], l))));
    });
}
void move_predicate(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) { w.set(in.operands[0], l, uint64_t(w.is_true(in.operands[1], l))); });
}
void not_predicate(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) { w.set(in.operands[0], l, uint64_t(!w.is_true(in.operands[1], l))); });
}

// `eq` and the like are false where a number is a NaN, `equ` and the like are true.
template <class F, bool kUnordered>
struct Compare {
    template <class T>
    struct Of {
        static void run(Warp& w, In in, uint32_t lanes) {
            each(lanes, [&](int l) {
                const T a = w.get<T>(in.operands[1], l), b = w.get<T>(in.operands[2], l);
                w.set(in.operands[0], l, uint64_t(a != a || b != b ? kUnordered : F()(a, b)));
            });
        }
    };
    static Run any(const std::string& type) {
        const Run run = of_integer<Of>(type);
        return run != nullptr ? run : of_float<Of>(type);
    }
    static Run floats(const std::string& type) { return of_float<Of>(type); }
};
struct Never {
    template <class T>
    bool operator()(T, T) const {
        return false;
    }
};
struct Always {
    template <class T>
    bool operator()(T, T) const {
        return true;
    }
};
Run comparison(const std::string& name, const std::string& type) {
    if (name == "eq") return Compare<std::equal_to<>, false>::any(type);
    if (name == "ne") return Compare<std::not_equal_to<>, false>::any(type);
    if (name == "lt") return Compare<std::less<>, false>::any(type);
    if (name == "le") return Compare<std::less_equal<>, false>::any(type);
    if (name == "gt") return Compare<std::greater<>, false>::any(type);
    if (name == "ge") return Compare<std::greater_equal<>, false>::any(type);
    if (name == "equ") return Compare<std::equal_to<>, true>::floats(type);
    if (name == "neu") return Compare<std::not_equal_to<>, true>::floats(type);
    if (name == "ltu") return Compare<std::less<>, true>::floats(type);
    if (name == "leu") return Compare<std::less_equal<>, true>::floats(type);
    if (name == "gtu") return Compare<std::greater<>, true>::floats(type);
    if (name == "geu") return Compare<std::greater_equal<>, true>::floats(type);
    if (name == "nan") return Compare<Never, true>::floats(type);
    if (name == "num") return Compare<Always, false>::floats(type);
    return nullptr;
}
template <class T>
struct Select {
    static void run(Warp& w, In in, uint32_t lanes) {
        each(lanes,
             [&](int l) { w.set(in.operands[0], l, w.get<T>(in.operands[w.is_true(in.operands[3], l) ? 1 : 2], l)); });
    }
};

// ---- conversions

template <class D, class S>
D converted(S x) {
    if constexpr (std::is_floating_point<S>::value && std::is_integral<D>::value) {  // toward zero, to the nearest end
        if (x != x) return sizeof(S) == 8 || sizeof(D) == 8 ? D(D(1) << (8 * sizeof(D) - 1)) : D(0);
        if (x >= std::ldexp(S(1), std::numeric_limits<D>::digits)) return std::numeric_limits<D>::max();
        if (x <= S(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
        return D(x);
    } else {
        return D(canonical(D(x)));
    }
}
template <class S>
struct From {
    template <class D>
    struct To {
        static void run(Warp& w, In in, uint32_t lanes) {
            const int d = in.operands[0], a = in.operands[1];
            each(lanes, [&](int l) { w.set(d, l, converted<D>(w.get<S>(a, l))); });
        }
    };
    static Run to(const std::string& type) {
        return of_type<To, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, float, double>(type);
    }
};
Run conversion(const std::string& to, const std::string& from) {
    if (from == "u8") return From<uint8_t>::to(to);
    if (from == "s8") return From<int8_t>::to(to);
    if (from == "u16") return From<uint16_t>::to(to);
    if (from == "s16") return From<int16_t>::to(to);
    if (from == "u32") return From<uint32_t>::to(to);
    if (from == "s32") return From<int32_t>::to(to);
    if (from == "u64") return From<uint64_t>::to(to);
    if (from == "s64") return From<int64_t>::to(to);
    if (from == "f32") return From<float>::to(to);
    if (from == "f64") return From<double>::to(to);
    return nullptr;
}
void from_half(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) { w.set(in.operands[0], l, canonical(f16_to_float(w.get<uint16_t>(in.operands[1], l)))); });
}
template <uint16_t (*kConvert)(float)>
void to_halves(Warp& w, In in, uint32_t lanes) {  // the first source is the upper half
    const auto half = [](float x) { return uint32_t(x != x ? 0x7fff : kConvert(x)); };
    each(lanes, [&](int l) {
        const uint32_t upper = half(w.get<float>(in.operands[1], l)), lower = half(w.get<float>(in.operands[2], l));
        w.set(in.operands[0], l, upper << 16 | lower);
    });
}
template <uint16_t (*kConvert)(float)>
void to_half(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const float x = w.get<float>(in.operands[1], l);
        w.set(in.operands[0], l, uint16_t(x != x ? 0x7fff : kConvert(x)));
    });
}

// mov between a register and two, the lower half first.
template <class Half, class Whole>
void pack(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const Whole upper = w.get<Half>(in.operands[2], l);
        w.set(in.operands[0], l, Whole(upper << 8 * sizeof(Half) | w.get<Half>(in.operands[1], l)));
    });
}
template <class Half, class Whole>
void unpack(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const Whole whole = w.get<Whole>(in.operands[2], l);
        w.set(in.operands[0], l, Half(whole));
        w.set(in.operands[1], l, Half(whole >> 8 * sizeof(Half)));
    });
}

// ---- memory

enum class Space { global, shared, parameter };

template <Space kSpace>
char* address(Warp& w, In in, int operand, int lane, int bytes) {
    const uint64_t at = w.get<uint64_t>(in.operands[size_t(operand)], lane) + uint64_t(in.offsets[size_t(operand)]);
    char* memory = reinterpret_cast<char*>(at);
    if (kSpace == Space::shared) {
        const uint64_t offset = uint32_t(at);  // addresses of shared memory have 32 bits
        if (offset + uint64_t(bytes) > w.block->shared.size())
            fail("shared memory at " + std::to_string(offset) + " of " + std::to_string(w.block->shared.size()) +
                 " bytes");
        memory = &w.block->shared[offset];
    } else if (at < 4096) {
        fail("global memory at " + std::to_string(at));
    } else if (kSpace == Space::global && w.block->overlapping && (w.started >> lane & 1) == 0) {
        fail("global memory before griddepcontrol.wait");
    }
    if (reinterpret_cast<uintptr_t>(memory) % uintptr_t(bytes) != 0)
        fail("an access of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it");
    return memory;
}
template <Space kSpace, int kCount>
struct Memory {
    template <class T>
    struct Load {
        using Filling = std::conditional_t<std::is_floating_point<T>::value, T,
                                           std::conditional_t<std::is_signed<T>::value, int64_t, T>>;
        static void run(Warp& w, In in, uint32_t lanes) {
            each(lanes, [&](int l) {
                T values[kCount];
                memcpy(values, address<kSpace>(w, in, kCount, l, int(sizeof values)), sizeof values);
                for (int i = 0; i < kCount; ++i) w.set(in.operands[size_t(i)], l, Filling(values[i]));
            });
        }
    };
    template <class T>
    struct Store {
        static void run(Warp& w, In in, uint32_t lanes) {
            each(lanes, [&](int l) {
                T values[kCount];
                for (int i = 0; i < kCount; ++i) values[i] = w.get<T>(in.operands[size_t(i) + 1], l);
                memcpy(address<kSpace>(w, in, 0, l, int(sizeof values)), values, sizeof values);
            });
        }
    };
    template <template <class> class Op>
    static Run of(const std::string& type) {
        return of_type<Op, uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, float, double>(
            type);
    }
    static Run access(bool stores, const std::string& type) { return stores ? of<Store>(type) : of<Load>(type); }
};
template <Space kSpace>
Run access(bool stores, int count, const std::string& type) {
    if (count == 2) return Memory<kSpace, 2>::access(stores, type);
    if (count == 4) return Memory<kSpace, 4>::access(stores, type);
    return Memory<kSpace, 1>::access(stores, type);
}

// `atom` leaves what was there before in its first operand; `red` has none.
template <class F, Space kSpace, bool kReturns>
struct Atomic {
    template <class T>
    struct Of {
        static void run(Warp& w, In in, uint32_t lanes) {
            each(lanes, [&](int l) {
                char* memory = address<kSpace>(w, in, kReturns, l, int(sizeof(T)));
                T before;
                memcpy(&before, memory, sizeof before);
                const T after = F()(before, w.get<T>(in.operands[kReturns + 1], l));
                memcpy(memory, &after, sizeof after);
                if (kReturns) w.set(in.operands[0], l, before);
            });
        }
    };
};
template <Space kSpace, bool kReturns>
Run atomic(const std::string& name, const std::string& type) {
    if (name == "add") return of_width<Atomic<AddF, kSpace, kReturns>::template Of>(type);
    if (name == "or") return of_width<Atomic<OrF, kSpace, kReturns>::template Of>(type);
    if (name == "min") return of_integer<Atomic<LeastF, kSpace, kReturns>::template Of>(type);
    if (name == "max") return of_integer<Atomic<MostF, kSpace, kReturns>::template Of>(type);
    return nullptr;
}

// Generic addresses are the host's own.
void shared_to_generic(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        w.set(in.operands[0], l, uint64_t(w.block->shared.data()) + w.get<uint32_t>(in.operands[1], l));
    });
}
void generic_to_shared(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        w.set(in.operands[0], l, w.get<uint64_t>(in.operands[1], l) - uint64_t(w.block->shared.data()));
    });
}
// nvcc takes mapa out of branches, so a rank beyond the cluster is an error only where its address is used.
void map_to_rank(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint64_t offset = w.get<uint64_t>(in.operands[1], l) - uint64_t(w.block->shared.data());
        const uint32_t rank = w.get<uint32_t>(in.operands[2], l);
        if (offset >= w.block->shared.size()) fail("mapa of what is not the block's own shared memory");
        const bool known = rank < w.block->cluster->size();
        w.set(in.operands[0], l, known ? uint64_t((*w.block->cluster)[rank].shared.data()) + offset : rank);
    });
}

// Until it is waited for, a copy's place holds arbitrary bits.
void copy_async(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        const int bytes = w.get<int32_t>(in.operands[2], l);
        if (in.operands.size() == 4 && w.get<int32_t>(in.operands[3], l) != bytes)
            fail("a copy that fills up with zeros");
        char* to = address<Space::shared>(w, in, 0, l, bytes);
        const char* from = address<Space::global>(w, in, 1, l, bytes);
        memset(to, 0xcb, size_t(bytes));
        auto& groups = w.copies[l];
        if (groups.empty()) groups.emplace_back();
        groups.back().push_back({to, from, bytes});
    });
}
void commit_copies(Warp& w, In, uint32_t lanes) {
    each(lanes, [&](int l) {
        if (w.copies[l].empty()) w.copies[l].emplace_back();
        w.copies[l].emplace_back();
    });
}
void wait_copies(Warp& w, In in, uint32_t lanes) {
    each(lanes, [&](int l) {
        auto& groups = w.copies[l];
        const size_t left = w.get<uint32_t>(in.operands[0], l) + 1;  // and the open one
        while (groups.size() > left) {
            for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, size_t(copy.bytes));
            groups.erase(groups.begin());
        }
    });
}

// ---- collectives of a warp

enum class Shuffle { idx, up, down, bfly };

template <Shuffle kMode>
void shuffle(Warp& w, In in, uint32_t lanes) {
    uint32_t before[kWarp];
    each(lanes, [&](int l) { before[l] = w.get<uint32_t>(in.operands[2], l); });
    each(lanes, [&](int l) {
        const int b = w.get<int32_t>(in.operands[3], l) & 31, c = w.get<int32_t>(in.operands[4], l);
        const int clamp = c & 31, segment = c >> 8 & 31;
        const int most = (l & segment) | (clamp & ~segment), least = l & segment;
        int from = l;
        bool inside = false;
        switch (kMode) {
            case Shuffle::up: from = l - b, inside = from >= most; break;
            case Shuffle::down: from = l + b, inside = from <= most; break;
            case Shuffle::bfly: from = l ^ b, inside = from <= most; break;
            case Shuffle::idx: from = least | (b & ~segment), inside = from <= most; break;
        }
        if (!inside) from = l;
        if ((lanes >> from & 1) == 0) fail("a shuffle from lane " + std::to_string(from) + ", which takes no part");
        w.set(in.operands[0], l, before[from]);
        w.set(in.operands[1], l, uint64_t(inside));
    });
}
Run shuffles(const std::string& mode) {
    if (mode == "idx") return &shuffle<Shuffle::idx>;
    if (mode == "up") return &shuffle<Shuffle::up>;
    if (mode == "down") return &shuffle<Shuffle::down>;
    if (mode == "bfly") return &shuffle<Shuffle::bfly>;
    return nullptr;
}
void ballot(Warp& w, In in, uint32_t lanes) {
    uint32_t votes = 0;
    each(lanes, [&](int l) { votes |= uint32_t(w.is_true(in.operands[1], l)) << l; });
    each(lanes, [&](int l) { w.set(in.operands[0], l, votes); });
}

// D = A B + C in fp64, A of kRows x 4, B of 4 x 8. With g = lane / 4 and t = lane % 4 a lane holds A[g + 8 i][t] for
// each i, B[t][g], and C[g + 8 i][2 t + j] for j = 0, 1. The order of the sum is not specified; see cuda/simt.cuh.
template <int kRows>
void multiply_tiles(Warp& w, In in, uint32_t) {
    double a[kRows][4], b[4][8], c[kRows][8];
    constexpr int kHalves = kRows / 8;
    const auto operand = [&](int i, int l) { return w.get<double>(in.operands[size_t(i)], l); };
    for (int l = 0; l < kWarp; ++l) {
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < kHalves; ++i) {
            a[g + 8 * i][t] = operand(2 * kHalves + i, l);
            for (int j = 0; j < 2; ++j) c[g + 8 * i][2 * t + j] = operand(3 * kHalves + 1 + 2 * i + j, l);
        }
        b[t][g] = operand(3 * kHalves, l);
    }
    for (int row = 0; row < kRows; ++row)
        for (int column = 0; column < 8; ++column)
            for (int n = 0; n < 4; ++n) c[row][column] = std::fma(a[row][n], b[n][column], c[row][column]);
    for (int l = 0; l < kWarp; ++l)
        for (int i = 0; i < kHalves; ++i)
            for (int j = 0; j < 2; ++j) w.set(in.operands[size_t(2 * i + j)], l, c[l / 4 + 8 * i][2 * (l % 4) + j]);
}

void nothing(Warp&, In, uint32_t) {}
void know_earlier_launches_done(Warp& w, In, uint32_t lanes) { w.started |= lanes; }
void arrive(Warp& w, In, uint32_t lanes) {
    if ((w.arrived & lanes) != 0) fail("a second arrival at a cluster barrier");
    w.arrived |= lanes;
}

std::vector<std::string> parts_of(const std::string& opcode) {
    std::vector<std::string> parts(1);
    for (const char c : opcode) {
        if (c == '.')
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

// ---- opcodes: a name, what comes between, a type. Nothing in between is passed over.

Run on_floats(const std::string& name, const std::string& type) {
    if (name == "add.rn") return of_float<Add>(type);
    if (name == "sub.rn") return of_float<Subtract>(type);
    if (name == "mul.rn") return of_float<MultiplyFloat>(type);
    if (name == "div.rn") return of_float<DivideFloat>(type);
    if (name == "fma.rn") return of_float<Fused>(type);
    if (name == "min") return of_float<LeastFloat>(type);
    if (name == "max") return of_float<MostFloat>(type);
    if (name == "neg") return of_float<NegateFloat>(type);
    if (name == "abs") return of_float<Absolute>(type);
    if (name == "mov") return of_float<Move>(type);
    if (name == "selp") return of_float<Select>(type);
    return nullptr;
}
Run on_integers(const std::string& name, const std::string& type) {
    if (name == "mov") return of_width<Move>(type);
    if (name == "not") return of_width<Not>(type);
    if (name == "and") return of_width<And>(type);
    if (name == "or") return of_width<Or>(type);
    if (name == "xor") return of_width<Xor>(type);
    if (name == "add") return of_width<Add>(type);
    if (name == "sub") return of_width<Subtract>(type);
    if (name == "mul.lo") return of_width<Multiply>(type);
    if (name == "mul.wide") return of_type<Whole, uint16_t, int16_t, uint32_t, int32_t>(type);
    if (name == "mul.hi" && type == "u64") return &multiply_high;
    if (name == "mad.lo") return of_width<MultiplyAdd>(type);
    if (name == "div") return of_integer<Divide>(type);
    if (name == "rem") return of_integer<Remainder>(type);
    if (name == "min") return of_integer<Least>(type);
    if (name == "max") return of_integer<Most>(type);
    if (name == "neg") return of_width<Negate>(type);
    if (name == "shl") return of_width<Left>(type);
    if (name == "shr") return of_integer<Right>(type);
    if (name == "popc") return of_width<CountBits>(type);
    if (name == "clz") return of_width<LeadingZeros>(type);
    if (name == "bfi") return of_width<InsertBits>(type);
    if (name == "selp") return of_width<Select>(type);
    return nullptr;
}
Run on_predicates(const std::string& name) {
    if (name == "mov") return &move_predicate;
    if (name == "not") return &not_predicate;
    if (name == "and") return &predicates<std::logical_and<>>;
    if (name == "or") return &predicates<std::logical_or<>>;
    if (name == "xor") return &predicates<std::not_equal_to<>>;
    return nullptr;
}
// Rounding is asked for where it can happen, and is to nearest, or toward zero where an integer is made.
Run converts(const std::vector<std::string>& parts) {
    const std::string &to = parts[parts.size() - 2], &from = parts.back();
    const std::string rounding = parts.size() == 4 ? parts[1] : "";
    if (parts.size() > 4) return nullptr;
    if (to == "f32" && from == "f16" && rounding.empty()) return &from_half;
    if (rounding == "rn" && from == "f32") {
        if (to == "f16x2") return &to_halves<float_to_f16>;
        if (to == "bf16x2") return &to_halves<float_to_bf16>;
        if (to == "f16") return &to_half<float_to_f16>;
        if (to == "bf16") return &to_half<float_to_bf16>;
    }
    const bool float_to = to[0] == 'f', float_from = from[0] == 'f';
    const char* wanted = "";
    if (float_from && !float_to) wanted = "rzi";
    if (float_to && (!float_from || (to == "f32" && from == "f64"))) wanted = "rn";
    return rounding == wanted && !(float_to && to == from) ? conversion(to, from) : nullptr;
}
// ld, st: a space or none, which is a generic address; one, two or four elements.
Run reads_or_writes(const std::vector<std::string>& parts) {
    const bool stores = parts[0] == "st";
    const std::string& type = parts.back();
    std::string space;
    int count = 1;
    size_t i = 1;
    if (parts[i] == "global" || parts[i] == "shared" || parts[i] == "param") space = parts[i++];
    if (parts[i] == "v2" || parts[i] == "v4") count = parts[i++] == "v2" ? 2 : 4;
    if (i + 1 != parts.size()) return nullptr;
    if (space == "shared") return access<Space::shared>(stores, count, type);
    if (space == "param") return stores ? nullptr : access<Space::parameter>(false, count, type);
    return access<Space::global>(stores, count, type);
}
Run changes(const std::vector<std::string>& parts) {  // atom, red
    if (parts.size() != 4) return nullptr;
    const bool returns = parts[0] == "atom";
    if (parts[1] == "shared")
        return returns ? atomic<Space::shared, true>(parts[2], parts[3])
                       : atomic<Space::shared, false>(parts[2], parts[3]);
    if (parts[1] == "global")
        return returns ? atomic<Space::global, true>(parts[2], parts[3])
                       : atomic<Space::global, false>(parts[2], parts[3]);
    return nullptr;
}

// How many operands there must be.
size_t operands_of(const std::vector<std::string>& parts) {
    const std::string& name = parts[0];
    const auto vector = [&] {
        for (const std::string& part : parts)
            if (part == "v2" || part == "v4") return size_t(part[1] - '0');
        return size_t(1);
    };
    if (name == "ld" || name == "st") return 1 + vector();
    if (name == "cvt") return parts[2] == "f16x2" || parts[2] == "bf16x2" ? 3 : 2;
    for (const char* unary : {"mov", "not", "neg", "abs", "popc", "clz", "red"})
        if (name == unary) return 2;
    for (const char* ternary : {"fma", "mad", "selp"})
        if (name == ternary) return 4;
    return name == "bfi" ? 5 : 3;
}

Run runs(const std::vector<std::string>& parts) {
    const std::string &name = parts[0], &type = parts.back();
    if (name == "ld" || name == "st") return reads_or_writes(parts);
    if (name == "atom" || name == "red") return changes(parts);
    if (name == "cvt") return converts(parts);
    if (name == "setp") return parts.size() == 3 ? comparison(parts[1], type) : nullptr;
    if (parts.size() > 3) return nullptr;
    const std::string whole = parts.size() == 3 ? name + "." + parts[1] : name;
    if (type == "pred") return on_predicates(whole);
    return type[0] == 'f' ? on_floats(whole, type) : on_integers(whole, type);
}

}  // namespace

void decode(const std::string& opcode, Instruction& in) {
    const std::vector<std::string> parts = parts_of(opcode);
    const std::string& name = parts[0];
    const auto is = [&](const char* begin) { return opcode.compare(0, strlen(begin), begin) == 0; };
    const int last = int(in.operands.size()) - 1;
    const size_t count = in.operands.size();
    const auto meets = [&](int members, size_t operands, Run run) {
        in.control = Control::warp, in.members = members;
        if (count == operands) in.run = run;
    };
    if (opcode == "bra" || opcode == "bra.uni") {
        in.control = Control::branch;
    } else if (opcode == "ret" || opcode == "exit") {
        in.control = Control::exit;
    } else if (opcode == "bar.sync" && count == 1 && in.text.back() == '0') {
        in.control = Control::block;
    } else if (opcode == "barrier.cluster.wait") {
        in.control = Control::cluster;
    } else if (opcode == "bar.warp.sync") {
        meets(0, 1, &nothing);
    } else if (is("shfl.sync.") && parts.size() == 4 && parts[3] == "b32") {
        meets(last, 6, shuffles(parts[2]));
    } else if (opcode == "vote.sync.ballot.b32") {
        meets(last, 3, &ballot);
    } else if (opcode == "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64") {
        meets(-1, 11, &multiply_tiles<16>);
    } else if (opcode == "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64") {
        meets(-1, 6, &multiply_tiles<8>);
    } else if (opcode == "cp.async.cg.shared.global" || opcode == "cp.async.ca.shared.global") {
        if (count == 3 || count == 4) in.run = &copy_async;
    } else if (opcode == "cp.async.commit_group") {
        in.run = &commit_copies;
    } else if (opcode == "cp.async.wait_group" && count == 1) {
        in.run = &wait_copies;
    } else if (opcode == "griddepcontrol.wait") {
        in.run = &know_earlier_launches_done;
    } else if (opcode == "barrier.cluster.arrive") {
        in.run = &arrive;
    } else if (opcode == "griddepcontrol.launch_dependents" || opcode == "membar.gl") {
        in.run = &nothing;  // launches run one after the other; memory is in order
    } else if (opcode == "mov.b32" && count == 3) {
        in.run = in.text.find('{') < in.text.find(',') ? &unpack<uint16_t, uint32_t> : &pack<uint16_t, uint32_t>;
    } else if (opcode == "mov.b64" && count == 3) {
        in.run = in.text.find('{') < in.text.find(',') ? &unpack<uint32_t, uint64_t> : &pack<uint32_t, uint64_t>;
    } else if (opcode == "cvta.shared.u64") {
        in.run = &shared_to_generic;
    } else if (opcode == "cvta.to.shared.u64") {
        in.run = &generic_to_shared;
    } else if (opcode == "cvta.global.u64" || opcode == "cvta.to.global.u64" || opcode == "cvta.param.u64") {
        in.run = &Move<uint64_t>::run;
    } else if (opcode == "mapa.u64" && count == 3) {
        in.run = &map_to_rank;
    } else if (parts.size() > 1 && (name != "cvt" || parts.size() > 2) && count == operands_of(parts)) {
        in.run = runs(parts);
    }
    if (in.run == nullptr && (in.control == Control::none || in.control == Control::warp))
        fail("the PTX instruction `" + in.text + "` is not known to tests/simt/ptx/instructions.cpp");
}

}  // namespace ptx
}  // namespace pse
