/* The image operator and its gradients, fused: all of an image's steps while its maps are in the cache.
 *
 * The mathematics and the names are those of image_operator.py and window_average.py. Each phase runs over blocks of
 * rows; where a phase reads what another has written around its block, the team waits in between. Small images go to the
 * threads one by one; large ones are worked on by all threads together. No sum depends on the number of threads.
 */
#include "planes.h"

/* Planes of an image that take more than this leave the cache of one core: then all threads share one image. So they
 * do where there are fewer images than threads, unless the image is so small that they would wait more than work. */
#define LARGE_IMAGE (8L << 20)
#define SMALL_IMAGE (1L << 20)

/* The arguments, in the order of `Call` in kernel.py; null where nothing is asked for. */
typedef struct {
    int64_t batch, channels, features, height, width, patch, offsets, steps, threads;
    const int64_t *rows, *columns;                           /* [M] */
    const real *images, *guide;                              /* [B, C, H, W], [B, F, H, W] */
    const real *bias, *similarity, *weight;                  /* [B, M], [B], [B] */
    const real *within, *spatial, *tau;                      /* [M], [B, M], [B, k] */
    real *output, *first;                                    /* as images */
    real *sums;                                              /* [B] */
    const real *grad;                                        /* of the output, or of the sums */
    real *grad_images, *grad_guide, *grad_bias, *grad_similarity, *grad_weight, *grad_spatial, *grad_tau;
    double self_similarity, self_weight;
    char *memory;                                            /* zeros; as many bytes as `memory_needed` says */
} Call;

typedef enum { RESTORE, RESTORE_BACKWARD, SIMILARITY, SIMILARITY_BACKWARD } Task;

/* A thread, with what its team has in common. */
typedef struct {
    const Call *call;
    const Grid *grid;
    Team *team;
    long rank;
    real *lines[3];                                  /* of this thread: the rows of a block and those around it */
    long slots;
    double *sums;                                    /* [blocks, slots] */
    real *guide, *signals, *cotangents, *averages, *grad_output; /* planes of each channel and step */
    real *distance, *weights, *forward, *backward, *grad; /* planes of each offset */
    real *share, *own, *inverse_norm;                /* a plane each: 1/t, o and 1/n */
    real *through, *grad_own;                        /* a plane each */
} Worker;

/* Rows of an image, to planes. Zeros after them, where a NaN of the image before would not go away by itself. */
static void read_rows(const Worker *w, const real *image, long planes, real *to) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long c = 0; c < planes; c++)
            for (long row = top; row < bottom; row++) {
                real *line = to + c * g->stride + row * g->pitch;
                memcpy(line, image + (c * g->height + row) * g->width, g->width * sizeof(real));
                memset(line + g->width, 0, (g->span - g->width) * sizeof(real));
            }
}

static void write_rows(const Worker *w, const real *from, long planes, real *image) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long c = 0; c < planes; c++)
            for (long row = top; row < bottom; row++)
                memcpy(image + (c * g->height + row) * g->width, from + c * g->stride + row * g->pitch,
                       g->width * sizeof(real));
}

/* Squared distances of the windows, without what noise is expected to add. */
static void distances(const Worker *w, const real *bias) {
    const Grid *g = w->grid;
    long reach = g->reach, features = w->call->features;
    real *lines = w->lines[0], *sums = w->lines[1];
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            const real *valid = g->valid + m * g->span, *across = g->across + m * g->span;
            long shift = g->shifts[m], end = end_of(g, m);
            for (long row = top - reach; row < bottom + reach; row++) {
                real *line = lines + (row - top + reach) * g->pitch;
                if (cleared(g, row, end, line)) continue;
                EACH_VECTOR(g, column) {
                    const real *pixel = w->guide + row * g->pitch + column;
                    vector difference = load(pixel + shift) - load(pixel), squared = difference * difference;
                    for (long c = 1; c < features; c++) {
                        difference = load(pixel + c * g->stride + shift) - load(pixel + c * g->stride);
                        squared += difference * difference;
                    }
                    store(line + column, squared * load(valid + column));
                }
            }
            sum_down(g, lines, sums, least(bottom, end) - top);
            for (long row = top; row < least(bottom, end); row++)
                EACH_VECTOR(g, column) {
                    vector sum = sum_across(g, sums + (row - top) * g->pitch + column);
                    vector found = sum * (load(across + column) * g->down[m * g->height + row]) - bias[m];
                    store(w->distance + m * g->stride + row * g->pitch + column, drop(found, found < 0));
                }
        }
}

/* The kernel of the pairs: 2^(slope D + constant of the offset); without constants, where there are none. */
static void kernels(const Worker *w, real slope, const real *constants) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            real constant = constants ? constants[m] : 0;
            for (long row = top; row < least(bottom, end_of(g, m)); row++)
                EACH_VECTOR(g, column) {
                    long place = m * g->stride + row * g->pitch + column;
                    vector power = power_of_two(load(w->distance + place) * slope + constant);
                    store(w->weights + place, power * load(g->valid + m * g->span + column));
                }
        }
}

/* 1/t of the weights in `weights`. */
static void shares(const Worker *w, real self) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column) {
                const real *weights = w->weights + row * g->pitch + column;
                vector total = every(self);
                for (long m = 0; m < g->offsets; m++, weights += g->stride)
                    total += load(weights) + load(weights - g->shifts[m]);
                store(w->share + row * g->pitch + column, load(g->inside + column) / total);
            }
}

/* Box filter of a plane, times a factor. */
static void smooth_plane(const Worker *w, const real *from, real factor, real *to) {
    const Grid *g = w->grid;
    real *lines = w->lines[0], *sums = w->lines[1];
    EACH_BLOCK(w, g) {
        for (long row = top - g->reach; row < bottom + g->reach; row++) {
            real *line = lines + (row - top + g->reach) * g->pitch;
            if (cleared(g, row, g->height, line)) continue;
            EACH_VECTOR(g, column) store(line + column, load(from + row * g->pitch + column) * factor);
        }
        sum_down(g, lines, sums, bottom - top);
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column)
                store(to + row * g->pitch + column, sum_across(g, sums + (row - top) * g->pitch + column));
    }
}

/* Box filter of what `lines` holds of an offset around a block, times the factors of the offset, to its plane. */
ALWAYS void smooth_lines(const Worker *w, const real *lines, long m, long top, long bottom, const real *factors,
                         long factor_pitch, real *planes) {
    const Grid *g = w->grid;
    long last = least(bottom, end_of(g, m));
    sum_down(g, lines, w->lines[2], last - top);
    for (long row = top; row < last; row++)
        EACH_VECTOR(g, column) {
            vector sum = sum_across(g, w->lines[2] + (row - top) * g->pitch + column);
            vector factor = load(factors + row * factor_pitch + column);
            store(planes + m * g->stride + row * g->pitch + column, sum * factor);
        }
}

/* The weights c of the operator in both directions. */
static void fold(const Worker *w) {
    const Grid *g = w->grid;
    real *forward = w->lines[0], *backward = w->lines[1];
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            const real *valid = g->valid + m * g->span;
            for (long row = top - g->reach; row < bottom + g->reach; row++) {
                long line = (row - top + g->reach) * g->pitch;
                long end = end_of(g, m);
                if (cleared(g, row, end, forward + line) + cleared(g, row, end, backward + line)) continue;
                EACH_VECTOR(g, column) {
                    long place = row * g->pitch + column;
                    vector weights = load(w->weights + m * g->stride + place);
                    store(forward + line + column, weights * load(w->share + place));
                    store(backward + line + column, weights * load(w->share + place + g->shifts[m]));
                }
            }
            smooth_lines(w, forward, m, top, bottom, valid, 0, w->forward);
            smooth_lines(w, backward, m, top, bottom, valid, 0, w->backward);
        }
}

/* 1/n, 0 outside the image. */
static void norms(const Worker *w) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column) {
                long place = row * g->pitch + column;
                vector norm = load(w->own + place), inside = load(g->inside + column);
                for (long m = 0; m < g->offsets; m++)
                    norm += load(w->forward + m * g->stride + place) +
                            load(w->backward + m * g->stride + place - g->shifts[m]);
                store(w->inverse_norm + place, inside / (norm + (1 - inside)));
            }
}

/* The operator of `distance`: t, c, o and n. Afterwards each thread may apply it to its own blocks. */
static void prepare(const Worker *w, real slope, const real *constants, real self) {
    kernels(w, slope, constants);
    wait_for_all(w->team);
    shares(w, self);
    wait_for_all(w->team);
    fold(w);
    smooth_plane(w, w->share, self, w->own);
    wait_for_all(w->team);
    norms(w);
}

/* o x + sum of c x over the neighbours of one vector of pixels; with `forward` and
 * `backward` exchanged the adjoint. */
ALWAYS void gather(const Worker *w, const real *forward, const real *backward, const real *source, long place,
                   const long channels, vector *sums) {
    const Grid *g = w->grid;
    for (long c = 0; c < channels; c++) sums[c] = load(w->own + place) * load(source + c * g->stride + place);
    for (long m = 0; m < g->offsets; m++) {
        long shift = g->shifts[m];
        vector to = load(forward + m * g->stride + place), from = load(backward + m * g->stride + place - shift);
        for (long c = 0; c < channels; c++) {
            const real *pixel = source + c * g->stride + place;
            sums[c] += to * load(pixel + shift) + from * load(pixel - shift);
        }
    }
}

/* Where the result of `apply` goes: to each that is not null. */
typedef struct {
    real *average; /* A x */
    real *moved;   /* (1 - tau) x + tau A x */
    real *grad_output;    /* the adjoint: (1 - tau) grad_output + A' x */
    real tau;
} Target;

ALWAYS void apply_channels(const Worker *w, const real *source, Target t, long first, const long channels) {
    const Grid *g = w->grid;
    const real *forward = t.grad_output ? w->backward : w->forward;
    const real *backward = t.grad_output ? w->forward : w->backward;
    EACH_BLOCK(w, g)
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column) {
                vector sums[4];
                long place = row * g->pitch + column, entry = first * g->stride + place;
                gather(w, forward, backward, source + first * g->stride, place, channels, sums);
                for (long c = 0; c < channels; c++, entry += g->stride) {
                    if (t.grad_output) {
                        store(t.grad_output + entry, load(t.grad_output + entry) * (1 - t.tau) + sums[c]);
                        continue;
                    }
                    vector average = sums[c] * load(w->inverse_norm + place);
                    if (t.average) store(t.average + entry, average);
                    if (t.moved) store(t.moved + entry, load(source + entry) + (average - load(source + entry)) * t.tau);
                }
            }
}

/* The operator or its adjoint, a few channels at a time: as many sums as there are registers beside the weights. */
static void apply(const Worker *w, const real *source, Target target) {
    long channels = w->call->channels, first = 0;
    for (; first + 4 <= channels; first += 4) apply_channels(w, source, target, first, 4);
    for (; first + 3 <= channels; first += 3) apply_channels(w, source, target, first, 3);
    for (; first < channels; first++) apply_channels(w, source, target, first, 1);
}

static void restore(const Worker *w, long image) {
    const Call *q = w->call;
    const Grid *g = w->grid;
    long pixels = q->channels * g->height * g->width;
    real *signal = w->signals, *next = signal + q->channels * g->stride;
    read_rows(w, q->guide + image * q->features * g->height * g->width, q->features, w->guide);
    read_rows(w, q->images + image * pixels, q->channels, signal);
    wait_for_all(w->team);
    distances(w, q->bias + image * g->offsets);
    prepare(w, q->similarity[image], q->within, q->self_similarity);
    apply(w, signal, (Target){.average = next});
    if (q->first) write_rows(w, next, q->channels, q->first + image * pixels);
    if (q->steps) prepare(w, q->weight[image], q->spatial + image * g->offsets, q->self_weight);
    for (long step = 0; step < q->steps; step++) {
        real *now = next;
        next = signal, signal = now;
        wait_for_all(w->team);
        apply(w, signal, (Target){.moved = next, .tau = q->tau[image * q->steps + step]});
    }
    write_rows(w, next, q->channels, q->output + image * pixels);
    wait_for_all(w->team);
}

/* What the sums over a block are of: one for each offset, then one for each step. */
enum { SPATIAL, WEIGHT, SIMILAR, DEBIAS, SECTIONS };

ALWAYS double *slot(const Worker *w, long block, int section, long m) {
    return w->sums + block * w->slots + section * w->grid->offsets + m;
}

/* Sum over the blocks and `count` slots, always in the same order. */
static double total_of(const Worker *w, int section, long m, long count) {
    double total = 0;
    for (long block = 0; block < w->grid->blocks; block++)
        for (long i = 0; i < count; i++) total += *slot(w, block, section, m + i);
    return total;
}

/* What flows back into one application: g/n times tau, and through n; at the same time the gradient of tau. */
static void cotangent_of(const Worker *w, const real *signals, const real *averages, real *cotangents, real tau,
                         int add, int step) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g) {
        vector grad_tau = every(0);
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column) {
                long pixel = row * g->pitch + column, place = pixel;
                vector inverse = load(w->inverse_norm + place) * tau;
                vector through = add ? load(w->through + place) : every(0);
                vector own = add ? load(w->grad_own + place) : every(0);
                for (long c = 0; c < w->call->channels; c++, place += g->stride) {
                    vector grad_output = load(w->grad_output + place), out = grad_output * inverse;
                    vector difference = load(averages + place) - load(signals + place);
                    store(cotangents + place, out);
                    grad_tau += difference * grad_output;
                    through -= out * load(averages + place);
                    own -= out * difference;
                }
                store(w->through + pixel, through);
                store(w->grad_own + pixel, own);
            }
        if (step >= 0) *slot(w, index, SECTIONS, step) = sum_of(grad_tau);
    }
}

/* Gradients of c of `count` planes of applications, in both directions, smoothed, times w; to `forward`
 * and `backward`. */
static void correlate(const Worker *w, long count) {
    const Grid *g = w->grid;
    real *forward = w->lines[0], *backward = w->lines[1];
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            long shift = g->shifts[m];
            const real *weights = w->weights + m * g->stride;
            for (long row = top - g->reach; row < bottom + g->reach; row++) {
                long line = (row - top + g->reach) * g->pitch;
                long end = end_of(g, m);
                if (cleared(g, row, end, forward + line) + cleared(g, row, end, backward + line)) continue;
                EACH_VECTOR(g, column) {
                    long place = row * g->pitch + column;
                    vector valid = load(g->valid + m * g->span + column);
                    vector to = load(w->through + place), from = load(w->through + place + shift);
                    for (long i = 0; i < count; i++, place += g->stride) {
                        to += load(w->cotangents + place) * load(w->signals + place + shift);
                        from += load(w->signals + place) * load(w->cotangents + place + shift);
                    }
                    store(forward + line + column, to * valid);
                    store(backward + line + column, from * valid);
                }
            }
            smooth_lines(w, forward, m, top, bottom, weights, g->pitch, w->forward);
            smooth_lines(w, backward, m, top, bottom, weights, g->pitch, w->backward);
        }
}

/* Gradient through t, to `through`. */
static void through_totals(const Worker *w, real self) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long row = top; row < bottom; row++)
            EACH_VECTOR(g, column) {
                long place = row * g->pitch + column;
                vector total = load(w->own + place) * self, share = load(w->share + place);
                for (long m = 0; m < g->offsets; m++)
                    total += load(w->forward + m * g->stride + place) +
                            load(w->backward + m * g->stride + place - g->shifts[m]);
                store(w->through + place, -total * share * share);
            }
}

/* Gradients of w / t and s / t, in `forward`, `backward` and `through`, for `count` planes of applications. */
static void averaging_backward(const Worker *w, long count, real self) {
    wait_for_all(w->team);
    correlate(w, count);
    smooth_plane(w, w->grad_own, 1, w->own);
    wait_for_all(w->team);
    through_totals(w, self);
    wait_for_all(w->team);
}

/* Gradient of log2 w of each pair, and through the kernel that of the distances, added to `grad` if there is one. */
static void kernels_backward(const Worker *w, real slope, int section, int add) {
    const Grid *g = w->grid;
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            vector constant = every(0), sloped = every(0);
            for (long row = top; row < least(bottom, end_of(g, m)); row++)
                EACH_VECTOR(g, column) {
                    long pixel = row * g->pitch + column, neighbor = pixel + g->shifts[m], place = m * g->stride + pixel;
                    vector power = load(w->forward + place) * load(w->share + pixel);
                    power += load(w->backward + place) * load(w->share + neighbor);
                    power += load(w->weights + place) * (load(w->through + pixel) + load(w->through + neighbor));
                    power *= (real)LN2;
                    store(w->grad + place, power * slope + (add ? load(w->grad + place) : every(0)));
                    constant += power, sloped += power * load(w->distance + place);
                }
            if (section == WEIGHT) *slot(w, index, SPATIAL, m) = sum_of(constant);
            *slot(w, index, section, m) = sum_of(sloped);
        }
}

/* Gradient of the guide, and of the bias, given that of the distances, in `grad`; overwrites `weights`. */
static void distances_backward(const Worker *w, real *grad_guide) {
    const Grid *g = w->grid;
    real *lines = w->lines[0];
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            vector bias = every(0);
            for (long row = top; row < least(bottom, end_of(g, m)); row++)
                EACH_VECTOR(g, column) {
                    long place = m * g->stride + row * g->pitch + column;
                    vector grad = drop(load(w->grad + place), ~(load(w->distance + place) > 0));
                    store(w->grad + place, grad);
                    bias -= grad;
                }
            *slot(w, index, DEBIAS, m) = sum_of(bias);
        }
    wait_for_all(w->team);
    if (!grad_guide) return;
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            for (long row = top - g->reach; row < bottom + g->reach; row++) {
                real *line = lines + (row - top + g->reach) * g->pitch;
                if (cleared(g, row, end_of(g, m), line)) continue;
                EACH_VECTOR(g, column) {
                    vector scale = load(g->across + m * g->span + column) * g->down[m * g->height + row];
                    store(line + column, load(w->grad + m * g->stride + row * g->pitch + column) * scale);
                }
            }
            smooth_lines(w, lines, m, top, bottom, g->valid + m * g->span, 0, w->weights);
        }
    wait_for_all(w->team);
    EACH_BLOCK(w, g)
        for (long c = 0; c < w->call->features; c++)
            for (long row = top; row < bottom; row++) {
                real line[LANES];
                EACH_VECTOR(g, column) {
                    long place = row * g->pitch + column;
                    const real *pixel = w->guide + c * g->stride + place, *weights = w->weights + place;
                    vector here = load(pixel), sum = every(0);
                    for (long m = 0; m < g->offsets; m++, weights += g->stride) {
                        long shift = g->shifts[m];
                        sum += load(weights) * (here - load(pixel + shift));
                        sum += load(weights - shift) * (here - load(pixel - shift));
                    }
                    store(line, sum * 2);
                    memcpy(grad_guide + (c * g->height + row) * g->width + column, line,
                           least(LANES, g->width - column) * sizeof(real));
                }
            }
}

static void restore_backward(const Worker *w, long image) {
    const Call *q = w->call;
    const Grid *g = w->grid;
    long channels = q->channels, steps = q->steps, pixels = channels * g->height * g->width;
    long planes = channels * g->stride;
    const real *tau = q->tau + image * steps;
    read_rows(w, q->guide + image * q->features * g->height * g->width, q->features, w->guide);
    read_rows(w, q->first + image * pixels, channels, w->signals);
    read_rows(w, q->grad + image * pixels, channels, w->grad_output);
    wait_for_all(w->team);
    distances(w, q->bias + image * g->offsets);
    if (steps) prepare(w, q->weight[image], q->spatial + image * g->offsets, q->self_weight);
    for (long step = 0; step < steps; step++) {
        real *signal = w->signals + step * planes;
        Target target = {.average = w->averages + step * planes, .tau = tau[step]};
        if (step + 1 < steps) target.moved = signal + planes;
        apply(w, signal, target);
        wait_for_all(w->team);
    }
    for (long step = steps - 1; step >= 0; step--) {
        real *signal = w->signals + step * planes, *out = w->cotangents + step * planes;
        cotangent_of(w, signal, w->averages + step * planes, out, tau[step], step < steps - 1, step);
        wait_for_all(w->team);
        apply(w, out, (Target){.grad_output = w->grad_output, .tau = tau[step]});
    }
    if (steps) {
        averaging_backward(w, steps * channels, q->self_weight);
        kernels_backward(w, q->weight[image], WEIGHT, 0);
    }
    prepare(w, q->similarity[image], q->within, q->self_similarity);
    read_rows(w, q->images + image * pixels, channels, w->signals);
    read_rows(w, q->first + image * pixels, channels, w->averages);
    cotangent_of(w, w->signals, w->averages, w->cotangents, 1, 0, -1);
    wait_for_all(w->team);
    if (q->grad_images) {
        apply(w, w->cotangents, (Target){.grad_output = w->grad_output, .tau = 1});
        write_rows(w, w->grad_output, channels, q->grad_images + image * pixels);
        wait_for_all(w->team);
    }
    averaging_backward(w, channels, q->self_similarity);
    kernels_backward(w, q->similarity[image], SIMILAR, steps > 0);
    distances_backward(w, q->grad_guide ? q->grad_guide + image * q->features * g->height * g->width : 0);
    if (w->rank == 0) {
        for (long m = 0; steps && m < g->offsets; m++)
            q->grad_spatial[image * g->offsets + m] = total_of(w, SPATIAL, m, 1);
        for (long m = 0; m < g->offsets; m++) q->grad_bias[image * g->offsets + m] = total_of(w, DEBIAS, m, 1);
        for (long step = 0; step < steps; step++)
            q->grad_tau[image * steps + step] = total_of(w, SECTIONS, step, 1);
        if (steps) q->grad_weight[image] = total_of(w, WEIGHT, 0, g->offsets);
        q->grad_similarity[image] = total_of(w, SIMILAR, 0, g->offsets);
    }
    wait_for_all(w->team);
}

/* Sum of the similarities of all pairs; backward, the gradients of the images and of the exponent. */
static void similarity(const Worker *w, long image) {
    const Call *q = w->call;
    const Grid *g = w->grid;
    real slope = q->similarity[image], factor = q->grad ? q->grad[image] * (real)LN2 : 0;
    long pixels = q->features * g->height * g->width;
    read_rows(w, q->guide + image * pixels, q->features, w->guide);
    wait_for_all(w->team);
    distances(w, q->bias + image * g->offsets);
    kernels(w, slope, 0);
    EACH_BLOCK(w, g)
        for (long m = 0; m < g->offsets; m++) {
            vector sum = every(0);
            for (long row = top; row < least(bottom, end_of(g, m)); row++)
                EACH_VECTOR(g, column) {
                    long place = m * g->stride + row * g->pitch + column;
                    vector weights = load(w->weights + place);
                    sum += q->grad ? weights * load(w->distance + place) : weights;
                    if (q->grad) store(w->grad + place, weights * (factor * slope));
                }
            *slot(w, index, SIMILAR, m) = sum_of(sum);
        }
    wait_for_all(w->team);
    if (w->rank == 0) {
        double total = total_of(w, SIMILAR, 0, g->offsets);
        if (q->sums) q->sums[image] = total;
        if (q->grad_similarity) q->grad_similarity[image] = total * factor;
    }
    if (q->grad_images) distances_backward(w, q->grad_images + image * pixels);
    wait_for_all(w->team);
}

/* Takes what a team needs for a task from the memory that is handed out; gives every worker of it the same. */
static void take_planes_of(Worker *w, Task task, Memory *memory) {
    const Grid *g = w->grid;
    long channels = w->call->channels, features = w->call->features, steps = w->call->steps, offsets = g->offsets;
    int goes_back = task == RESTORE_BACKWARD, restores = task == RESTORE || goes_back;
    long applications = goes_back ? most(steps, 1) : 2; /* of a forward pass two signals at a time */
    w->slots = SECTIONS * offsets + steps;
    w->sums = take(memory, g->blocks * w->slots * sizeof(double));
    w->guide = take_planes(memory, g, features);
    w->distance = take_planes(memory, g, offsets);
    w->weights = take_planes(memory, g, offsets);
    if (goes_back || task == SIMILARITY_BACKWARD) w->grad = take_planes(memory, g, offsets);
    if (!restores) return;
    w->forward = take_planes(memory, g, offsets);
    w->backward = take_planes(memory, g, offsets);
    w->share = take_planes(memory, g, 1);
    w->own = take_planes(memory, g, 1);
    w->inverse_norm = take_planes(memory, g, 1);
    w->signals = take_planes(memory, g, applications * channels);
    if (!goes_back) return;
    w->cotangents = take_planes(memory, g, applications * channels);
    w->averages = take_planes(memory, g, applications * channels);
    w->grad_output = take_planes(memory, g, channels);
    w->through = take_planes(memory, g, 1);
    w->grad_own = take_planes(memory, g, 1);
}

typedef struct Member Member;

/* What the threads of a call have in common. */
typedef struct {
    Member *members;
    Task task;
    int together; /* all on one image after the other */
    long next;    /* image that nobody has begun */
} Shared;

struct Member {
    Worker worker;
    Team alone;
    Shared *shared;
};

static void one_image(const Worker *w, Task task, long image) {
    if (task == RESTORE) restore(w, image);
    else if (task == RESTORE_BACKWARD) restore_backward(w, image);
    else similarity(w, image);
}

static void work(void *argument) {
    Member *member = argument;
    Shared *shared = member->shared;
    long batch = member->worker.call->batch;
    if (shared->together)
        for (long image = 0; image < batch; image++) one_image(&member->worker, shared->task, image);
    else
        for (long image; (image = next_image(&shared->next)) < batch;)
            one_image(&member->worker, shared->task, image);
}

/* How the work is shared out, and where in memory everything lies; returns the number of threads. */
static long set_out(const Call *q, Task task, Grid *grid, Shared *shared, Team *team, Memory *memory) {
    Memory image = {0};
    Worker model = {.call = q, .grid = grid};
    lay_out(grid, q->height, q->width, q->patch, q->offsets, q->rows, q->columns, memory);
    take_planes_of(&model, task, &image);
    shared->task = task;
    shared->together = (long)image.used > (q->batch < q->threads ? SMALL_IMAGE : LARGE_IMAGE);
    long threads = most(1, least(q->threads, shared->together ? grid->blocks : q->batch));
    shared->members = take(memory, threads * sizeof(Member));
    for (long rank = 0; rank < threads; rank++) {
        if (rank == 0 || !shared->together) take_planes_of(&model, task, memory);
        for (int i = 0; i < 3; i++) {
            real *lines = take(memory, grid->lines * sizeof(real));
            model.lines[i] = lines ? lines + grid->lead : 0;
        }
        if (!memory->begin) continue;
        Member *member = shared->members + rank;
        member->alone.size = 1;
        member->shared = shared;
        member->worker = model;
        member->worker.team = shared->together ? team : &member->alone;
        member->worker.rank = shared->together ? rank : 0;
    }
    return threads;
}

int64_t memory_needed(const Call *q, int64_t task) {
    Grid grid;
    Shared shared;
    Memory memory = {0};
    set_out(q, task, &grid, &shared, 0, &memory);
    return memory.used;
}

/* Whether the memory, of as many bytes as `size`, was enough; nothing is done where it is not. */
int64_t run(const Call *q, int64_t task, int64_t size) {
    Grid grid;
    Team team = {.mutex = PTHREAD_MUTEX_INITIALIZER, .all_here = PTHREAD_COND_INITIALIZER};
    Shared shared = {0};
    Memory memory = {.begin = q->memory};
    if (size < memory_needed(q, task)) return 0;
    FORBID(memory.begin, size);
    long threads = set_out(q, task, &grid, &shared, &team, &memory);
    on_threads(work, (char *)shared.members, sizeof(Member), threads, &team.size);
    ALLOW(memory.begin, size);
    return 1;
}
