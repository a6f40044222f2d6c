#define VQFAST_ISA avx2
#define VQFAST_LANES 8
#include "bodies.h"
