/* Under the kernel: real numbers and vectors of them in either precision, 2^x, memory, threads. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t integer;
#define MANTISSA 52       /* bits after the point */
#define BIAS 1023         /* of the exponent */
#define ROUNDER 0x1.8p52  /* added to a number it leaves the nearest integer in the lowest bits */
#define LEAST_EXPONENT -511
#define TERMS 14          /* the next one is under 2e-17 of the sum */
#else
typedef float real;
typedef int32_t integer;
#define MANTISSA 23
#define BIAS 127
#define ROUNDER 0x1.8p23f
#define LEAST_EXPONENT -63
#define TERMS 8           /* the next one is under 6e-9 of the sum */
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((long)(VECTOR_BYTES / sizeof(real)))

typedef real vector __attribute__((vector_size(VECTOR_BYTES)));
typedef integer bits __attribute__((vector_size(VECTOR_BYTES)));

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS vector load(const real *from) {
    vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

ALWAYS void store(real *to, vector value) { memcpy(to, &value, sizeof value); }

/* 0 where the mask holds. No comparison with a NaN holds, so a NaN stays one. */
ALWAYS vector drop(vector value, bits mask) { return (vector)((bits)value & ~mask); }

ALWAYS vector every(real value) { return (vector){0} + value; }

ALWAYS double sum_of(vector value) {
    double total = 0;
    for (long lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

#define LN2 0.693147180559945309417232121458176568
#define P2 (LN2 * LN2)
#define P4 (P2 * P2)
#define P8 (P4 * P4)

/* 2^x for x <= 0, to the last digit or two; exactly 0 from the root of the smallest normal number down, so that no
 * product of two weights is subnormal (arithmetic on such numbers is a hundred times as slow).
 * x = n + f with |f| <= 1/2: 2^n is written into the exponent's bits, 2^f is its Taylor series. */
ALWAYS vector power_of_two(vector x) {
    static const double coefficient[14] = {
        1, LN2, P2 / 2, P2 * LN2 / 6, P4 / 24, P4 * LN2 / 120, P4 * P2 / 720, P4 * P2 * LN2 / 5040, P8 / 40320,
        P8 * LN2 / 362880, P8 * P2 / 3628800, P8 * P2 * LN2 / 39916800, P8 * P4 / 479001600, P8 * P4 * LN2 / 6227020800,
    };
    bits negligible = x <= (real)LEAST_EXPONENT;
    x = drop(x, negligible);
    vector rounded = x + ROUNDER, f = x - (rounded - ROUNDER);
    vector series = every(coefficient[TERMS - 1]);
    for (int n = TERMS - 2; n >= 0; n--) series = series * f + (real)coefficient[n];
    bits scale = ((bits)rounded + BIAS) << MANTISSA;
    return drop(series * (vector)scale, negligible);
}

ALWAYS long least(long a, long b) { return a < b ? a : b; }
ALWAYS long most(long a, long b) { return a > b ? a : b; }

/* With -fsanitize=address all memory is forbidden but what was taken, and between two takings something remains. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define RED_ZONE 64
#define FORBID(memory, bytes) __asan_poison_memory_region(memory, bytes)
#define ALLOW(memory, bytes) __asan_unpoison_memory_region(memory, bytes)
#else
#define RED_ZONE 0
#define FORBID(memory, bytes) ((void)0)
#define ALLOW(memory, bytes) ((void)0)
#endif

/* Memory that is being handed out. While it is only measured, it begins at null. */
typedef struct {
    char *begin;
    size_t used;
} Memory;

static void *take(Memory *memory, size_t bytes) {
    char *taken = memory->begin ? memory->begin + memory->used : 0;
    if (taken) ALLOW(taken, bytes);
    memory->used += (bytes + 63) / 64 * 64 + RED_ZONE;
    return taken;
}

typedef struct {
    pthread_t thread;
    pthread_mutex_t *gate;
    void (*work)(void *member);
    void *member;
} Thread;

static void *wait_and_work(void *argument) {
    Thread *thread = argument;
    pthread_mutex_lock(thread->gate); /* opens when it is known how many there are */
    pthread_mutex_unlock(thread->gate);
    thread->work(thread->member);
    return 0;
}

/* Runs `work` on as many members of an array, each on a thread of its own, the first on this one; on fewer where there
 * can be no more threads. Their number is in `size` before the first of them begins. */
static void on_threads(void (*work)(void *member), char *members, size_t bytes, long count, long *size) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    Thread threads[count];
    pthread_mutex_lock(&gate);
    for (*size = 1; *size < count; ++*size) {
        Thread *next = threads + *size;
        *next = (Thread){.gate = &gate, .work = work, .member = members + *size * bytes};
        if (pthread_create(&next->thread, 0, wait_and_work, next)) break;
    }
    pthread_mutex_unlock(&gate);
    work(members);
    for (long rank = 1; rank < *size; rank++) pthread_join(threads[rank].thread, 0);
}

/* The next image that nobody has begun. */
ALWAYS long next_image(long *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
