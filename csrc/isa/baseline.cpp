#define LOUVER_ISA baseline
#define LOUVER_ISA_NAME "baseline"
#include "isa/table.h"
