/* Passes of K-means over samples [N, D], dense or sparse: each reads them once and keeps no copy.
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
#define GROUP 8           /* bounds that are taken at once, of 6 samples: whole vectors of doubles */
#define HALVES 8          /* vectors of centers that a sparse sample is compared with at once */
#define BLOCK 64          /* samples whose moments are taken at once: they fit the first cache */
#define OUT_OF_REACH 1e38 /* squares from here on may overflow in float32 */

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t names __attribute__((vector_size(VECTOR_BYTES)));

#define ALWAYS static inline __attribute__((always_inline))

typedef struct {
    int64_t width;
    const real *x;           /* [N, D], or the stored numbers of sparse samples, */
    const int64_t *starts;   /* [N + 1], where those of each sample begin, null where dense, */
    const int32_t *columns;  /* and their features */
    const int64_t *index;    /* which samples, in which order; all of them where null */
    const double *offset;    /* [D], null where samples are taken as they are */
    const double *inverse;   /* [D] */
    const double *weights;   /* [N], null where all are 1 */
} Samples;

typedef struct {
    int64_t count;           /* K */
    const double *centers;   /* [K, D] */
    const double *norms;     /* [K], squared, */
    double largest;          /* and the largest of them */
    const float *packed;     /* [panels][1 + D][panel]: squared norms, and below them -2 c */
    int64_t panels;
    double error, tiny;      /* of the scores' rounding in float32, relative and absolute, */
    double error_of_double;  /* and in float64 */
} Centers;

/* What a pass came upon: the largest squared norm, and samples whose label changed. */
typedef struct {
    double largest;
    int64_t changed;
} Seen;

ALWAYS int64_t row_of(const Samples *samples, int64_t n) { return samples->index ? samples->index[n] : n; }

/* `framed` is a constant wherever it is called: a question for each number would cost more than the number. */
ALWAYS double number(const Samples *samples, const real *row, int64_t d, int framed) {
    return framed ? (real)((row[d] - samples->offset[d]) * samples->inverse[d]) : row[d];
}

#define PARTS 8 /* sums that are independent of one another: each addition waits for the last one to its sum */

ALWAYS double total_of(const double *parts) {
    double total = 0;
    for (long i = 0; i < PARTS; i++) total += parts[i];
    return total;
}

ALWAYS double not_negative(double number) { return number > 0 ? number : 0; } /* fmax is a call */

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

/* The best of each sample: of its lanes, four at a time, and of those four, for all samples at once. */
ALWAYS void reduce(const Best *best, long rows, float *nearest, float *second, int32_t *label) {
    float nears[4][GROUP] = {0}, fars[4][GROUP] = {0};
    int32_t labels[4][GROUP] = {0};
    for (long r = 0; r < rows; r++) {
        quad near[PANEL / 4], far[PANEL / 4];
        quad_names name[PANEL / 4];
        memcpy(near, best[r].nearest, sizeof near);
        memcpy(far, best[r].second, sizeof far);
        memcpy(name, best[r].label, sizeof name);
#pragma GCC unroll 8
        for (long i = 1; i < PANEL / 4; i++) {
            quad_names closer = near[i] < near[0];
            quad loser = PICK(quad, quad_names, closer, near[0], near[i]);
            quad least = PICK(quad, quad_names, far[i] < far[0], far[i], far[0]);
            far[0] = PICK(quad, quad_names, loser < least, loser, least);
            near[0] = PICK(quad, quad_names, closer, near[i], near[0]);
            name[0] = PICK(quad_names, quad_names, closer, name[i], name[0]);
        }
        for (long i = 0; i < 4; i++) nears[i][r] = near[0][i], fars[i][r] = far[0][i], labels[i][r] = name[0][i];
    }
    for (long i = 1; i < 4; i++)
        for (long r = 0; r < GROUP; r++) {
            float one = nears[0][r], other = nears[i][r], far = fars[i][r], next = fars[0][r];
            float loser = other < one ? one : other;
            next = far < next ? far : next;
            fars[0][r] = loser < next ? loser : next;
            labels[0][r] = other < one ? labels[i][r] : labels[0][r];
            nears[0][r] = other < one ? other : one;
        }
    memcpy(nearest, nears[0], sizeof nears[0]);
    memcpy(second, fars[0], sizeof fars[0]);
    memcpy(label, labels[0], sizeof labels[0]);
}

ALWAYS Best nothing_yet(void) {
    Best best;
    for (long half = 0; half < 2; half++) {
        best.nearest[half] = best.second[half] = (vector){0} + INFINITY;
        best.label[half] = (names){0};
    }
    return best;
}

/* Adds one sample to the members of its center, and takes it from those of its old one unless that is -1. Members,
 * [K, D + 2], are the sums of a center's samples, of their weights, and their number. */
ALWAYS void move_row(const Samples *samples, int64_t n, int64_t label, int64_t old, double *members,
                     int framed) {
    double share = samples->weights ? samples->weights[n] : 1;
    if (!(share > 0)) return;
    int64_t width = samples->width, first = samples->starts ? samples->starts[n] : n * width;
    int64_t stored = samples->starts ? samples->starts[n + 1] - first : width;
    const real *row = samples->x + first;
    const int32_t *columns = samples->columns + (samples->starts ? first : 0);
    double *target = members + label * (width + 2), *source = members + old * (width + 2);
    target[width] += share, target[width + 1] += 1;
    if (old >= 0) source[width] -= share, source[width + 1] -= 1;
    if (samples->starts) {
        for (int64_t i = 0; i < stored; i++) target[columns[i]] += share * row[i];
        for (int64_t i = 0; i < stored && old >= 0; i++) source[columns[i]] -= share * row[i];
    } else {
        for (int64_t d = 0; d < width; d++) target[d] += share * number(samples, row, d, framed);
        for (int64_t d = 0; d < width && old >= 0; d++) source[d] -= share * number(samples, row, d, framed);
    }
}

typedef struct {
    int64_t *labels; /* [N], of before, -1 where there was none; and of now */
    real *gap;       /* [N] */
    double *members; /* [K, D + 2], null where nobody asks for them */
} Into;

ALWAYS double dot(const Samples *samples, int64_t n, const double *center, int framed) {
    double parts[PARTS] = {0};
    if (samples->starts) {
        for (int64_t i = samples->starts[n]; i < samples->starts[n + 1]; i++)
            parts[0] += samples->x[i] * (center ? center[samples->columns[i]] : samples->x[i]);
        return parts[0];
    }
    const real *row = samples->x + n * samples->width;
    int64_t d = 0;
    for (; d + PARTS <= samples->width; d += PARTS)
        for (long i = 0; i < PARTS; i++) {
            double z = number(samples, row, d + i, framed);
            parts[i] += z * (center ? center[d + i] : z);
        }
    for (; d < samples->width; d++) {
        double z = number(samples, row, d, framed);
        parts[0] += z * (center ? center[d] : z);
    }
    return total_of(parts);
}

/* Label and bound of a sample in float64, where float32 does not tell its two nearest centers apart. */
static int64_t look_closer(const Samples *samples, int64_t n, const Centers *centers, real *gap) {
    int framed = samples->offset != NULL;
    double norm = dot(samples, n, NULL, framed), least = INFINITY, second = INFINITY;
    int64_t label = 0;
    for (int64_t k = 0; k < centers->count; k++) {
        double score = centers->norms[k] - 2 * dot(samples, n, centers->centers + k * samples->width, framed);
        if (score < least)
            second = least, least = score, label = k;
        else if (score < second)
            second = score;
    }
    double margin = (norm + centers->largest) * centers->error_of_double;
    double upper = sqrt(not_negative(least + norm + margin)), under = sqrt(not_negative(second + norm - margin));
    *gap = second - least > 2 * margin ? under - upper : -INFINITY; /* a tie is compared every time */
    return label;
}

/* Bounds of up to GROUP samples from their two least scores and their squared norms; labels that are certain are set,
 * and the samples added to the members of their centers. */
ALWAYS void settle(const Samples *samples, int64_t begin, long rows, const Best *best, const double *norm,
                   const Centers *centers, const Into *into, Seen *seen, int framed) {
    float near[GROUP], second[GROUP];
    double margin[GROUP], upper[GROUP], under[GROUP];
    int32_t label[GROUP];
    reduce(best, rows, near, second, label);
    for (long r = 0; r < GROUP; r++) margin[r] = (norm[r] + centers->largest) * centers->error + centers->tiny;
    for (long r = 0; r < GROUP; r++) upper[r] = sqrt(not_negative(near[r] + norm[r] + margin[r]));
    for (long r = 0; r < GROUP; r++) under[r] = sqrt(not_negative(second[r] + norm[r] - margin[r]));
    for (long r = 0; r < rows; r++) {
        int64_t n = row_of(samples, begin + r), old = into->labels[n];
        seen->largest = norm[r] > seen->largest ? norm[r] : seen->largest;
        into->gap[n] = under[r] - upper[r];
        if (!(norm[r] < OUT_OF_REACH && second[r] - near[r] > 2 * margin[r]))
            label[r] = (int32_t)look_closer(samples, n, centers, &into->gap[n]);
        if (label[r] == old) continue;
        into->labels[n] = label[r];
        seen->changed++;
        if (into->members) move_row(samples, n, label[r], old, into->members, framed);
    }
}

/* Puts a dense sample into the tile, in float32; its squared norm. */
ALWAYS double load(float *tile, const Samples *samples, const real *row, int framed) {
    int64_t width = samples->width, d = 0;
    real parts[PARTS] = {0};
    double norm = 0;
    for (; d + PARTS <= width; d += PARTS)
        for (long i = 0; i < PARTS; i++) {
            real z = number(samples, row, d + i, framed);
            parts[i] += z * z;
            tile[d + i] = z;
        }
    for (long i = 0; i < PARTS; i++) norm += parts[i];
    for (; d < width; d++) {
        double z = number(samples, row, d, framed);
        norm += z * z;
        tile[d] = z;
    }
    return norm;
}

ALWAYS void nearest_dense(const Samples *samples, int64_t first, int64_t last, const Centers *centers, float *tile,
                          const Into *into, Seen *seen, int framed) {
    int64_t width = samples->width;
    names first_names;
    for (int32_t lane = 0; lane < LANES; lane++) first_names[lane] = lane;
    for (int64_t begin = first; begin < last; begin += ROWS) {
        long rows = last - begin < ROWS ? last - begin : ROWS;
        double norm[GROUP] = {0};
        /* samples in an order that the processor does not foresee */
        for (int64_t n = begin + rows; samples->index && n < last && n < begin + 2 * rows; n++)
            for (int64_t d = 0; d < width; d += 64 / (int64_t)sizeof(real))
                __builtin_prefetch(samples->x + row_of(samples, n) * width + d);
        for (long r = 0; r < rows; r++)
            norm[r] = load(tile + r * width, samples, samples->x + row_of(samples, begin + r) * width, framed);
        Best best[ROWS];
        for (long r = 0; r < ROWS; r++) best[r] = nothing_yet();
        const float *at = centers->packed;
        for (int64_t p = 0; p < centers->panels; p++) {
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
        settle(samples, begin, rows, best, norm, centers, into, seen, framed);
    }
}

ALWAYS void nearest_sparse(const Samples *samples, int64_t first, int64_t last, const Centers *centers,
                           const Into *into, Seen *seen) {
    const long wide = HALVES * LANES;
    names first_names;
    for (int32_t lane = 0; lane < LANES; lane++) first_names[lane] = lane;
    for (int64_t begin = first; begin < last; begin += ROWS) {
        long rows = last - begin < ROWS ? last - begin : ROWS;
        double norm[GROUP] = {0};
        Best best[ROWS];
        for (long r = 0; r < rows; r++) {
            int64_t n = row_of(samples, begin + r);
            best[r] = nothing_yet();
            for (int64_t i = samples->starts[n]; i < samples->starts[n + 1]; i++)
                norm[r] += (double)samples->x[i] * samples->x[i];
            for (int64_t p = 0; p < centers->panels; p++) {
                const float *panel = centers->packed + p * (1 + samples->width) * wide;
                vector sum[HALVES];
                memcpy(sum, panel, sizeof sum);
                for (int64_t i = samples->starts[n]; i < samples->starts[n + 1]; i++) {
                    const float *center = panel + (1 + samples->columns[i]) * wide;
                    float z = samples->x[i];
#pragma GCC unroll 8
                    for (long half = 0; half < HALVES; half++) {
                        vector part;
                        memcpy(&part, center + half * LANES, sizeof part);
                        sum[half] += z * part;
                    }
                }
                for (long half = 0; half < HALVES; half += 2)
                    compare(&best[r], sum + half, first_names + (int32_t)(p * wide + half * LANES));
            }
        }
        settle(samples, begin, rows, best, norm, centers, into, seen, 0);
    }
}

int64_t panel(int is_sparse) { return is_sparse ? HALVES * LANES : PANEL; }

/* The nearest center of each sample, and a lower bound on the distance to the second nearest less that to the nearest.
 * Samples of another label than before are added to the members of the new one and taken from those of the old. Returns
 * 0, or -1 where there is no memory. */
int nearest(const Samples *samples, int64_t first, int64_t last, const Centers *centers, int64_t *labels, real *gap,
            double *members, Seen *seen) {
    Into into = {labels, gap, members};
    if (samples->starts) {
        nearest_sparse(samples, first, last, centers, &into, seen);
        return 0;
    }
    float *tile = calloc(ROWS * samples->width + 1, sizeof *tile);
    if (!tile) return -1;
    if (samples->offset)
        nearest_dense(samples, first, last, centers, tile, &into, seen, 1);
    else
        nearest_dense(samples, first, last, centers, tile, &into, seen, 0);
    free(tile);
    return 0;
}

/* Takes from the bound of each sample what the centers have moved, [K] by its label; which samples are to be compared
 * again, at `index + first`, and how many. */
int64_t loosen(int64_t first, int64_t last, const int64_t *labels, const double *moved, double slack, real *gap,
               int64_t *index) {
    int64_t found = first;
    for (int64_t n = first; n < last; n++) {
        gap[n] = gap[n] - (real)moved[labels[n]];
        index[found] = n;
        found += gap[n] <= slack;
    }
    return found - first;
}

/* Adds samples to the members of their labels, and takes them from those of their old ones, [M] each. */
void add(const Samples *samples, int64_t first, int64_t last, const int64_t *labels, const int64_t *old,
         double *members) {
    for (int64_t n = first; n < last; n++)
        if (labels[n] != old[n]) {
            if (samples->offset)
                move_row(samples, row_of(samples, n), labels[n], old[n], members, 1);
            else
                move_row(samples, row_of(samples, n), labels[n], old[n], members, 0);
        }
}

ALWAYS double square_of(const Samples *samples, const real *row, const double *center, int framed) {
    double parts[PARTS] = {0};
    int64_t d = 0, width = samples->width;
    for (; d + PARTS <= width; d += PARTS)
        for (long i = 0; i < PARTS; i++) {
            double z = number(samples, row, d + i, framed) - center[d + i];
            parts[i] += z * z;
        }
    for (; d < width; d++) {
        double z = number(samples, row, d, framed) - center[d];
        parts[0] += z * z;
    }
    return total_of(parts);
}

/* Of a sparse sample: what the stored numbers change in the square of the center. */
ALWAYS double square_of_sparse(const Samples *samples, int64_t n, const double *center, double center_norm) {
    double norm = 0, change = 0;
    for (int64_t i = samples->starts[n]; i < samples->starts[n + 1]; i++) {
        double z = samples->x[i], at = center[samples->columns[i]];
        norm += z * z, change += (z - at) * (z - at) - at * at;
    }
    double square = center_norm + change;
    return square > 32 * DBL_EPSILON * (center_norm + norm) ? square : 0; /* the rest is rounding */
}

/* Sum of the squared distances of samples to the centers of their labels; `norms` are those of the centers, squared. */
double inertia(const Samples *samples, int64_t first, int64_t last, const int64_t *labels, const double *centers,
               const double *norms) {
    double total = 0;
    for (int64_t n = first; n < last; n++) {
        const double *center = centers + labels[n] * samples->width;
        const real *row = samples->x + n * samples->width;
        double share = samples->weights ? samples->weights[n] : 1, square;
        if (!(share > 0)) continue;
        if (samples->starts)
            square = square_of_sparse(samples, n, center, norms[labels[n]]);
        else
            square = samples->offset ? square_of(samples, row, center, 1) : square_of(samples, row, center, 0);
        total += share * square;
    }
    return total;
}

/* Mean about `shift` and sum of squares about the mean. Blocks are summed about the mean of those before them, and add by
 * Chan's formula: what the last digits lose by a block's distance from that mean is in the sum as well, and larger.
 * `scratch` is [2 D]. */
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
            for (int64_t d = 0; d < width; d++) {
                double z = x[n * width + d] - shift[d] - mean[d];
                part[d] += z;
                square[d] += z * z;
            }
        for (int64_t d = 0; d < width; d++) {
            double step = part[d] / count;
            squares[d] += not_negative(square[d] - step * part[d]) + step * step * before * count / (before + count);
            mean[d] += step * count / (before + count);
        }
    }
}
