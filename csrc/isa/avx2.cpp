#define LOUVER_ISA avx2
#define LOUVER_ISA_NAME "avx2"
#include "isa/table.h"
