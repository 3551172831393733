/* Product of a weight in additive codebooks (axis in, at most 256 entries) with one token, by look-up.

   Per table, one for each unit (v input columns) and stage, the dot products of x with all codebook entries are computed
   once; a row then adds one of them per code. RUN tables share a scale; their entries are rounded to 12 bits (VBMI) or
   10 (AVX2), so that RUN of them add up in 16 bits, and each run is then widened to float. The portable path keeps float.
   Codes: [run][tile][table of the run][row of the tile], a byte each; rows are padded to a multiple of 64. */

#include "kernels.h"

#define RUN 16
#define TILE 256
#define ENTRIES 256
#define NOTHING 1e-30f      /* smaller tables count as zero: their reciprocal would overflow */
#define ROUNDER 12582912.0f /* 1.5 · 2^23: adding it leaves the rounded integer in the low bits */
#define BIAS 512            /* makes the AVX2 path's entries positive */
#define AHEAD (2 * RUN * TILE)  /* bytes of codes fetched beforehand */
#define CHUNK 64            /* runs whose tables are made before threads use them: half a MB */
#define TABLE_BYTES(path) ((path) == PORTABLE ? ENTRIES * 4L : ENTRIES * 2L)

typedef struct {
    int path, threads;
    long rows, units, stages, vector, groups; /* rows: padded */
    const uint8_t *codes;
    const float *entries, *x; /* entries: (groups, stages, vector, 256) */
    float *sums;              /* (rows), in the path's own order within 64 */
    uint8_t *tables;          /* of the chunk: TABLES(path) bytes per run */
    float *factors;           /* of the chunk: per run */
    long first, runs;         /* the chunk */
    long next, pieces;        /* claimed so far, of how many */
} Lookup;

#ifdef WITH_AVX2

/* For the AVX2 path the choice by bits 4 and 5 of a code becomes an exclusive or with what the set ones select: each folds
   its lower half into its upper one. */
#define FOLD(plane, bit)                                                                                              \
    for (int e = 0; e < 16; e++)                                                                                      \
        if (e & (bit)) plane[e] = _mm_xor_si128(plane[e], plane[e - (bit)]);

INLINE WITH_AVX2 void fold(__m128i plane[16]) {
    FOLD(plane, 1) FOLD(plane, 2)
}

/* Products with 256 entries → the high eight bits of ten; then the low two, four entries to a byte; both folded. */
static WITH_AVX2 void avx2_table(const float *dots, float inverse, uint8_t *table) {
    union { __m256i pair[8]; __m128i one[16]; } high, low;
    const __m256 factor = _mm256_set1_ps(inverse), rounder = _mm256_set1_ps(ROUNDER + BIAS);
    const __m256i three = _mm256_set1_epi16(3), ten = _mm256_set1_epi32(1023);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes packing within 128 bits */
    for (int i = 0; i < 8; i++) {
        __m256i value[4];
        for (int q = 0; q < 4; q++) {
            __m256 shifted = _mm256_fmadd_ps(_mm256_loadu_ps(dots + 32 * i + 8 * q), factor, rounder);
            value[q] = _mm256_and_si256(_mm256_castps_si256(shifted), ten);
        }
        __m256i first = _mm256_packus_epi32(value[0], value[1]), second = _mm256_packus_epi32(value[2], value[3]);
        __m256i above = _mm256_packus_epi16(_mm256_srli_epi16(first, 2), _mm256_srli_epi16(second, 2));
        __m256i below = _mm256_packus_epi16(_mm256_and_si256(first, three), _mm256_and_si256(second, three));
        high.pair[i] = _mm256_permutevar8x32_epi32(above, order);
        low.pair[i] = _mm256_permutevar8x32_epi32(below, order);
    }
    fold(high.one);
    fold(low.one);
    memcpy(table, &high, ENTRIES);
    for (int i = 0; i < 2; i++) {
        __m256i upper = _mm256_or_si256(_mm256_slli_epi16(low.pair[4 + i], 4), _mm256_slli_epi16(low.pair[6 + i], 6));
        __m256i lower = _mm256_or_si256(low.pair[i], _mm256_slli_epi16(low.pair[2 + i], 2));
        _mm256_storeu_si256((__m256i *)(table + ENTRIES + 32 * i), _mm256_or_si256(lower, upper));
    }
}
#endif

#define NAMED(name) name##_portable
#define LANES 4
#include "tables.h"
#ifdef WITH_AVX2
#define NAMED(name) name##_avx2
#define LANES 8
#include "tables.h"
#define NAMED(name) name##_vbmi
#define LANES 16
#include "tables.h"
#endif

INLINE void portable_tile(const uint8_t *codes, const float *tables, long n, long width, float *sums) {
    for (long i = 0; i < n; i += 4) {
        const float *t0 = tables + i * ENTRIES, *t1 = t0, *t2 = t0, *t3 = t0;
        const uint8_t *c0 = codes + i * width, *c1 = c0, *c2 = c0, *c3 = c0;
        if (n - i < 4) { /* the last few one by one */
            for (; i < n; i++)
                for (long row = 0; row < width; row++) sums[row] += tables[i * ENTRIES + codes[i * width + row]];
            return;
        }
        t1 += ENTRIES, t2 += 2 * ENTRIES, t3 += 3 * ENTRIES, c1 += width, c2 += 2 * width, c3 += 3 * width;
        for (long row = 0; row < width; row++)
            sums[row] += (t0[c0[row]] + t1[c1[row]]) + (t2[c2[row]] + t3[c3[row]]);
    }
}

#ifdef WITH_AVX2

INLINE WITH_AVX2 __m256i pick16(const uint8_t *table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}

/* A byte shuffle gives zero where the index has its top bit set: index[1] has it where bit 4 of the code is clear,
   index[2] where bit 5 is, index[3] where either is. */
INLINE WITH_AVX2 __m256i pick64(const uint8_t *folded, const __m256i index[4]) {
    return _mm256_xor_si256(_mm256_xor_si256(pick16(folded, index[0]), pick16(folded + 16, index[1])),
                            _mm256_xor_si256(pick16(folded + 32, index[2]), pick16(folded + 48, index[3])));
}

/* Bits 6 and 7 of the code choose where they are the top bit of their byte. */
INLINE WITH_AVX2 __m256i pick256(const uint8_t *folded, const __m256i index[4], __m256i code) {
    __m256i bit6 = _mm256_add_epi8(code, code);
    __m256i below = _mm256_blendv_epi8(pick64(folded, index), pick64(folded + 64, index), bit6);
    __m256i above = _mm256_blendv_epi8(pick64(folded + 128, index), pick64(folded + 192, index), bit6);
    return _mm256_blendv_epi8(below, above, code);
}

INLINE WITH_AVX2 void avx2_widen(__m256i sum, __m256 factor, float *sums) {
    for (int i = 0; i < 2; i++) {
        __m128i half = i ? _mm256_extracti128_si256(sum, 1) : _mm256_castsi256_si128(sum);
        __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
        _mm256_storeu_ps(sums + 8 * i, _mm256_fmadd_ps(value, factor, _mm256_loadu_ps(sums + 8 * i)));
    }
}

/* Of 32 rows, the even ones come first. High bytes are added as pairs in 16 bits, and the upper one of each pair by
   itself: what it put into the sum of the pairs is taken away at the end. */
static WITH_AVX2 void avx2_tile(const uint8_t *codes, const uint8_t *tables, long n, long width, float factor,
                                float *sums) {
    const __m256i zero = _mm256_setzero_si256(), top = _mm256_set1_epi8(-128);
    for (long row = 0; row < width; row += 32) {
        __m256i pairs = zero, upper = zero, low = zero;
        for (long i = 0; i < n; i++) {
            const uint8_t *table = tables + i * 2 * ENTRIES;
            __m256i code = _mm256_loadu_si256((const __m256i *)(codes + i * width + row)), index[4];
            __m256i clear4 = _mm256_andnot_si256(_mm256_slli_epi16(code, 3), top);
            __m256i clear5 = _mm256_andnot_si256(_mm256_slli_epi16(code, 2), top);
            index[0] = _mm256_and_si256(code, _mm256_set1_epi8(15));
            index[1] = _mm256_or_si256(index[0], clear4);
            index[2] = _mm256_or_si256(index[0], clear5);
            index[3] = _mm256_or_si256(index[1], clear5);
            __m256i high = pick256(table, index, code), two = pick64(table + ENTRIES, index);
            two = _mm256_blendv_epi8(two, _mm256_srli_epi16(two, 4), code);
            two = _mm256_blendv_epi8(two, _mm256_srli_epi16(two, 2), _mm256_add_epi8(code, code));
            low = _mm256_add_epi8(low, _mm256_and_si256(two, _mm256_set1_epi8(3)));
            pairs = _mm256_add_epi16(pairs, high);
            upper = _mm256_add_epi16(upper, _mm256_srli_epi16(high, 8));
        }
        __m256i even = _mm256_slli_epi16(_mm256_sub_epi16(pairs, _mm256_slli_epi16(upper, 8)), 2);
        __m256i odd = _mm256_slli_epi16(upper, 2), bias = _mm256_set1_epi16((short)(n * BIAS));
        even = _mm256_add_epi16(even, _mm256_and_si256(low, _mm256_set1_epi16(255)));
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(low, 8));
        avx2_widen(_mm256_sub_epi16(even, bias), _mm256_set1_ps(factor), sums + row);
        avx2_widen(_mm256_sub_epi16(odd, bias), _mm256_set1_ps(factor), sums + row + 16);
    }
}

INLINE WITH_VBMI __m512i vbmi_pick(const __m512i table[4], __m512i codes, __mmask64 upper) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

INLINE WITH_VBMI void vbmi_widen(__m512i sum, __m512 factor, float *sums) {
    for (int i = 0; i < 2; i++) {
        __m256i half = i ? _mm512_extracti64x4_epi64(sum, 1) : _mm512_castsi512_si256(sum);
        __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half));
        _mm512_storeu_ps(sums + 16 * i, _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(sums + 16 * i)));
    }
}

/* Of 64 rows, the first sum gets those whose bit 3 is clear, the second the others. */
INLINE WITH_VBMI void vbmi_blocks(const uint8_t *codes, const uint8_t *tables, long n, const int blocks, float factor,
                                  float *sums) {
    __m512i first[4], second[4], low[4], high[4];
    for (int b = 0; b < blocks; b++) first[b] = second[b] = _mm512_setzero_si512();
    for (long i = 0; i < n; i++) {
        for (int q = 0; q < 4; q++) {
            low[q] = _mm512_loadu_si512(tables + i * 2 * ENTRIES + 64 * q);
            high[q] = _mm512_loadu_si512(tables + i * 2 * ENTRIES + ENTRIES + 64 * q);
        }
        for (int b = 0; b < blocks; b++) {
            __m512i code = _mm512_loadu_si512(codes + (i * blocks + b) * 64);
            __mmask64 upper = _mm512_movepi8_mask(code);
            __m512i below = vbmi_pick(low, code, upper), above = vbmi_pick(high, code, upper);
            first[b] = _mm512_add_epi16(first[b], _mm512_unpacklo_epi8(below, above));
            second[b] = _mm512_add_epi16(second[b], _mm512_unpackhi_epi8(below, above));
        }
    }
    for (int b = 0; b < blocks; b++) {
        vbmi_widen(first[b], _mm512_set1_ps(factor), sums + 64 * b);
        vbmi_widen(second[b], _mm512_set1_ps(factor), sums + 64 * b + 32);
    }
}

static WITH_VBMI void vbmi_tile(const uint8_t *codes, const uint8_t *tables, long n, long width, float factor,
                                float *sums) {
    if (width == 256) vbmi_blocks(codes, tables, n, 4, factor, sums);
    else if (width == 192) vbmi_blocks(codes, tables, n, 3, factor, sums);
    else if (width == 128) vbmi_blocks(codes, tables, n, 2, factor, sums);
    else vbmi_blocks(codes, tables, n, 1, factor, sums);
}

static WITH_AVX2 void build_avx2(const Lookup *job, long run) { make_avx2(job, run, AVX2); }
static WITH_VBMI void build_vbmi(const Lookup *job, long run) { make_vbmi(job, run, VBMI); }
#endif
static void build_portable(const Lookup *job, long run) { make_portable(job, run, PORTABLE); }

static void build_pieces(void *data) {
    Lookup *job = data;
    for (long run; (run = job->first + claim(&job->next)) < job->first + job->runs;) {
#ifdef WITH_AVX2
        if (job->path == VBMI) { build_vbmi(job, run); continue; }
        if (job->path == AVX2) { build_avx2(job, run); continue; }
#endif
        build_portable(job, run);
    }
}

static void one_tile(const Lookup *job, long run, long tile) {
    long n = least(RUN, job->units * job->stages - run * RUN), width = least(TILE, job->rows - tile * TILE);
    const uint8_t *codes = job->codes + run * RUN * job->rows + n * tile * TILE;
    const uint8_t *tables = job->tables + (run - job->first) * RUN * TABLE_BYTES(job->path);
    float *sums = job->sums + tile * TILE, factor = job->factors[run - job->first];
    for (long i = 0; i < n * width; i += 64) __builtin_prefetch(codes + AHEAD + i); /* mostly the next tile's */
#ifdef WITH_AVX2
    if (job->path == VBMI) { vbmi_tile(codes, tables, n, width, factor, sums); return; }
    if (job->path == AVX2) { avx2_tile(codes, tables, n, width, factor, sums); return; }
#endif
    (void)factor;
    portable_tile(codes, (const float *)tables, n, width, sums);
}

static void sum_pieces(void *data) {
    Lookup *job = data;
    long tiles = (job->rows + TILE - 1) / TILE;
    for (long piece; (piece = claim(&job->next)) < job->pieces;)
        for (long run = job->first; run < job->first + job->runs; run++)
            for (long tile = tiles * piece / job->pieces; tile < tiles * (piece + 1) / job->pieces; tile++)
                one_tile(job, run, tile);
}

/* Where the sum of a row lies within its 64. */
static long place(int path, long row) {
    long half = row >> 3 & 1;
    if (path == VBMI) return half * 32 + (row >> 4) * 8 + (row & 7);
    if (path == AVX2) return (row & 32) + (row & 1) * 16 + (row >> 1 & 15);
    return row;
}

/* Bytes of working memory that codebook_lookup wants. */
API long codebook_lookup_memory(int path, long rows) {
    return ((rows + 63) & ~63L) * 4 + CHUNK * (4 + RUN * TABLE_BYTES(path));
}

/* y (rows) = scale (rows) · W x; x (units · v); entries (groups, stages, v, 256) float32, absent ones zero. */
API void codebook_lookup(int path, int threads, long rows, long units, long stages, long vector,
                         long groups, const uint8_t *codes, const float *entries, const float *scale, const float *x,
                         float *y, uint8_t *memory) {
    long padded = (rows + 63) & ~63L, all = (units * stages + RUN - 1) / RUN, tiles = (padded + TILE - 1) / TILE;
    long chunk = threads > 1 ? CHUNK : 1; /* alone, tables are used while they lie in the nearest cache */
    float *sums = (float *)memory, *factors = sums + padded;
    memset(sums, 0, padded * sizeof *sums);
    Lookup job = {path, threads, padded, units, stages, vector, groups, codes, entries, x, sums,
                  (uint8_t *)(factors + CHUNK), factors, 0, 0, 0, threads > 1 ? least(tiles, 4L * threads) : 1};
    for (job.first = 0; job.first < all; job.first += chunk) {
        job.runs = least(chunk, all - job.first);
        job.next = 0;
        share(threads, build_pieces, &job);
        job.next = 0;
        share(threads, sum_pieces, &job);
    }
    for (long row = 0; row < rows; row++) y[row] = scale[row] * sums[(row & ~63L) + place(path, row & 63)];
}
