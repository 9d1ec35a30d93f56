#include "cuda/sampling_cluster.cu"
