#include "cuda/topm.cu"
