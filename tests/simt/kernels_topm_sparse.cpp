#include "cuda/topm_sparse.cu"
