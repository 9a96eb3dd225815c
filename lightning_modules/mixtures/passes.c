/* Passes of K-means over dense samples [N, D]: each reads them once and keeps no copy.
 *
 * A sample z = (x - offset) * inverse, rounded to the type of the data, is made in the cache and gone after its turn.
 * Each pass does the samples from `first` to `last`, so that threads may share them. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((long)(VECTOR_BYTES / sizeof(float)))
#define PANEL (2 * LANES) /* centers that are compared at once */
#define ROWS 6            /* samples at once: their 2 x 6 sums, two vectors of centers and a number fill 16 registers */
#define BLOCK 64          /* samples whose moments are taken at once: they fit the first cache */
#define OUT_OF_REACH 1e38 /* squares from here on may overflow in float32 */

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t names __attribute__((vector_size(VECTOR_BYTES)));

#define ALWAYS static inline __attribute__((always_inline))

typedef struct {
    int64_t width;
    const real *x;           /* [N, D] */
    const int64_t *index;    /* which samples, in which order; all of them where null */
    const double *offset;    /* [D] */
    const double *inverse;   /* [D] */
    const double *weights;   /* [N], null where all are 1 */
} Samples;

ALWAYS int64_t row_of(const Samples *samples, int64_t n) { return samples->index ? samples->index[n] : n; }

ALWAYS double number(const Samples *samples, const real *row, int64_t d) {
    return (real)((row[d] - samples->offset[d]) * samples->inverse[d]);
}

#define PARTS 8 /* sums that are independent of one another: each addition waits for the last one to its sum */

ALWAYS double total_of(const double *parts) {
    double total = 0;
    for (long i = 0; i < PARTS; i++) total += parts[i];
    return total;
}

ALWAYS double not_negative(double number) { return number > 0 ? number : 0; } /* fmax is a call */

int64_t panel(void) { return PANEL; }

/* One or the other in each lane, without a branch, which would be guessed wrong half the time. */
#define PICK(type, lanes, mask, one, other) ((type)(((lanes)(one) & (mask)) | ((lanes)(other) & ~(mask))))

typedef struct {
    vector nearest[2], second[2];
    names label[2];
} Best;

ALWAYS void compare(Best *best, const vector *score, names name) {
    for (long half = 0; half < 2; half++, name += (int32_t)LANES) {
        names closer = score[half] < best->nearest[half];
        vector farther = PICK(vector, names, closer, best->nearest[half], score[half]);
        names second = farther < best->second[half];
        best->second[half] = PICK(vector, names, second, farther, best->second[half]);
        best->nearest[half] = PICK(vector, names, closer, score[half], best->nearest[half]);
        best->label[half] = PICK(names, names, closer, name, best->label[half]);
    }
}

typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_names __attribute__((vector_size(16)));

/* The best of all lanes: four at a time, then one. */
ALWAYS void reduce(const Best *best, float *nearest, float *second, int32_t *label) {
    quad near[PANEL / 4], far[PANEL / 4];
    quad_names name[PANEL / 4];
    memcpy(near, best->nearest, sizeof near);
    memcpy(far, best->second, sizeof far);
    memcpy(name, best->label, sizeof name);
#pragma GCC unroll 8
    for (long i = 1; i < PANEL / 4; i++) {
        quad_names closer = near[i] < near[0];
        quad loser = PICK(quad, quad_names, closer, near[0], near[i]);
        quad least = PICK(quad, quad_names, far[i] < far[0], far[i], far[0]);
        far[0] = PICK(quad, quad_names, loser < least, loser, least);
        near[0] = PICK(quad, quad_names, closer, near[i], near[0]);
        name[0] = PICK(quad_names, quad_names, closer, name[i], name[0]);
    }
    *nearest = near[0][0], *second = far[0][0], *label = name[0][0];
#pragma GCC unroll 4
    for (long i = 1; i < 4; i++) {
        float one = *nearest, other = near[0][i], loser = other < one ? one : other;
        int32_t closer = -(other < one);
        *second = far[0][i] < *second ? far[0][i] : *second;
        *second = loser < *second ? loser : *second;
        *label = (name[0][i] & closer) | (*label & ~closer);
        *nearest = other < one ? other : one;
    }
}

/* Label of each sample, and a lower bound on the distance to the second nearest center less that to the nearest: NaN
 * where float32 does not tell them apart. Returns the largest squared norm, or -1 where there is no memory.
 * `packed` are the centers, [panels][1 + D][PANEL]: squared norms, and below them -2 c. */
double nearest(const Samples *samples, int64_t first, int64_t last, const float *packed, int64_t panels, double error,
               double largest_center, int64_t *labels, real *gap) {
    int64_t width = samples->width;
    float *tile = calloc(ROWS * width + 1, sizeof *tile);
    double largest = tile ? 0 : -1;
    names first_names;
    for (int32_t lane = 0; lane < LANES; lane++) first_names[lane] = lane;
    for (int64_t begin = first; tile && begin < last; begin += ROWS) {
        int64_t rows = last - begin < ROWS ? last - begin : ROWS;
        double norm[ROWS];
        /* samples in an order that the processor does not foresee */
        for (int64_t n = begin + rows; samples->index && n < last && n < begin + 2 * rows; n++)
            for (int64_t d = 0; d < width; d += 64 / (int64_t)sizeof(real))
                __builtin_prefetch(samples->x + row_of(samples, n) * width + d);
        for (int64_t r = 0; r < rows; r++) {
            const real *row = samples->x + row_of(samples, begin + r) * width;
            double parts[PARTS] = {0};
            int64_t d = 0;
            for (; d + PARTS <= width; d += PARTS)
                for (long i = 0; i < PARTS; i++) {
                    double z = number(samples, row, d + i);
                    parts[i] += z * z;
                    tile[r * width + d + i] = (float)z;
                }
            for (; d < width; d++) {
                double z = number(samples, row, d);
                parts[0] += z * z;
                tile[r * width + d] = (float)z;
            }
            norm[r] = total_of(parts);
            largest = norm[r] > largest ? norm[r] : largest;
        }
        Best best[ROWS];
        for (long r = 0; r < ROWS; r++)
            for (long half = 0; half < 2; half++) {
                best[r].nearest[half] = best[r].second[half] = (vector){0} + INFINITY;
                best[r].label[half] = (names){0};
            }
        const float *at = packed;
        for (int64_t p = 0; p < panels; p++) {
            vector sum[ROWS][2], low, high;
            memcpy(&low, at, sizeof low);
            memcpy(&high, at + LANES, sizeof high);
            for (long r = 0; r < ROWS; r++) sum[r][0] = low, sum[r][1] = high;
            at += PANEL;
            for (int64_t d = 0; d < width; d++, at += PANEL) {
                memcpy(&low, at, sizeof low);
                memcpy(&high, at + LANES, sizeof high);
#pragma GCC unroll 6
                for (long r = 0; r < ROWS; r++) {
                    float z = tile[r * width + d];
                    sum[r][0] += z * low;
                    sum[r][1] += z * high;
                }
            }
            for (long r = 0; r < ROWS; r++) compare(&best[r], sum[r], first_names + (int32_t)(p * PANEL));
        }
        for (int64_t r = 0; r < rows; r++) {
            float least, next;
            int32_t label;
            reduce(&best[r], &least, &next, &label);
            double near = least, second = next;
            double margin = (norm[r] + largest_center) * error + (width + 8) * FLT_MIN;
            labels[begin + r] = label;
            double upper = sqrt(not_negative(near + norm[r] + margin));
            double under = sqrt(not_negative(second + norm[r] - margin));
            gap[begin + r] = norm[r] < OUT_OF_REACH && second - near > 2 * margin ? under - upper : NAN;
        }
    }
    free(tile);
    return largest;
}

/* Adds samples to the sums of their centers, and takes them from those of their old ones unless `old` is null. */
void add(const Samples *samples, int64_t first, int64_t last, const int64_t *labels, const int64_t *old, double *sums,
         double *weight, double *count) {
    int64_t width = samples->width;
    for (int64_t n = first; n < last; n++) {
        const real *row = samples->x + row_of(samples, n) * width;
        double share = samples->weights ? samples->weights[row_of(samples, n)] : 1;
        if (!(share > 0)) continue;
        double *target = sums + labels[n] * width;
        weight[labels[n]] += share, count[labels[n]] += 1;
        if (!old) {
            for (int64_t d = 0; d < width; d++) target[d] += share * number(samples, row, d);
            continue;
        }
        double *source = sums + old[n] * width;
        weight[old[n]] -= share, count[old[n]] -= 1;
        for (int64_t d = 0; d < width; d++) {
            double z = share * number(samples, row, d);
            target[d] += z, source[d] -= z;
        }
    }
}

/* Sum of the squared distances of samples to the centers of their labels. */
double inertia(const Samples *samples, int64_t first, int64_t last, const int64_t *labels, const double *centers) {
    int64_t width = samples->width;
    double total = 0;
    for (int64_t n = first; n < last; n++) {
        const real *row = samples->x + row_of(samples, n) * width;
        const double *center = centers + labels[n] * width;
        double share = samples->weights ? samples->weights[row_of(samples, n)] : 1;
        if (!(share > 0)) continue;
        double parts[PARTS] = {0};
        int64_t d = 0;
        for (; d + PARTS <= width; d += PARTS)
            for (long i = 0; i < PARTS; i++) {
                double z = number(samples, row, d + i) - center[d + i];
                parts[i] += z * z;
            }
        for (; d < width; d++) {
            double z = number(samples, row, d) - center[d];
            parts[0] += z * z;
        }
        total += share * total_of(parts);
    }
    return total;
}

/* Mean about `shift` and sum of squares about the mean; blocks add by Chan's formula. `scratch` is [2 D]. */
void moments(const real *x, int64_t width, int64_t first, int64_t last, const double *shift, double *mean,
             double *squares, double *scratch) {
    double *part = scratch, *square = scratch + width;
    memset(mean, 0, width * sizeof *mean);
    memset(squares, 0, width * sizeof *squares);
    for (int64_t begin = first; begin < last; begin += BLOCK) {
        int64_t end = begin + BLOCK < last ? begin + BLOCK : last;
        double count = end - begin, before = begin - first;
        memset(part, 0, width * sizeof *part);
        memset(square, 0, width * sizeof *square);
        for (int64_t n = begin; n < end; n++)
            for (int64_t d = 0; d < width; d++) part[d] += x[n * width + d] - shift[d];
        for (int64_t d = 0; d < width; d++) part[d] /= count;
        for (int64_t n = begin; n < end; n++)
            for (int64_t d = 0; d < width; d++) {
                double z = x[n * width + d] - shift[d] - part[d];
                square[d] += z * z;
            }
        for (int64_t d = 0; d < width; d++) {
            double step = part[d] - mean[d];
            squares[d] += square[d] + step * step * before * count / (before + count);
            mean[d] += step * count / (before + count);
        }
    }
}
