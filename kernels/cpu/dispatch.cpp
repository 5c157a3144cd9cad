// Which copies of the tile kernels this machine can run: bit 0 plain, bit 1 AVX2, bit 2 AVX-512.
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT int cosup_instruction_sets() {
  int sets = 1;
#if defined(COSUP_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets |= 2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    sets |= 4;
#endif
  return sets;
}
