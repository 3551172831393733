/* What the kernels have in common: pieces of work that threads claim, vectors, the paths. C11 with the vector types and
   target attributes of GCC and Clang; no Python headers. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { PORTABLE, AVX2, VBMI };

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define WITH_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma")))
#endif

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef float floats4 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE long claim(long *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* pool.c. Which thread does which piece is left open: no piece's result depends on it. */
void share(int threads, void (*work)(void *), void *job);
