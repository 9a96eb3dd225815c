/* The patches of a grid: cut out of an image as rows of a matrix, and folded back. */
#include "native.h"

typedef struct {
    long height, width, patch, rows, columns;
    const int64_t *tops, *lefts; /* where patches begin */
    const real *share;           /* [H, W]: one over the number of patches that cover a pixel */
} Grid;

/* Rows of `size` pixels of all patches of a plane, to the entries of the patches, or added to the plane. */
ALWAYS void move_rows(const Grid *g, real *plane, real *patches, long pitch, int fold, const long size) {
    for (long row = 0; row < g->rows; row++)
        for (long column = 0; column < g->columns; column++, patches += pitch)
            for (long down = 0; down < size; down++) {
                real *pixels = plane + (g->tops[row] + down) * g->width + g->lefts[column];
                real *entries = patches + down * size;
                for (long i = 0; i < size; i++)
                    if (fold) pixels[i] += entries[i];
                    else entries[i] = pixels[i];
            }
}

/* The same; with loops of their own for the most common size, whose rows then are one vector or two. */
static void move_patches(const Grid *g, real *plane, real *patches, long pitch, int fold) {
    if (g->patch == 8 && fold) move_rows(g, plane, patches, pitch, 1, 8);
    else if (g->patch == 8) move_rows(g, plane, patches, pitch, 0, 8);
    else move_rows(g, plane, patches, pitch, fold, g->patch);
}

static real mean_of(const real *values, long count) {
    vector sum = every(0);
    long i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(values + i);
    real total = across(sum);
    for (; i < count; i++) total += values[i];
    return total / count;
}

/* Patches of an image less the mean of each channel, which goes to `mean` if that is not null. */
static void cut_centered(const Grid *g, const real *image, long channels, real *plane, real *mean, real *patches,
                         long pitch) {
    long pixels = g->height * g->width;
    for (long c = 0; c < channels; c++, image += pixels) {
        real middle = mean_of(image, pixels);
        if (mean) mean[c] = middle;
        for (long i = 0; i < pixels; i++) plane[i] = image[i] - middle;
        move_patches(g, plane, patches + c * g->patch * g->patch, pitch, 0);
    }
}

/* Patches of an image each of whose pixels is shared out among the patches that cover it: the adjoint of an average. */
static void cut_shares(const Grid *g, const real *image, long channels, real *plane, real *patches, long pitch) {
    long pixels = g->height * g->width;
    for (long c = 0; c < channels; c++, image += pixels) {
        for (long i = 0; i < pixels; i++) plane[i] = image[i] * g->share[i];
        move_patches(g, plane, patches + c * g->patch * g->patch, pitch, 0);
    }
}

/* Image of the sums of patches; with `mean` of their averages, plus the mean of each channel. */
static void fold(const Grid *g, real *patches, long pitch, long channels, const real *mean, real *image) {
    long pixels = g->height * g->width;
    memset(image, 0, channels * pixels * sizeof(real));
    for (long c = 0; c < channels; c++, image += pixels) {
        move_patches(g, image, patches + c * g->patch * g->patch, pitch, 1);
        if (mean)
            for (long i = 0; i < pixels; i++) image[i] = image[i] * g->share[i] + mean[c];
    }
}
