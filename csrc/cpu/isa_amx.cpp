#define VQFAST_ISA amx
#define VQFAST_LANES 16
#include "nearest_amx.h"
