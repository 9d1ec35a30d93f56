#include "cuda/projection.cu"
