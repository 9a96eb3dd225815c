/* What the patch operator's kernel stands on: dense matrices, and matrices with entries at the graph's edges alone.
 *
 * A row of a dense matrix is a whole number of cache lines; beyond its own entries it is zero, and so are rows that fill
 * the last group. Of the patches of a grid most are too far apart to be joined, so a matrix of the graph is a list of
 * its entries, node by node, and the diagonal apart.
 */
#include "native.h"
#include <math.h>

#define PI 3.14159265358979323846

#define GROUP 4 /* rows of a product, or edges, that are worked on together */
#define BLOCK 3 /* vectors across a product: the sums of GROUP rows of them just fit into sixteen registers */

ALWAYS long round_up(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

/* Entries from one row to the next: an odd number of cache lines, so that rows do not compete for places in the cache. */
ALWAYS long pitch_of(long entries) {
    long line = 64 / sizeof(real);
    return (round_up(entries, line) / line | 1) * line;
}

/* Weights from the root of the smallest normal number down count for nothing: products of two would be subnormal. */
#ifdef DOUBLE
#define NEGLIGIBLE 0x1.04p-511
#define root sqrt
#else
#define NEGLIGIBLE 0x1.04p-63f
#define root sqrtf
#endif

ALWAYS vector without_traces(vector value) { return drop(value, (value <= NEGLIGIBLE) & (value >= -NEGLIGIBLE)); }
ALWAYS real without_trace(real value) { return value <= NEGLIGIBLE && value >= -NEGLIGIBLE ? 0 : value; }

/* The graph that all images have in common: its edges, each once and node by node in both directions. */
typedef struct {
    long nodes, edges, entries;
    long padded, pitch; /* of a matrix [N, N]: rows, with those that fill a group; entries from one row to the next */
    const int64_t *first, *second, *length; /* [edges]: ends, first < second, and number of the length */
    const int64_t *there, *back;            /* [edges]: entry in the row of `first`, and in that of `second` */
    const int64_t *start;                   /* [N + 1]: first entry of each row */
    const int64_t *node, *neighbor;         /* [entries]: row and column */
} Graph;

ALWAYS void multiply_block(const real *left, long row, long step, long count, const real *right, long pitch,
                           real *product, const long width) {
    vector sums[GROUP][BLOCK] = {0};
    for (long k = 0; k < count; k++)
        for (long i = 0; i < GROUP; i++)
            for (long v = 0; v < width; v++)
                sums[i][v] += load(right + k * pitch + v * LANES) * left[i * row + k * step];
    for (long i = 0; i < GROUP; i++)
        for (long v = 0; v < width; v++) store(product + i * pitch + v * LANES, sums[i][v]);
}

/* Product of a matrix [rows, count], whose entries lie `row` and `step` apart, and one [count, entries]; whole groups
 * of rows. */
static void multiply(const real *left, long row, long step, long count, const real *right, long entries, long pitch,
                     real *product, long rows) {
    long end = round_up(entries, LANES);
    for (long column = 0, width; column < end; column += width * LANES) {
        width = least(BLOCK, (end - column) / LANES);
        for (long i = 0; i < rows; i += GROUP) {
            const real *own = left + i * row, *block = right + column;
            real *target = product + i * pitch + column;
            if (width == 3) multiply_block(own, row, step, count, block, pitch, target, 3);
            else if (width == 2) multiply_block(own, row, step, count, block, pitch, target, 2);
            else multiply_block(own, row, step, count, block, pitch, target, 1);
        }
    }
}

/* Scalar products of all rows of two matrices with `entries` columns, [rows, rows]; whole groups of rows. */
static void scalar_products(const real *left, const real *right, long entries, long pitch, real *products,
                            long product_pitch, long rows) {
    for (long i = 0; i < rows; i += 2)
        for (long j = 0; j < rows; j += GROUP) {
            vector sums[2][GROUP] = {0};
            for (long column = 0; column < entries; column += LANES)
                for (long a = 0; a < 2; a++)
                    for (long b = 0; b < GROUP; b++)
                        sums[a][b] += load(left + (i + a) * pitch + column) * load(right + (j + b) * pitch + column);
            for (long a = 0; a < 2; a++)
                for (long b = 0; b < GROUP; b++) products[(i + a) * product_pitch + j + b] = across(sums[a][b]);
        }
}

ALWAYS void step_block(const Graph *g, real own, const real *others, const real *from, real *to, int trim,
                       const long width) {
    for (long i = 0; i < g->nodes; i++) {
        vector sums[GROUP];
        for (long v = 0; v < width; v++) sums[v] = load(from + i * g->pitch + v * LANES) * own;
        for (long entry = g->start[i]; entry < g->start[i + 1]; entry++) {
            const real *row = from + g->neighbor[entry] * g->pitch;
            for (long v = 0; v < width; v++) sums[v] += load(row + v * LANES) * others[entry];
        }
        for (long v = 0; v < width; v++) store(to + i * g->pitch + v * LANES, trim ? without_traces(sums[v]) : sums[v]);
    }
}

/* Product of a matrix of the graph, with `own` on all of its diagonal, and one [N, N]. */
static void step(const Graph *g, real own, const real *others, const real *from, real *to, int trim) {
    long end = round_up(g->nodes, LANES);
    for (long column = 0, width; column < end; column += width * LANES) {
        width = least(GROUP, (end - column) / LANES);
        const real *source = from + column;
        real *target = to + column;
        if (width == 4) step_block(g, own, others, source, target, trim, 4);
        else if (width == 3) step_block(g, own, others, source, target, trim, 3);
        else if (width == 2) step_block(g, own, others, source, target, trim, 2);
        else step_block(g, own, others, source, target, trim, 1);
    }
}

/* Squared distances of the rows of a matrix at the ends of each edge, less `noise`, not below 0. */
static void distances(const Graph *g, const real *rows, long entries, long pitch, real noise, real *found) {
    for (long edge = 0; edge < g->edges; edge += GROUP) {
        const real *first[GROUP], *second[GROUP];
        for (long a = 0; a < GROUP; a++) {
            first[a] = rows + g->first[edge + a] * pitch;
            second[a] = rows + g->second[edge + a] * pitch;
        }
        vector sums[GROUP] = {0};
        for (long column = 0; column < entries; column += LANES)
            for (long a = 0; a < GROUP; a++) {
                vector difference = load(first[a] + column) - load(second[a] + column);
                sums[a] += difference * difference;
            }
        for (long a = 0; a < GROUP; a++) {
            real distance = across(sums[a]) - noise;
            found[edge + a] = distance < 0 ? 0 : distance; /* a NaN stays one */
        }
    }
}

ALWAYS void distances_backward_block(const Graph *g, const real *flow, const real *rows, long pitch, int add,
                                     real *grad, const long width) {
    for (long i = 0; i < g->nodes; i++) {
        vector here[GROUP], sums[GROUP];
        for (long v = 0; v < width; v++) {
            here[v] = load(rows + i * pitch + v * LANES);
            sums[v] = add ? load(grad + i * pitch + v * LANES) : every(0);
        }
        for (long entry = g->start[i]; entry < g->start[i + 1]; entry++) {
            const real *other = rows + g->neighbor[entry] * pitch;
            for (long v = 0; v < width; v++) sums[v] += (here[v] - load(other + v * LANES)) * flow[entry];
        }
        for (long v = 0; v < width; v++) store(grad + i * pitch + v * LANES, sums[v]);
    }
}

/* Gradient of the rows of a matrix given twice that of the distances, at each entry; to `grad`, or added to it. */
static void distances_backward(const Graph *g, const real *flow, const real *rows, long entries, long pitch, int add,
                               real *grad) {
    long column = 0;
    for (; column + GROUP * LANES <= entries; column += GROUP * LANES)
        distances_backward_block(g, flow, rows + column, pitch, add, grad + column, GROUP);
    for (; column < entries; column += LANES)
        distances_backward_block(g, flow, rows + column, pitch, add, grad + column, 1);
}

/* Gradient of a matrix of the graph that has made each of `count` matrices [N, N] out of the one before, given those of
 * what it has made: scalar products of their rows at the ends of each entry. */
static void entries_backward(const Graph *g, const real *flows, const real *signals, long count, real *grad) {
    long matrix = g->padded * g->pitch, end = round_up(g->nodes, LANES);
    for (long entry = 0; entry < g->entries; entry += GROUP) {
        const real *flow[GROUP], *signal[GROUP];
        for (long a = 0; a < GROUP; a++) {
            flow[a] = flows + g->node[entry + a] * g->pitch;
            signal[a] = signals + g->neighbor[entry + a] * g->pitch;
        }
        vector sums[GROUP] = {0};
        for (long shift = 0; shift < count * matrix; shift += matrix)
            for (long column = shift; column < shift + end; column += LANES)
                for (long a = 0; a < GROUP; a++) sums[a] += load(flow[a] + column) * load(signal[a] + column);
        for (long a = 0; a < GROUP; a++) grad[entry + a] = across(sums[a]);
    }
}
