/* Under the kernel: images as padded planes, a team of threads, windows.
 *
 * An image, or a map with one value for each pair (p, p + d) of a half offset d, is a plane: rows `pitch` apart, with
 * enough zeros after each row and enough rows of zeros above and below that the neighbour of a pixel lies `shift`
 * entries away, and reads as zero where it leaves the image. Only what lies in the image is ever written; that keeps
 * the zeros.
 */
#include "vectors.h"

/* Planes of one size of image. `span` is what is computed of a row: all columns, rounded up to whole vectors. */
typedef struct {
    long height, width, span, pitch, stride, margin;
    long reach;          /* of a window to either side */
    long block;          /* rows that are worked on at once, so that what lies between two sums stays in the L1 cache */
    long blocks;
    long lead, lines;    /* zeros before the rows of one block and those around it; entries of all of that */
    long offsets;
    long *rows, *shifts;  /* of each half offset: rows down, and entries */
    real *valid;          /* [offsets, span]: 1 in the columns whose neighbour lies in the image */
    real *across, *down;  /* [offsets, span] and [offsets, height]: patch side over the number of valid window terms */
    real *inside;         /* [span]: 1 in the columns of the image */
} Grid;

/* Threads that work on the same image, each on its own blocks. */
typedef struct {
    long size, waiting, turn;
    pthread_mutex_t mutex;
    pthread_cond_t all_here;
} Team;

static void wait_for_all(Team *team) {
    if (team->size == 1) return;
    pthread_mutex_lock(&team->mutex);
    long turn = team->turn;
    if (++team->waiting == team->size) {
        team->waiting = 0;
        team->turn++;
        pthread_cond_broadcast(&team->all_here);
    }
    while (turn == team->turn) pthread_cond_wait(&team->all_here, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

/* Runs over the blocks of a member; they do not depend on the number of threads, and so neither does any sum. */
#define EACH_BLOCK(w, grid)                                                                     \
    for (long index = (w)->rank, top = index * (grid)->block, bottom;                           \
         index < (grid)->blocks && (bottom = least(top + (grid)->block, (grid)->height), 1);    \
         index += (w)->team->size, top = index * (grid)->block)

#define EACH_VECTOR(grid, column) for (long column = 0; column < (grid)->span; column += LANES)

/* Rows of the lower ends of the pairs of an offset lie above this one. */
ALWAYS long end_of(const Grid *g, long m) { return g->height - g->rows[m]; }

/* `count` planes: the first entry of the first image. */
static real *take_planes(Memory *memory, const Grid *g, long count) {
    real *taken = take(memory, ((size_t)g->stride * count + 2 * g->margin + LANES) * sizeof(real));
    return taken ? taken + g->margin : 0;
}

/* Lays out the planes of an image and takes the tables from `memory`. */
static void lay_out(Grid *g, long height, long width, long patch, long offsets, const int64_t *rows,
                    const int64_t *columns, Memory *memory) {
    long padding = patch / 2;
    for (long m = 0; m < offsets; m++) padding = most(padding, most(rows[m], labs(columns[m])));
    g->height = height, g->width = width, g->reach = patch / 2, g->offsets = offsets;
    g->span = (width + LANES - 1) / LANES * LANES;
    g->pitch = most(g->span, width + padding);
    g->margin = padding * (g->pitch + 1);
    /* An odd number of cache lines: the same pixel of many planes must not compete for one place in the cache. */
    long line = 64 / sizeof(real);
    g->stride = (((height + padding) * g->pitch + line - 1) / line | 1) * line;
    g->block = least(height, most(most(4 * g->reach, 8), 16384 / (g->pitch * (long)sizeof(real))));
    g->blocks = g->block ? (height + g->block - 1) / g->block : 0;
    g->lead = padding;
    g->lines = (g->block + 2 * g->reach) * g->pitch + 2 * padding + LANES;

    g->rows = take(memory, offsets * sizeof(long));
    g->shifts = take(memory, offsets * sizeof(long));
    g->valid = take(memory, offsets * g->span * sizeof(real));
    g->across = take(memory, offsets * g->span * sizeof(real));
    g->down = take(memory, offsets * height * sizeof(real));
    g->inside = take(memory, g->span * sizeof(real));
    if (!memory->begin) return;
    for (long column = 0; column < g->span; column++) g->inside[column] = column < width;
    for (long m = 0; m < offsets; m++) {
        long first = most(0, -columns[m]), end = least(width, width - columns[m]);
        g->rows[m] = rows[m];
        g->shifts[m] = rows[m] * g->pitch + columns[m];
        for (long column = 0; column < g->span; column++) {
            int valid = first <= column && column < end;
            long terms = least(end, column + g->reach + 1) - most(first, column - g->reach);
            g->valid[m * g->span + column] = valid;
            g->across[m * g->span + column] = valid ? (real)patch / terms : 0;
        }
        for (long row = 0; row < height - rows[m]; row++) {
            long terms = least(height - rows[m], row + g->reach + 1) - most(0, row - g->reach);
            g->down[m * height + row] = (real)patch / terms;
        }
    }
}

/* Writes zeros where no pair begins in the row; whether it has. */
ALWAYS int cleared(const Grid *g, long row, long end, real *line) {
    if (row >= 0 && row < end) return 0;
    memset(line, 0, g->span * sizeof(real));
    return 1;
}

/* Sums down the windows: `count` rows of `sums` from as many and `reach` more to either side. */
static void sum_down(const Grid *g, const real *restrict lines, real *restrict sums, long count) {
    for (long row = 0; row < count; row++)
        EACH_VECTOR(g, column) {
            const real *from = lines + row * g->pitch + column;
            vector sum = load(from);
            for (long k = 1; k <= 2 * g->reach; k++) sum += load(from + k * g->pitch);
            store(sums + row * g->pitch + column, sum);
        }
}

/* The sum across the window. */
ALWAYS vector sum_across(const Grid *g, const real *sums) {
    vector sum = load(sums);
    for (long k = 1; k <= g->reach; k++) sum += load(sums - k) + load(sums + k);
    return sum;
}
