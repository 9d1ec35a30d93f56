// Runs PTX, the code that nvcc makes for every GPU, on the CPU: what csrc/cuda becomes after nvcc's own half of
// cuda/simt.cuh, which tests/simt replaces, and after its optimiser.
//
// A warp's lanes run together while they stand at one instruction; those that lag behind go first. Results are those of
// the PTX ISA; NaNs of fp32 arithmetic are 0x7fffffff as on cards, copies happen when they are waited for, shared
// memory starts with arbitrary bits and has them again when its block is done. What it cannot show: races within a
// warp, fences, blocks side by side (they run one after the other, in a drawn order), bounds of global memory. The
// harness shows most of these; ptxas, the memory model and time need a card.
#pragma once
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

namespace pse {
namespace ptx {

[[noreturn]] void fail(const std::string& what);  // throws std::runtime_error

struct Block;
struct Warp;
struct Instruction;
using Run = void (*)(Warp& warp, const Instruction& instruction, uint32_t lanes);

enum class Control : uint8_t { none, branch, exit, warp, block, cluster };  // the last three: who meets there

// Every operand is a register: constants, special registers and addresses of symbols have registers of their own.
struct Instruction {
    Run run = nullptr;
    Control control = Control::none;
    int guard = -1;  // the register of @%p
    bool guard_negated = false;
    int target = -1;               // of a branch
    std::vector<int> operands;     // as written, those of vectors one after the other
    std::vector<int64_t> offsets;  // of each, where it is an address
    int members = -1;              // operand that holds the lanes of a collective; -1: all
    std::string text;
};

enum class Source : uint8_t { constant, shared, dynamic_shared, parameter, thread, threads, block, blocks, rank, size };
struct Preset {  // a register that is set before the first instruction
    int at;
    Source source;
    uint64_t value;  // of a constant; the offset of a symbol
};

struct Parameter {
    int64_t offset, size;
};
struct Kernel {
    std::string name;
    int most_threads = 1024;
    int64_t shared_bytes = 0;
    int64_t parameter_bytes = 0;
    std::vector<Parameter> parameters;
    std::vector<Instruction> code;
    std::vector<Preset> presets;
    int registers = 0;
};

// The kernels of one PTX file, by name.
std::map<std::string, Kernel> parse(const std::string& text);

// What an opcode does; sets run, control and members. Throws where it is not known.
void decode(const std::string& opcode, Instruction& instruction);

struct Launch {
    const Kernel* kernel;
    int64_t clusters;
    int size;  // blocks of a cluster
    int threads;
    int64_t dynamic_shared;
    const void* parameters;
    uint64_t seed;     // draws the order of blocks and warps
    bool overlapping;  // earlier launches may still run: global memory is touched after griddepcontrol.wait
};
void run(const Launch& launch);

}  // namespace ptx
}  // namespace pse
