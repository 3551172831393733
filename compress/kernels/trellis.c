/* Search for the symbols of trellis tiles: Viterbi's algorithm over all states of 16 bits, tail-biting.

   A state is what 16 bits of symbols spell, the newest in the low `bits`; a context is its low 16 - bits, all that the
   next symbol needs. cost[c]: of the best symbols so far that end in context c. */

#include <stdlib.h>

#include "kernels.h"

#define SYMBOLS 256
#define STATES 65536
#define NOWHERE 1e30f

typedef struct {
    int path, bits;
    long tiles, next;
    const float *table, *wanted; /* (STATES): value of a state; (tiles, SYMBOLS) */
    uint8_t *found;              /* (tiles, SYMBOLS) */
    int failed;
} Search;

/* One symbol: costs before → after; from[c]: the high `bits` of the state by which context c was best reached. */
INLINE void step_portable(int bits, const float *table, float x, const float *before, float *after, uint8_t *from) {
    long contexts = STATES >> bits, run = contexts >> bits;
    for (long c = 0; c < contexts; c++) {
        float best = INFINITY;
        int taken = 0;
        for (int b = 0; b < 1 << bits; b++) {
            float off = table[b * contexts + c] - x, cost = before[b * run + (c >> bits)] + off * off;
            if (cost < best) best = cost, taken = b;
        }
        after[c] = best, from[c] = (uint8_t)taken;
    }
}

#ifdef WITH_AVX2
/* Lanes are neighbouring contexts, each 1 << bits of which come from one context before. */
static WITH_AVX2 void step_avx2(int bits, const float *table, float x, const float *before, float *after,
                                uint8_t *from) {
    long contexts = STATES >> bits, run = contexts >> bits;
    __m256 wanted = _mm256_set1_ps(x);
    __m256i spread = _mm256_srlv_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    for (long c = 0; c < contexts; c += 8) {
        __m256 best = _mm256_set1_ps(INFINITY), taken = _mm256_setzero_ps();
        for (int b = 0; b < 1 << bits; b++) {
            __m256 cost = _mm256_permutevar8x32_ps(_mm256_loadu_ps(before + b * run + (c >> bits)), spread);
            __m256 off = _mm256_sub_ps(_mm256_loadu_ps(table + b * contexts + c), wanted);
            cost = _mm256_fmadd_ps(off, off, cost);
            __m256 less = _mm256_cmp_ps(cost, best, _CMP_LT_OQ);
            best = _mm256_min_ps(cost, best);
            taken = _mm256_blendv_ps(taken, _mm256_castsi256_ps(_mm256_set1_epi32(b)), less);
        }
        _mm256_storeu_ps(after + c, best);
        __m256i whole = _mm256_castps_si256(taken);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64((__m128i *)(from + c), _mm_packus_epi16(words, words));
    }
}

static WITH_VBMI void step_avx512(int bits, const float *table, float x, const float *before, float *after,
                                  uint8_t *from) {
    long contexts = STATES >> bits, run = contexts >> bits;
    __m512 wanted = _mm512_set1_ps(x);
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i spread = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(bits));
    for (long c = 0; c < contexts; c += 16) {
        __m512 best = _mm512_set1_ps(INFINITY);
        __m512i taken = _mm512_setzero_si512();
        for (int b = 0; b < 1 << bits; b++) {
            __m512 cost = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(before + b * run + (c >> bits)));
            __m512 off = _mm512_sub_ps(_mm512_loadu_ps(table + b * contexts + c), wanted);
            cost = _mm512_fmadd_ps(off, off, cost);
            __mmask16 less = _mm512_cmp_ps_mask(cost, best, _CMP_LT_OQ);
            best = _mm512_min_ps(cost, best);
            taken = _mm512_mask_mov_epi32(taken, less, _mm512_set1_epi32(b));
        }
        _mm512_storeu_ps(after + c, best);
        _mm_storeu_si128((__m128i *)(from + c), _mm512_cvtepi32_epi8(taken));
    }
}
#endif

INLINE void step(const Search *job, float x, const float *before, float *after, uint8_t *from) {
#ifdef WITH_AVX2
    if (job->path == VBMI) { step_avx512(job->bits, job->table, x, before, after, from); return; }
    if (job->path == AVX2) { step_avx2(job->bits, job->table, x, before, after, from); return; }
#endif
    step_portable(job->bits, job->table, x, before, after, from);
}

/* Symbols of least error, from one context to the same, or anywhere where it is -1. `costs` holds two vectors of
   contexts, each with as many floats behind it as a register has. */
static void walk(const Search *job, const float *wanted, long context, float *costs, uint8_t *from, uint8_t *found) {
    long contexts = STATES >> job->bits;
    float *before = costs, *after = costs + contexts + 16;
    for (long c = 0; c < contexts; c++) before[c] = context < 0 ? 0 : NOWHERE;
    if (context >= 0) before[context] = 0;
    for (long t = 0; t < SYMBOLS; t++) {
        step(job, wanted[t], before, after, from + t * contexts);
        float *swap = before;
        before = after, after = swap;
    }
    if (context < 0)
        for (long c = context = 0; c < contexts; c++)
            if (before[c] < before[context]) context = c;
    for (long t = SYMBOLS - 1; t >= 0; t--) {
        long state = (long)from[t * contexts + context] * contexts + context;
        found[t] = (uint8_t)(state & ((1 << job->bits) - 1));
        context = state >> job->bits;
    }
}

/* The context before the first symbol is that after the last: the best symbols of the tile turned by half give it, then
   the tile is searched from it back to it. */
static void search_tile(const Search *job, long tile, float *costs, uint8_t *from) {
    const float *wanted = job->wanted + tile * SYMBOLS;
    float turned[SYMBOLS];
    uint8_t symbols[SYMBOLS];
    long half = SYMBOLS / 2, contexts = STATES >> job->bits, context = 0;
    memcpy(turned, wanted + half, sizeof(float) * half);
    memcpy(turned + half, wanted, sizeof(float) * half);
    walk(job, turned, -1, costs, from, symbols);
    for (long t = 0; t < half; t++) context = (context << job->bits | symbols[t]) & (contexts - 1);
    walk(job, wanted, context, costs, from, job->found + tile * SYMBOLS);
}

static void search_pieces(void *data) {
    Search *job = data;
    long contexts = STATES >> job->bits;
    float *costs = calloc(2 * (contexts + 16), sizeof(float));
    uint8_t *from = malloc(SYMBOLS * contexts);
    if (costs && from)
        for (long tile; (tile = claim(&job->next)) < job->tiles;) search_tile(job, tile, costs, from);
    else __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    free(costs);
    free(from);
}

/* found: (tiles, 256) symbols. Nonzero: out of memory. */
API int trellis_search(int path, int threads, int bits, long tiles, const float *table, const float *wanted,
                       uint8_t *found) {
    Search job = {.path = path, .bits = bits, .tiles = tiles, .table = table, .wanted = wanted, .found = found};
    share(threads, search_pieces, &job);
    return job.failed;
}
