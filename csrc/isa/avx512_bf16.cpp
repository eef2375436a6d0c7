#define LOUVER_ISA avx512_bf16
#define LOUVER_ISA_NAME "avx512_bf16"
#include "isa/table.h"
