#define VQFAST_ISA avx512
#define VQFAST_LANES 16
#include "bodies.h"
