/* Signals on patches and their gradients, fused: all of an image's matrices while they are in the cache.
 *
 * The mathematics and the names are those of patch_operator.py; the difference is that the weights, and each step, look
 * at the edges of the graph alone. Every image is worked on by one thread, from its pixels to the result, so no sum
 * depends on the number of threads.
 */
#include "patch_matrix.h"
#include "patch_pixels.h"

/* Sum of a row of S', in units of NEGLIGIBLE, under which too many of its digits have been dropped. */
#define LEAST_SUM 0x1p20f

/* Columns of `values`. */
enum { SIGMA, TAU, RADIUS, SIGMA_S, SIGMA_F, NOISE, VALUES };

/* The arguments, in the order of `Call` in patch_cpu_kernel.py; null where nothing is asked for. */
typedef struct {
    int64_t batch, channels, features, height, width, patch, rows, columns, edges, entries, lengths, symmetric, threads;
    const int64_t *tops, *lefts;                                                 /* of `Grid` */
    const real *share;
    const int64_t *first, *second, *length, *there, *back, *start, *node, *neighbor; /* of `Graph`, with zeros behind */
    const double *distinct;       /* [lengths]: the distinct lengths of edges */
    const int64_t *steps;         /* [B] */
    const real *values;           /* [B, VALUES] */
    const real *images, *guide;   /* [B, C, H, W]; [B, F, H, W], null: the images */
    real *output;                 /* as images */
    const real *grad;             /* of the output */
    real *grad_images, *grad_guide, *grad_values;
    double exponent, degree_floor; /* of a Gaussian as a power of two; the least degree to divide by */
    char *memory;                 /* zeros; as many bytes as `memory_needed` says */
} Call;

typedef enum { RESTORE, RESTORE_BACKWARD } Task;

/* A thread, with what it needs for one image. */
typedef struct {
    const Call *call;
    Task task;
    long *next;
    Grid grid;
    Graph graph;
    long dimension, wide, feature_dimension, feature_wide; /* of patch vectors: entries, and from one to the next */
    real *plane, *mean;                                    /* [H, W], [C] */
    real *patches, *features;                              /* [N, D]; the same where there is no guide */
    double *near, *cutoff;                                 /* [lengths]: the two factors of a spatial weight */
    real *distance, *similarity, *unlike, *spatial, *weight; /* [edges] */
    real *degree, *factor;                                 /* [N] */
    real *ahead, *behind;                                  /* [entries]: of a step, and of its transpose */
    real *signals, *share;                                 /* [2 or k + 1, N, N]; [N]: one over the last's row sums */
    real *lost;                                            /* [N]: 1 where S stands for what the steps have left of it */
    real *restored;                                        /* [N, D] */
    real *flows, *operator_grad;                           /* [k + 1, N, N], [N, N] */
    real *grad_patches, *grad_features;                    /* [N, D] */
    real *entry_grad, *edge_grad, *node_grad;              /* [entries], [edges], [N] */
    double *length_grad;                                   /* [lengths] */
} Worker;

static void read_image(const Worker *w, long image) {
    const Call *q = w->call;
    long pixels = q->height * q->width;
    /* Rows of S'/S'1 sum to one, so a constant passes through: without the mean the sums lose no digits to it. */
    cut_centered(&w->grid, q->images + image * q->channels * pixels, q->channels, w->plane, w->mean, w->patches, w->wide);
    if (q->guide)
        cut_centered(&w->grid, q->guide + image * q->features * pixels, q->features, w->plane, 0, w->features,
                     w->feature_wide);
}

/* exp(-D / 2 width^2) = 2^(slope D). */
ALWAYS double slope(const Worker *w, double width) { return w->call->exponent / (width * width); }

/* What an edge's length says of its weight. */
static void spatial_weights(const Worker *w, const real *values) {
    for (long u = 0; u < w->call->lengths; u++) {
        double length = w->call->distinct[u], ratio = length / values[RADIUS];
        w->near[u] = exp2(slope(w, values[SIGMA_S]) * length * length);
        w->cutoff[u] = ratio >= 1 ? 0 : (1 + cos(PI * ratio)) / 2;
    }
    for (long edge = 0; edge < w->graph.edges; edge++) {
        long u = w->graph.length[edge];
        w->spatial[edge] = w->near[u] * w->cutoff[u];
    }
}

/* Weights of the edges, and the entries of a step I - tau L beside its diagonal. */
static void weigh(const Worker *w, const real *values) {
    const Call *q = w->call;
    const Graph *g = &w->graph;
    real bias = 2 * w->feature_dimension * values[NOISE] * values[NOISE];
    real similar = slope(w, values[SIGMA]), joined = slope(w, values[SIGMA_F]);
    distances(g, w->features, w->feature_dimension, w->feature_wide, bias, w->distance);
    spatial_weights(w, values);
    for (long edge = 0; edge < g->edges; edge += LANES) {
        vector distance = load(w->distance + edge), unlike = power_of_two(distance * joined);
        store(w->similarity + edge, power_of_two(distance * similar));
        store(w->unlike + edge, unlike);
        store(w->weight + edge, without_traces(unlike * load(w->spatial + edge)));
    }
    memset(w->degree, 0, g->nodes * sizeof(real));
    for (long edge = 0; edge < g->edges; edge++) {
        w->degree[g->first[edge]] += w->weight[edge];
        w->degree[g->second[edge]] += w->weight[edge];
    }
    for (long i = 0; i < g->nodes; i++) {
        real degree = w->degree[i] < (real)q->degree_floor ? (real)q->degree_floor : w->degree[i];
        w->factor[i] = 1 / (q->symmetric ? root(degree) : degree);
    }
    for (long edge = 0; edge < g->edges; edge++) {
        real weight = values[TAU] * w->weight[edge], first = w->factor[g->first[edge]];
        real second = w->factor[g->second[edge]];
        if (q->symmetric) first = second = first * second;
        w->ahead[g->there[edge]] = w->behind[g->back[edge]] = without_trace(weight * first);
        w->ahead[g->back[edge]] = w->behind[g->there[edge]] = without_trace(weight * second);
    }
}

/* A row of S. */
static void similarity_row(const Worker *w, long node, real *row) {
    const Graph *g = &w->graph;
    memset(row, 0, g->pitch * sizeof(real));
    row[node] = 1;
    for (long edge = 0; edge < g->edges; edge++) {
        if (g->first[edge] == node) row[g->second[edge]] = w->similarity[edge];
        if (g->second[edge] == node) row[g->first[edge]] = w->similarity[edge];
    }
}

ALWAYS real sum_of_row(const Graph *g, const real *row) {
    vector sum = every(0);
    for (long column = 0; column < g->nodes; column += LANES) sum += load(row + column);
    return across(sum);
}

/* S' divided by its row sums, which takes patches to restored patches. `kept` matrices in turn take S and the result of
 * each step. */
static real *smooth(const Worker *w, real tau, long steps, long kept) {
    const Graph *g = &w->graph;
    long matrix = g->padded * g->pitch;
    real keep = without_trace(1 - tau), *signal = w->signals;
    memset(signal, 0, matrix * sizeof(real));
    for (long i = 0; i < g->nodes; i++) signal[i * g->pitch + i] = 1;
    for (long edge = 0; edge < g->edges; edge++) {
        long first = g->first[edge], second = g->second[edge];
        signal[first * g->pitch + second] = signal[second * g->pitch + first] = w->similarity[edge];
    }
    for (long t = 1; t <= steps; t++) {
        real *next = w->signals + t % kept * matrix;
        step(g, keep, w->ahead, signal, next, 1);
        signal = next;
    }
    for (long i = 0; i < g->nodes; i++) {
        real *row = signal + i * g->pitch;
        real sum = sum_of_row(g, row);
        /* An isolated patch keeps (1 - tau)^k of its row of S. The division undoes that, unless next to nothing is left. */
        w->lost[i] = sum <= LEAST_SUM * NEGLIGIBLE && sum >= -LEAST_SUM * NEGLIGIBLE;
        if (w->lost[i]) {
            similarity_row(w, i, row);
            sum = sum_of_row(g, row);
        }
        w->share[i] = 1 / sum;
        for (long column = 0; column < g->nodes; column += LANES) store(row + column, load(row + column) * w->share[i]);
    }
    return signal;
}

static void restore(const Worker *w, long image) {
    const Call *q = w->call;
    const Graph *g = &w->graph;
    const real *values = q->values + image * VALUES;
    read_image(w, image);
    weigh(w, values);
    const real *operator = smooth(w, values[TAU], q->steps[image], 2);
    multiply(operator, g->pitch, 1, g->nodes, w->patches, w->dimension, w->wide, w->restored, g->padded);
    fold(&w->grid, w->restored, w->wide, q->channels, w->mean, q->output + image * q->channels * q->height * q->width);
}

/* Back through the sums of rows and all steps: the gradient of S to `flows`, those of the steps' entries beside the
 * diagonal to `entry_grad`. Returns that of the diagonal, all of which is 1 - tau. */
static double steps_backward(const Worker *w, real tau, long steps, const real *operator) {
    const Graph *g = &w->graph;
    long matrix = g->padded * g->pitch;
    real keep = without_trace(1 - tau), *flow = w->flows + steps * matrix;
    for (long i = 0; i < g->nodes; i++) {
        real *grad = w->operator_grad + i * g->pitch;
        vector sum = every(0);
        for (long column = 0; column < g->nodes; column += LANES)
            sum += load(grad + column) * load(operator + i * g->pitch + column);
        real through = across(sum);
        for (long column = 0; column < g->nodes; column += LANES) {
            vector value = (load(grad + column) - through) * w->share[i];
            store(grad + column, value);
            store(flow + i * g->pitch + column, w->lost[i] ? every(0) : value);
        }
    }
    for (; flow > w->flows; flow -= matrix) step(g, keep, w->behind, flow, flow - matrix, 0);
    for (long i = 0; i < g->nodes; i++) /* S stands there itself */
        for (long column = i * g->pitch; w->lost[i] && column < i * g->pitch + g->nodes; column += LANES)
            store(flow + column, load(flow + column) + load(w->operator_grad + column));
    entries_backward(g, w->flows + matrix, w->signals, steps, w->entry_grad);
    vector own = every(0);
    for (long i = 0; i < steps * matrix; i += LANES) own += load(w->flows + matrix + i) * load(w->signals + i);
    return across(own);
}

/* Back through the normalisation: gradients of the weights to `edge_grad`; returns that of tau but for the diagonal. */
static double weights_backward(const Worker *w, real tau) {
    const Graph *g = &w->graph;
    double grad_tau = 0;
    memset(w->node_grad, 0, g->nodes * sizeof(real));
    for (long edge = 0; edge < g->edges; edge++) {
        long i = g->first[edge], j = g->second[edge];
        real there = w->entry_grad[g->there[edge]], back = w->entry_grad[g->back[edge]], weight = w->weight[edge];
        real first = w->factor[i], second = w->factor[j], through;
        if (w->call->symmetric) {
            real both = there + back;
            through = both * first * second;
            w->node_grad[i] += both * weight * second;
            w->node_grad[j] += both * weight * first;
        } else {
            through = there * first + back * second;
            w->node_grad[i] += there * weight;
            w->node_grad[j] += back * weight;
        }
        grad_tau += through * weight;
        w->edge_grad[edge] = through;
    }
    for (long i = 0; i < g->nodes; i++) { /* of the factors, then of the degrees */
        real factor = w->factor[i], by_degree = w->call->symmetric ? factor * factor * factor / 2 : factor * factor;
        w->node_grad[i] = w->degree[i] <= (real)w->call->degree_floor ? 0 : -w->node_grad[i] * by_degree;
    }
    for (long edge = 0; edge < g->edges; edge++)
        w->edge_grad[edge] = tau * (w->edge_grad[edge] + w->node_grad[g->first[edge]] + w->node_grad[g->second[edge]]);
    return grad_tau;
}

/* Back through the kernels: twice the gradient of each distance to both of its entries in `entry_grad`. */
static void kernels_backward(const Worker *w, const real *values, real *grad_values) {
    const Graph *g = &w->graph;
    double sigma = values[SIGMA], sigma_f = values[SIGMA_F], grad_sigma = 0, grad_sigma_f = 0, grad_bias = 0;
    real similar = LN2 * slope(w, sigma), joined = LN2 * slope(w, sigma_f);
    memset(w->length_grad, 0, w->call->lengths * sizeof(double));
    for (long edge = 0; edge < g->edges; edge++) {
        long i = g->first[edge], j = g->second[edge];
        real distance = w->distance[edge];
        real similarity = w->similarity[edge] * (w->flows[i * g->pitch + j] + w->flows[j * g->pitch + i]);
        real weight = w->weight[edge] * w->edge_grad[edge];
        real grad = distance <= 0 ? 0 : similarity * similar + weight * joined; /* none where it is clamped */
        grad_sigma += similarity * distance;
        grad_sigma_f += weight * distance;
        grad_bias -= grad;
        w->length_grad[g->length[edge]] += w->unlike[edge] * w->edge_grad[edge];
        w->entry_grad[g->there[edge]] = w->entry_grad[g->back[edge]] = 2 * grad;
    }
    grad_values[SIGMA] = grad_sigma / (sigma * sigma * sigma);
    grad_values[SIGMA_F] = grad_sigma_f / (sigma_f * sigma_f * sigma_f);
    grad_values[NOISE] = grad_bias * 4 * w->feature_dimension * values[NOISE];
}

/* Back through the spatial weights. */
static void spatial_backward(const Worker *w, const real *values, real *grad_values) {
    double sigma_s = values[SIGMA_S], radius = values[RADIUS], grad_sigma_s = 0, grad_radius = 0;
    for (long u = 0; u < w->call->lengths; u++) {
        double length = w->call->distinct[u], grad = w->length_grad[u] * w->near[u], angle = PI * length / radius;
        grad_sigma_s += grad * w->cutoff[u] * length * length;
        if (!(length >= radius)) grad_radius += grad * sin(angle) * angle;
    }
    grad_values[SIGMA_S] = grad_sigma_s / (sigma_s * sigma_s * sigma_s);
    grad_values[RADIUS] = grad_radius / (2 * radius);
}

static void restore_backward(const Worker *w, long image) {
    const Call *q = w->call;
    const Graph *g = &w->graph;
    const real *values = q->values + image * VALUES;
    real tau = values[TAU], *grad_values = q->grad_values + image * VALUES;
    long pixels = q->height * q->width, steps = q->steps[image];
    read_image(w, image);
    cut_shares(&w->grid, q->grad + image * q->channels * pixels, q->channels, w->plane, w->restored, w->wide);
    weigh(w, values);
    const real *operator = smooth(w, tau, steps, steps + 1);
    scalar_products(w->restored, w->patches, w->dimension, w->wide, w->operator_grad, g->pitch, g->padded);
    double own = steps_backward(w, tau, steps, operator);
    grad_values[TAU] = weights_backward(w, tau) - own;
    kernels_backward(w, values, grad_values);
    spatial_backward(w, values, grad_values);
    if (q->grad_images) {
        multiply(operator, 1, g->pitch, g->nodes, w->restored, w->dimension, w->wide, w->grad_patches, g->padded);
        if (!q->guide) distances_backward(g, w->entry_grad, w->patches, w->dimension, w->wide, 1, w->grad_patches);
        fold(&w->grid, w->grad_patches, w->wide, q->channels, 0, q->grad_images + image * q->channels * pixels);
    }
    if (q->grad_guide) {
        distances_backward(g, w->entry_grad, w->features, w->feature_dimension, w->feature_wide, 0, w->grad_features);
        fold(&w->grid, w->grad_features, w->feature_wide, q->features, 0, q->grad_guide + image * q->features * pixels);
    }
}

static real *take_reals(char **memory, long count) { return (real *)take(memory, count * sizeof(real)); }

/* Takes what a thread needs for a task from the memory that is handed out. */
static void take_all(Worker *w, Task task, char **memory) {
    const Call *q = w->call;
    const Graph *g = &w->graph;
    long edges = round_up(g->edges, most(LANES, GROUP)), entries = round_up(g->entries, GROUP);
    long matrix = g->padded * g->pitch, steps = 0;
    for (long image = 0; image < q->batch; image++) steps = most(steps, q->steps[image]);
    w->plane = take_reals(memory, q->height * q->width);
    w->mean = take_reals(memory, q->channels);
    w->patches = take_reals(memory, g->padded * w->wide);
    w->features = q->guide ? take_reals(memory, g->padded * w->feature_wide) : w->patches;
    w->restored = take_reals(memory, g->padded * w->wide);
    w->near = (double *)take(memory, q->lengths * sizeof(double));
    w->cutoff = (double *)take(memory, q->lengths * sizeof(double));
    w->distance = take_reals(memory, edges);
    w->similarity = take_reals(memory, edges);
    w->unlike = take_reals(memory, edges);
    w->spatial = take_reals(memory, edges);
    w->weight = take_reals(memory, edges);
    w->degree = take_reals(memory, g->nodes);
    w->factor = take_reals(memory, g->nodes);
    w->share = take_reals(memory, g->nodes);
    w->lost = take_reals(memory, g->nodes);
    w->ahead = take_reals(memory, entries);
    w->behind = take_reals(memory, entries);
    w->signals = take_reals(memory, (task == RESTORE ? 2 : steps + 1) * matrix);
    if (task == RESTORE) return;
    w->flows = take_reals(memory, (steps + 1) * matrix);
    w->operator_grad = take_reals(memory, matrix);
    w->grad_patches = take_reals(memory, g->padded * w->wide);
    w->grad_features = take_reals(memory, q->guide ? g->padded * w->feature_wide : 0);
    w->entry_grad = take_reals(memory, entries);
    w->edge_grad = take_reals(memory, edges);
    w->node_grad = take_reals(memory, g->nodes);
    w->length_grad = (double *)take(memory, q->lengths * sizeof(double));
}

static void work(void *argument) {
    const Worker *w = argument;
    for (long image; (image = next_image(w->next)) < w->call->batch;)
        if (w->task == RESTORE) restore(w, image);
        else restore_backward(w, image);
}

/* Where in memory everything lies; returns the workers, of which there are `count`. With `measure` the memory, which
 * begins at null, is only counted. */
static Worker *set_out(const Call *q, Task task, long *next, char **memory, long count, int measure) {
    long nodes = q->rows * q->columns, padded = round_up(nodes, GROUP), area = q->patch * q->patch;
    Worker model = {.call = q, .task = task, .next = next, .dimension = q->channels * area};
    model.grid = (Grid){
        .height = q->height, .width = q->width, .patch = q->patch, .rows = q->rows, .columns = q->columns,
        .tops = q->tops, .lefts = q->lefts, .share = q->share,
    };
    model.graph = (Graph){
        .nodes = nodes, .edges = q->edges, .entries = q->entries, .padded = padded, .pitch = pitch_of(padded),
        .first = q->first, .second = q->second, .length = q->length, .there = q->there, .back = q->back,
        .start = q->start, .node = q->node, .neighbor = q->neighbor,
    };
    model.wide = pitch_of(model.dimension);
    model.feature_dimension = q->guide ? q->features * area : model.dimension;
    model.feature_wide = pitch_of(model.feature_dimension);
    Worker *workers = (Worker *)take(memory, count * sizeof(Worker));
    for (long rank = 0; rank < count; rank++) {
        take_all(&model, task, memory);
        if (!measure) workers[rank] = model;
    }
    return workers;
}

static long threads_of(const Call *q) { return most(1, least(q->threads, q->batch)); }

int64_t memory_needed(const Call *q, int64_t task) {
    char *end = 0;
    set_out(q, task, 0, &end, threads_of(q), 1);
    return end - (char *)0;
}

void run(const Call *q, int64_t task) {
    long next = 0, size;
    char *memory = q->memory;
    Worker *workers = set_out(q, task, &next, &memory, threads_of(q), 0);
    on_threads(work, (char *)workers, sizeof(Worker), threads_of(q), &size);
}
