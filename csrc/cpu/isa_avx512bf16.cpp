#define VQFAST_ISA avx512bf16
#define VQFAST_LANES 16
#include "nearest_bf16.h"
