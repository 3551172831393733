/* Making the tables of lookup.c with vectors of LANES floats, the width of the registers (wider ones are cut up badly by
   compilers); included once per path, whose name NAMED appends. */

typedef float NAMED(floats) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAMED(ints) __attribute__((vector_size(4 * LANES)));
typedef uint8_t NAMED(bytes) __attribute__((vector_size(LANES)));

INLINE NAMED(floats) NAMED(load)(const float *at) { NAMED(floats) v; memcpy(&v, at, sizeof v); return v; }

INLINE NAMED(ints) NAMED(larger)(NAMED(ints) a, NAMED(ints) b) { return (a & (a > b)) | (b & ~(a > b)); }

/* Dot products of one unit with all entries of one stage. Returns the largest magnitude, as bits: above those of
   infinity where one is NaN. */
INLINE NAMED(ints) NAMED(dots)(const Lookup *job, long table, float *out) {
    long unit = table / job->stages, stage = table % job->stages, v = job->vector;
    long group = unit / (job->units / job->groups);
    const float *entries = job->entries + (group * job->stages + stage) * v * ENTRIES, *x = job->x + unit * v;
    NAMED(ints) most = {0};
    for (long e = 0; e < ENTRIES; e += 4 * LANES) {
        NAMED(floats) sum[4] = {{0}};
        for (long t = 0; t < v; t++)
            for (int i = 0; i < 4; i++) sum[i] += x[t] * NAMED(load)(entries + t * ENTRIES + e + LANES * i);
        for (int i = 0; i < 4; i++) {
            most = NAMED(larger)(most, (NAMED(ints))sum[i] & 0x7fffffff);
            memcpy(out + e + LANES * i, &sum[i], sizeof sum[i]);
        }
    }
    return most;
}

/* Entries rounded to 16 bits, as a plane of low and one of high bytes. */
INLINE void NAMED(planes)(const float *dots, float inverse, uint8_t *table) {
    for (long e = 0; e < ENTRIES; e += LANES) {
        NAMED(ints) rounded = (NAMED(ints))(NAMED(load)(dots + e) * inverse + ROUNDER);
        NAMED(bytes) low = __builtin_convertvector(rounded & 255, NAMED(bytes));
        NAMED(bytes) high = __builtin_convertvector(rounded >> 8 & 255, NAMED(bytes));
        memcpy(table + e, &low, LANES);
        memcpy(table + ENTRIES + e, &high, LANES);
    }
}

/* One run of tables. NaN or infinity anywhere in it makes its factor NaN, and so every row. */
INLINE void NAMED(make)(const Lookup *job, long run, int path) {
    long first = run * RUN, n = least(RUN, job->units * job->stages - first);
    uint8_t *out = job->tables + (run - job->first) * RUN * TABLE_BYTES(path);
    float dot[RUN * ENTRIES], largest = 0, inverse = 0, factor = 0, limit = path == VBMI ? 2047 : 511;
    NAMED(ints) most = {0};
    for (long i = 0; i < n; i++) {
        float *at = path == PORTABLE ? (float *)out + i * ENTRIES : dot + i * ENTRIES;
        most = NAMED(larger)(most, NAMED(dots)(job, first + i, at));
    }
    if (path == PORTABLE) return;
    for (int i = 0; i < LANES; i++) {
        union { int32_t bits; float value; } size = {most[i]};
        if (size.bits >= 0x7f800000) factor = NAN;
        else largest = fmaxf(size.value, largest);
    }
    if (factor == 0 && largest > NOTHING) {
        inverse = limit / largest;
        factor = largest / limit;
    }
    job->factors[run - job->first] = factor;
    for (long i = 0; i < n; i++) {
#ifdef WITH_AVX2
        if (path == AVX2) avx2_table(dot + i * ENTRIES, inverse, out + i * 2 * ENTRIES);
        else
#endif
            NAMED(planes)(dot + i * ENTRIES, inverse, out + i * 2 * ENTRIES);
    }
}

#undef NAMED
#undef LANES
