#include "isa.h"

namespace louver {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif

const KernelTable* const* available_kernels(int* count) {
    static const KernelTable* found[4];
    static const int num_found = [] {
        int n = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        auto has = [](auto... flags) { return (flags && ...); };
        const bool avx512 =
            has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"),
                __builtin_cpu_supports("avx512vnni"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi"));
        // Intel's processors take as long for one product of bfloat16 pairs as for four multiply-adds, two of which do
        // the same (docs/kernels.md).
        const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16"), intel = __builtin_cpu_is("intel");
        if (pairs && !intel) found[n++] = &avx512_bf16::table;
        if (avx512) found[n++] = &avx512::table;
        if (pairs && intel) found[n++] = &avx512_bf16::table;
        if (has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi")))
            found[n++] = &avx2::table;
#endif
        found[n++] = &baseline::table;
        return n;
    }();
    *count = num_found;
    return found;
}

}  // namespace louver
