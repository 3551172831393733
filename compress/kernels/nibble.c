/* Product of a weight in additive codebooks of at most 16 entries (axis in) with one token, by look-up in registers.

   As lookup.c, but a table fits a register and two codes a byte: RUN tables share a scale, their entries are rounded to
   12 bits and added up in 16. Codes: [tile][pair of tables][row of the tile], the first table's in the low bits; rows
   are padded to a multiple of 64, the tables to an even number. */

#include "kernels.h"

#define RUN 16
#define TILE 256
#define ENTRIES 16
#define TABLE (2 * ENTRIES) /* bytes: the low ones of all entries, then the high ones */
#define LARGEST 2047
#define ROUNDER 12582912.0f /* 1.5 · 2^23: adding it leaves the rounded integer in the low bits */
#define NOTHING 1e-30f /* smaller tables count as zero: their reciprocal would overflow */

typedef struct {
    int path;
    long rows, out, units, stages, vector, groups; /* rows: padded */
    const uint8_t *codes;
    const float *entries, *scale, *x; /* entries: (groups, stages, vector, 16) */
    float *y;
    uint8_t *tables;
    float *factors; /* per run */
    long next;
} Nibbles;

#ifdef WITH_AVX2

/* The tables of one run; those beyond the last are zeros. NaN or infinity in any makes the factor NaN, and so every
   row. */
static WITH_AVX2 void build(const Nibbles *job, long run) {
    long tables = job->units * job->stages, per_group = job->units / job->groups;
    float dots[RUN][ENTRIES] = {{0}}, inverse = 0, factor = 0;
    union { int32_t bits; float value; } size, most = {0}; /* magnitudes are in order as their bits are */
    for (long i = 0; i < RUN && run * RUN + i < tables; i++) {
        long unit = (run * RUN + i) / job->stages, stage = (run * RUN + i) % job->stages, v = job->vector;
        const float *entry = job->entries + (unit / per_group * job->stages + stage) * v * ENTRIES;
        for (long t = 0; t < v; t++, entry += ENTRIES)
            for (int e = 0; e < ENTRIES; e++) dots[i][e] += job->x[unit * v + t] * entry[e];
        for (int e = 0; e < ENTRIES; e++) {
            size.value = dots[i][e];
            size.bits &= 0x7fffffff;
            most.bits = size.bits > most.bits ? size.bits : most.bits;
        }
    }
    if (most.bits >= 0x7f800000) factor = NAN;
    else if (most.value > NOTHING) {
        inverse = LARGEST / most.value;
        factor = most.value / LARGEST;
    }
    job->factors[run] = factor;
    for (long i = 0; i < RUN; i++)
        for (int e = 0; e < ENTRIES; e++) {
            size.value = dots[i][e] * inverse + ROUNDER;
            uint8_t *table = job->tables + (run * RUN + i) * TABLE + e;
            table[0] = (uint8_t)(size.bits & 255);
            table[ENTRIES] = (uint8_t)(size.bits >> 8 & 255);
        }
}

/* ROWS: bytes of a register V. Of so many rows, the first sum gets those whose bit 3 is clear, the second the rest. */
#define SUMS(NAME, TARGET, V, ROWS, BLOCKS, LOAD, ZERO, SAME, SHUFFLE, AND, SHIFT, LOW, HIGH, ADD, BYTE, WIDEN)        \
    static TARGET void NAME(const Nibbles *job, const uint8_t *codes, long run, long pairs, long width, float *sums) { \
        const V mask = BYTE(15);                                                                                       \
        const float factor = job->factors[run];                                                                        \
        for (long row = 0; row < width; row += BLOCKS * ROWS) {                                                        \
            long blocks = least(BLOCKS, (width - row) / ROWS);                                                         \
            V first[BLOCKS], second[BLOCKS];                                                                           \
            for (int b = 0; b < BLOCKS; b++) first[b] = second[b] = ZERO();                                            \
            for (long i = 0; i < pairs; i++) {                                                                         \
                const uint8_t *table = job->tables + (run * RUN + 2 * i) * TABLE;                                      \
                const V low0 = SAME(table), high0 = SAME(table + ENTRIES);                                             \
                const V low1 = SAME(table + TABLE), high1 = SAME(table + TABLE + ENTRIES);                             \
                for (int b = 0; b < BLOCKS; b++) {                                                                     \
                    if (b >= blocks) break;                                                                            \
                    V code = LOAD((const void *)(codes + i * width + row + b * ROWS));                                 \
                    V even = AND(code, mask), odd = AND(SHIFT(code, 4), mask);                                         \
                    V below = SHUFFLE(low0, even), above = SHUFFLE(high0, even);                                       \
                    first[b] = ADD(first[b], LOW(below, above));                                                       \
                    second[b] = ADD(second[b], HIGH(below, above));                                                    \
                    below = SHUFFLE(low1, odd), above = SHUFFLE(high1, odd);                                           \
                    first[b] = ADD(first[b], LOW(below, above));                                                       \
                    second[b] = ADD(second[b], HIGH(below, above));                                                    \
                }                                                                                                      \
            }                                                                                                          \
            for (int b = 0; b < BLOCKS; b++) {                                                                         \
                if (b >= blocks) break;                                                                                \
                WIDEN(first[b], factor, sums + row + b * ROWS);                                                        \
                WIDEN(second[b], factor, sums + row + b * ROWS + ROWS / 2);                                            \
            }                                                                                                          \
        }                                                                                                              \
    }

INLINE WITH_AVX2 void widen_avx2(__m256i sum, float factor, float *sums) {
    for (int i = 0; i < 2; i++) {
        __m128i half = i ? _mm256_extracti128_si256(sum, 1) : _mm256_castsi256_si128(sum);
        __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
        _mm256_storeu_ps(sums + 8 * i, _mm256_fmadd_ps(value, _mm256_set1_ps(factor), _mm256_loadu_ps(sums + 8 * i)));
    }
}

INLINE WITH_VBMI void widen_wide(__m512i sum, float factor, float *sums) {
    for (int i = 0; i < 2; i++) {
        __m256i half = i ? _mm512_extracti64x4_epi64(sum, 1) : _mm512_castsi512_si256(sum);
        __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half));
        _mm512_storeu_ps(sums + 16 * i, _mm512_fmadd_ps(value, _mm512_set1_ps(factor), _mm512_loadu_ps(sums + 16 * i)));
    }
}

INLINE WITH_AVX2 __m256i same_avx2(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

INLINE WITH_VBMI __m512i same_wide(const uint8_t *table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
}

SUMS(sums_avx2, WITH_AVX2, __m256i, 32, 4, _mm256_loadu_si256, _mm256_setzero_si256, same_avx2, _mm256_shuffle_epi8,
     _mm256_and_si256, _mm256_srli_epi16, _mm256_unpacklo_epi8, _mm256_unpackhi_epi8, _mm256_add_epi16,
     _mm256_set1_epi8, widen_avx2)
SUMS(sums_wide, WITH_VBMI, __m512i, 64, 4, _mm512_loadu_si512, _mm512_setzero_si512, same_wide, _mm512_shuffle_epi8,
     _mm512_and_si512, _mm512_srli_epi16, _mm512_unpacklo_epi8, _mm512_unpackhi_epi8, _mm512_add_epi16,
     _mm512_set1_epi8, widen_wide)

static void build_pieces(void *data) {
    Nibbles *job = data;
    for (long run; (run = claim(&job->next)) * RUN < job->units * job->stages;) build(job, run);
}

static void sum_pieces(void *data) {
    Nibbles *job = data;
    long pairs = (job->units * job->stages + 1) / 2;
    for (long tile; (tile = claim(&job->next)) * TILE < job->rows;) {
        long width = least(TILE, job->rows - tile * TILE), lanes = job->path == VBMI ? 64 : 32;
        const uint8_t *codes = job->codes + tile * TILE * pairs;
        float sums[TILE] = {0};
        for (long pair = 0; pair < pairs; pair += RUN / 2) {
            long count = least(RUN / 2, pairs - pair);
            if (job->path == VBMI) sums_wide(job, codes + pair * width, pair / (RUN / 2), count, width, sums);
            else sums_avx2(job, codes + pair * width, pair / (RUN / 2), count, width, sums);
        }
        for (long i = 0; i < width && tile * TILE + i < job->out; i++) {
            long in = i % lanes, at = i - in + (in >> 3 & 1) * lanes / 2 + (in >> 4) * 8 + (in & 7);
            job->y[tile * TILE + i] = job->scale[tile * TILE + i] * sums[at];
        }
    }
}
#endif

/* Bytes of working memory that codebook_nibbles wants. */
API long codebook_nibbles_memory(long units, long stages) {
    return (units * stages + RUN - 1) / RUN * (4 + RUN * TABLE);
}

/* y (out) = scale (out) · W x; x (units · v); entries (groups, stages, v, 16) float32, absent ones zero. For the paths
   AVX2 and VBMI. */
API void codebook_nibbles(int path, int threads, long out, long units, long stages, long vector, long groups,
                          const uint8_t *codes, const float *entries, const float *scale, const float *x, float *y,
                          uint8_t *memory) {
#ifdef WITH_AVX2
    long runs = (units * stages + RUN - 1) / RUN;
    Nibbles job = {path, (out + 63) & ~63L, out, units, stages, vector, groups, codes, entries, scale, x, y,
                   memory + 4 * runs, (float *)memory, 0};
    share(threads, build_pieces, &job);
    job.next = 0;
    share(threads, sum_pieces, &job);
#endif
}
