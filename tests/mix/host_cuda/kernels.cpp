// csrc/cuda.cu compiled for the host; its operators take CPU tensors.

#include "../../../csrc/tensors.h"

#define CUDA CPU  // the dispatch key

#include "../../../csrc/cuda.cu"
