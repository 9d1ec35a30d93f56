#include "cuda/sampling.cu"
