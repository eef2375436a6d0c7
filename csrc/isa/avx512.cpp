#define LOUVER_ISA avx512
#define LOUVER_ISA_NAME "avx512"
#include "isa/table.h"
