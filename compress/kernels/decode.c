/* Weights in codebooks of any size and either axis: product with one token by loading entries and multiplying, and the
   decoding of rows.

   Codes of the product: [8 rows][unit][stage][row of the 8], of one or two bytes, rows padded to a multiple of 8.
   Vectors are padded with zeros to `padded` entries: 4, or a multiple of 8. */

#include "kernels.h"

typedef struct {
    int path, kind, across; /* kind of codes: see code_at; across: axis out */
    long rows, units, stages, entries, vector, padded, groups;
    const uint8_t *codes;
    const float *book, *x; /* (groups, stages, entries, padded); (units · padded), or (units) for axis out */
    float *out;
    long next;
    long layout_rows;         /* look-up layout, padded so; 0: the layout of this file */
    long start, stop, width;  /* rows of codes to decode; columns of the weight */
} Decode;

enum { BYTES, PAIRS, NIBBLES }; /* one byte to a code, two bytes, half a one (the layout of nibble.c only) */

INLINE long code_at(const uint8_t *codes, long at, int kind) {
    if (kind == NIBBLES) return codes[at >> 1] >> (at & 1) * 4 & 15;
    return kind == PAIRS ? ((const uint16_t *)codes)[at] : codes[at];
}

/* Sums of 8 rows of codes, one stretch of the vector of the width of F at a time. */
#define PRODUCT(NAME, F, LANES)                                                                                       \
    INLINE void NAME(const Decode *job, long block, const int kind) {                                                 \
        long stages = job->stages, padded = job->padded, per_group = job->units / job->groups;                        \
        for (long part = 0; part < padded; part += LANES) {                                                           \
            F sum[8] = {{0}};                                                                                         \
            long at = block * 8 * job->units * stages;                                                                \
            for (long unit = 0; unit < job->units; unit++) {                                                          \
                F x = {0}, entry;                                                                                     \
                if (job->across) x += job->x[unit];                                                                   \
                else memcpy(&x, job->x + unit * padded + part, sizeof x);                                             \
                const float *book = job->book + unit / per_group * stages * job->entries * padded + part;             \
                for (long stage = 0; stage < stages; stage++, at += 8, book += job->entries * padded)                 \
                    for (int i = 0; i < 8; i++) {                                                                     \
                        memcpy(&entry, book + code_at(job->codes, at + i, kind) * padded, sizeof entry);              \
                        sum[i] += x * entry;                                                                          \
                    }                                                                                                 \
            }                                                                                                         \
            for (long i = 0; i < 8 && block * 8 + i < job->rows; i++) give(job, block * 8 + i, part, (float *)&sum[i], LANES); \
        }                                                                                                             \
    }

/* Axis out: lanes are rows of the weight, padding left out. Axis in: lanes add up. */
INLINE void give(const Decode *job, long row, long part, const float *lanes, int count) {
    for (int t = 0; t < count && job->across; t++)
        if (part + t < job->vector) job->out[row * job->vector + part + t] = lanes[t];
    if (job->across) return;
    float sum = 0;
    for (int t = 0; t < count; t++) sum += lanes[t];
    job->out[row] = part ? job->out[row] + sum : sum;
}

PRODUCT(product4, floats4, 4)
PRODUCT(product8, floats8, 8)

INLINE void product(const Decode *job, long block) {
    if (job->padded == 4 && job->kind == PAIRS) product4(job, block, PAIRS);
    else if (job->padded == 4) product4(job, block, BYTES);
    else if (job->kind == PAIRS) product8(job, block, PAIRS);
    else product8(job, block, BYTES);
}

#ifdef WITH_AVX2
static WITH_AVX2 void product_avx2(const Decode *job, long block) { product(job, block); }
#endif
static void product_portable(const Decode *job, long block) { product(job, block); }

static void product_pieces(void *data) {
    Decode *job = data;
    for (long block; (block = claim(&job->next)) * 8 < job->rows;) {
#ifdef WITH_AVX2
        if (job->path != PORTABLE) { product_avx2(job, block); continue; }
#endif
        product_portable(job, block);
    }
}

/* y (rows of codes · vector for axis out, else rows) = W x, without a scale. */
API void codebook_product(int path, int threads, int kind, int across, long rows, long units,
                          long stages, long entries, long vector, long padded, long groups, const uint8_t *codes,
                          const float *book, const float *x, float *y) {
    Decode job = {path, kind, across, rows, units, stages, entries, vector, padded, groups, codes, book, x, y,
                  0, 0, 0, rows, 0};
    share(threads, product_pieces, &job);
}

#define UNITS 8 /* decoded at a time, so that stores fill whole lines */

/* Where the codes of 8 rows, from `row` on, of one unit and stage begin; look-up layouts: see nibble.c (in halves of a
   byte, two from row to row) and lookup.c. */
INLINE long codes_of(const Decode *job, long row, long unit, long stage) {
    long table = unit * job->stages + stage, tables = job->units * job->stages;
    if (!job->layout_rows) return (row / 8 * tables + table) * 8;
    long tile = row / 256, width = least(256, job->layout_rows - tile * 256);
    long run = table / 16, n = least(16, tables - run * 16);
    if (job->kind == NIBBLES) return (tile * 256 * ((tables + 1) / 2) + table / 2 * width + row % 256) * 2 + table % 2;
    return run * 16 * job->layout_rows + n * tile * 256 + table % 16 * width + row % 256;
}

INLINE void decode_block(const Decode *job, long row, long unit, long count, const long v, const long stages) {
    long per_group = job->units / job->groups, last = least(8, job->stop - row), at[UNITS * 4];
    const long step = job->kind == NIBBLES ? 2 : 1;
    const float *books[UNITS * 4];
    for (long k = 0; k < count * stages; k++) {
        at[k] = codes_of(job, row, unit + k / stages, k % stages);
        books[k] = job->book + ((unit + k / stages) / per_group * stages + k % stages) * job->entries * job->padded;
    }
    for (long i = 0; i < last; i++) {
        float *out = job->out + (row - job->start + i) * (job->across ? job->vector : 1) * job->width;
        for (long j = 0; j < count; j++) {
            float weight[64];
            for (long k = j * stages; k < (j + 1) * stages; k++) {
                const float *entry = books[k] + code_at(job->codes, at[k] + i * step, job->kind) * job->padded;
                for (long t = 0; t < v; t++) weight[t] = k == j * stages ? entry[t] : weight[t] + entry[t];
            }
            if (!job->across) memcpy(out + (unit + j) * v, weight, (size_t)v * sizeof *weight);
            else
                for (long t = 0; t < v; t++) out[t * job->width + unit + j] = weight[t];
        }
    }
}

INLINE void decode(const Decode *job, long piece) {
    for (long row = job->start + piece * 64; row < least(job->stop, job->start + piece * 64 + 64); row += 8)
        for (long unit = 0; unit < job->units; unit += UNITS) {
            long count = least(UNITS, job->units - unit);
            if (job->vector == 8 && job->stages == 1) decode_block(job, row, unit, count, 8, 1);
            else if (job->vector == 8 && job->stages == 2) decode_block(job, row, unit, count, 8, 2);
            else decode_block(job, row, unit, count, job->vector, job->stages);
        }
}

#ifdef WITH_AVX2
static WITH_AVX2 void decode_avx2(const Decode *job, long piece) { decode(job, piece); }
#endif
static void decode_portable(const Decode *job, long piece) { decode(job, piece); }

static void decode_pieces(void *data) {
    Decode *job = data;
    for (long piece; (piece = claim(&job->next)) * 64 < job->stop - job->start;) {
#ifdef WITH_AVX2
        if (job->path != PORTABLE) { decode_avx2(job, piece); continue; }
#endif
        decode_portable(job, piece);
    }
}

/* Rows of codes start (a multiple of 8) to stop, as weights without a scale: out (rows, width), row-major.
   layout_rows: the padded rows of the look-up layout, or 0 for the layout of this file. vector: at most 64, stages: at most 4. */
API void codebook_rows(int path, int threads, int kind, int across, long layout_rows, long units,
                       long stages, long entries, long vector, long padded, long groups, const uint8_t *codes,
                       const float *book, long start, long stop, float *out) {
    Decode job = {path, kind, across, stop, units, stages, entries, vector, padded, groups, codes, book, 0, out,
                  0, layout_rows, start, stop, across ? units : units * vector};
    share(threads, decode_pieces, &job);
}

/* Of the functions and layouts here; library.py takes no other. */
API int codebook_version(void) { return 3; }

/* Whether this machine can take a path. */
API int codebook_has(int path) {
#ifdef WITH_AVX2
    if (path == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (path == VBMI)
        return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return path == PORTABLE;
}
