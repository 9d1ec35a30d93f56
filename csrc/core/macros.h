// What host and device code share. No torch, no allocation, no standard library beyond <stdint.h>.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define PSE_HD __host__ __device__ __forceinline__
#else
#define PSE_HD inline __attribute__((always_inline))
#endif

// Core headers are compiled once per instruction set. Each copy lives in a namespace of its own: an inline function of
// one name would otherwise become a weak symbol, and the linker could keep the AVX-512 copy for every machine.
#ifndef PSE_ISA
#define PSE_ISA baseline
#endif
