#define VQFAST_ISA generic
#define VQFAST_LANES 4
#include "bodies.h"
