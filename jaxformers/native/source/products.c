/* Products of few rows and matrices of weights, which take the time to read the weights.
 *
 *   rows    (r, i)      float32
 *   weights (i, o)      float32 or bfloat16, for `jaxformers_rows_times`
 *           (o, i)      float32, bfloat16, int8, or uint8 (o, i / 2) for two numbers in a byte, for
 *                       `jaxformers_rows_times_transpose`, with
 *   scale   (o, k)      float32; each of the k groups of consecutive inputs has one factor
 *   offset  (o, k)      float32, or of no elements: what is added to scale * integer
 *   result  (r, o)      float32
 *
 * The same rows may have several weights, whose results lie beside each other. All sums are
 * float32, and every weight is converted once for all rows. */
#include "common.h"

typedef enum { FLOAT32, BFLOAT16, INT8, INT4 } kind;

typedef struct {
  kind kind;
  int64_t r, i, o, k, stride; /* numbers from one row of the result to the next */
  const float *x, *scale, *offset;
  const void *w;
  float *y;
} product;

INLINE int size_of(kind kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

/* (o, i): inputs along the vectors. Memory is read faster in several places at once, so outputs that
 * lie far from each other are computed together. With AVX-512, where this was not tried, and with
 * groups, whose weights are scaled again for each few rows, it is one output after the other. */

#define AT_ONCE 4                   /* rows */
#define SUMS (LANES == 16 ? 16 : 8) /* vectors, by the number of registers */
#define PLACES 8                    /* in memory that are read at once for one row */

/* Returns whether outputs are computed together that lie far from each other. */
INLINE int in_places(int grouped) { return LANES < 16 && !grouped; }

/* Returns how many vectors of inputs are added apart. With groups and without AVX-512 the last digits
 * of a row's sums therefore depend on the number of rows. */
INLINE int chains_of(int grouped, int rows) {
  return in_places(grouped) ? 1 : rows * 4 > SUMS ? SUMS / rows : 4;
}

typedef vec tile_sums[PLACES][AT_ONCE]; /* of a place or a chain, and of a row */

/* Adds the products of `width` vectors of inputs, from c on, of which the last may have n inputs. The
 * weights of a place lie `apart` bytes after those of the place before. */
INLINE void add_inputs(kind kind, int grouped, int rows, int places, int width, const product *p,
                       const float *x, const char *w, int64_t apart, int64_t c, int64_t n, vec scale,
                       vec offset, tile_sums acc) {
  int size = size_of(kind);
  for (int a = 0; !in_places(grouped) && a < width * LANES * size; a += 64)
    ask_for(w + c * size + a);
  for (int a = 0; a < width; a++, c += LANES)
    for (int s = 0; s < places; s++) {
      vec y = numbers(size, w + s * apart + c * size, n);
      if (grouped) y = y * scale + offset;
      for (int b = 0; b < rows; b++) acc[s + a][b] += y * numbers(4, x + b * p->i + c, n);
    }
}

/* Adds the products of 32 inputs in four bits; x has the even ones before the odd ones. */
INLINE void add_halves(int rows, const product *p, const float *x, const char *w, int64_t c,
                       vec scale, vec offset, tile_sums acc) {
  ask_for(w + c / 2);
  for (int a = 0; a < 16; a += LANES) {
    vec low, high;
    load_int4(w + c / 2 + a, &low, &high);
    low = low * scale + offset, high = high * scale + offset;
    for (int b = 0; b < rows; b++) {
      acc[0][b] += low * load(x + b * p->i + c + a);
      acc[1][b] += high * load(x + b * p->i + c + a + 16);
    }
  }
}

/* Multiplies `rows` rows with outputs o, o + next and so on, one group of inputs after the other. */
INLINE void transposed_tile(kind kind, int grouped, int rows, int places, const product *p,
                            int64_t row, int64_t o, int64_t next) {
  tile_sums acc;
  vec scale = {0}, offset = {0};
  int chains = chains_of(grouped, rows);
  int64_t bytes = kind == INT4 ? p->i / 2 : p->i * size_of(kind), apart = next * bytes;
  const float *x = p->x + row * p->i;
  const char *w = (const char *)p->w + o * bytes;
  for (int a = 0; a < places * chains; a++)
    for (int b = 0; b < rows; b++) acc[a][b] = (vec){0};
  for (int64_t g = 0; g < p->k; g++) {
    int64_t c = g * (p->i / p->k), end = c + p->i / p->k;
    if (grouped) {
      scale = splat(p->scale[o * p->k + g]);
      offset = splat(p->offset ? p->offset[o * p->k + g] : 0);
    }
    if (kind == INT4) {
      for (; c < end; c += 32) add_halves(rows, p, x, w, c, scale, offset, acc);
      continue;
    }
    for (; c + chains * LANES <= end; c += chains * LANES)
      add_inputs(kind, grouped, rows, places, chains, p, x, w, apart, c, LANES, scale, offset, acc);
    for (; chains > 2 && c + 2 * LANES <= end; c += 2 * LANES)
      add_inputs(kind, grouped, rows, places, 2, p, x, w, apart, c, LANES, scale, offset, acc);
    for (; c < end; c += LANES)
      add_inputs(kind, grouped, rows, places, 1, p, x, w, apart, c, end - c, scale, offset, acc);
  }
  for (int s = 0; s < places; s++, o += next)
    for (int b = 0; b < rows; b++) {
      vec all = acc[s][b];
      for (int a = 1; a < chains; a++) all += acc[s + a][b];
      p->y[(row + b) * p->stride + o] = sum(all) * (kind == INT8 && !grouped ? p->scale[o] : 1);
    }
}

/* Multiplies all rows with these outputs. */
INLINE void transposed_tiles(kind kind, int grouped, int places, const product *p, int64_t o,
                             int64_t next) {
  int64_t row = 0;
  for (; !in_places(grouped) && row + AT_ONCE <= p->r; row += AT_ONCE)
    transposed_tile(kind, grouped, AT_ONCE, places, p, row, o, next);
  for (; places < PLACES && row + 2 <= p->r; row += 2)
    transposed_tile(kind, grouped, 2, places, p, row, o, next);
  if (row < p->r) transposed_tile(kind, grouped, 1, places, p, row, o, next);
}

/* Divides the outputs into as many ranges as places; what is left over comes after them. */
INLINE void transposed_ranges(kind kind, int grouped, int places, const product *p, int64_t o,
                              int64_t end) {
  int64_t next = (end - o) / places, last = o + next;
  for (; o < last; o++) transposed_tiles(kind, grouped, places, p, o, next);
  for (o += (places - 1) * next; o < end; o++) transposed_tiles(kind, grouped, 1, p, o, 0);
}

INLINE void transposed_chunk(kind kind, int grouped, const product *p, int64_t o, int64_t end) {
  if (in_places(grouped) && p->r == 1)
    transposed_ranges(kind, grouped, PLACES, p, o, end);
  else
    transposed_ranges(kind, grouped, in_places(grouped) ? PLACES / 2 : 1, p, o, end);
}

static void transposed_outputs(const product *p, int64_t o, int64_t end) {
  if (p->kind == FLOAT32) transposed_chunk(FLOAT32, 0, p, o, end);
  if (p->kind == BFLOAT16) transposed_chunk(BFLOAT16, 0, p, o, end);
  if (p->kind == INT8 && p->k == 1 && !p->offset) transposed_chunk(INT8, 0, p, o, end);
  if (p->kind == INT8 && (p->k > 1 || p->offset)) transposed_chunk(INT8, 1, p, o, end);
  if (p->kind == INT4) transposed_chunk(INT4, 1, p, o, end);
}

/* (i, o): outputs along the vectors. Sixteen rows of weights are read beside each other, and their
 * sums are added to the result, of which a chunk lies in the nearest cache. */

#define INPUTS 16
#define LINE 16                        /* outputs at a time: a line of the cache in float32 */
#define TOGETHER (LANES == 16 ? 8 : 4) /* rows, for each of which there is a line of sums */

/* Adds the products of inputs c, c + step and so on for n outputs of a line, from o on. For the first
 * rows it asks for weights that are read later, which lie `later` numbers after these. */
INLINE void plain_line(kind kind, int rows, int inputs, const product *p, int64_t row, int64_t c,
                       int64_t step, int64_t o, int64_t n, int64_t later) {
  int size = size_of(kind);
  const float *x = p->x + row * p->i + c;
  const char *w = (const char *)p->w + (c * p->o + o) * size;
  float *y = p->y + row * p->stride + o;
  vec sums[TOGETHER][LINE / LANES];
  for (int b = 0; b < rows; b++)
    for (int v = 0; v < LINE / LANES; v++)
      sums[b][v] = numbers(4, y + b * p->stride + v * LANES, c == 0 ? 0 : n - v * LANES);
  for (int a = 0; a < inputs; a++, w += step * p->o * size) {
    vec weights[LINE / LANES];
    for (int v = 0; v < LINE / LANES; v++)
      weights[v] = numbers(size, w + v * LANES * size, n - v * LANES);
    if (later && row == 0 && o * size % 64 == 0) __builtin_prefetch(w + later * size);
    for (int b = 0; b < rows; b++)
      for (int v = 0; v < LINE / LANES; v++) sums[b][v] += weights[v] * x[b * p->i + a * step];
  }
  for (int b = 0; b < rows; b++)
    for (int v = 0; v < LINE / LANES; v++)
      store_some(y + b * p->stride + v * LANES, sums[b][v], n - v * LANES);
}

INLINE void plain_lines(kind kind, int inputs, const product *p, int64_t c, int64_t o, int64_t n,
                        int64_t later) {
  int64_t row = 0;
  for (; row + TOGETHER <= p->r; row += TOGETHER)
    plain_line(kind, TOGETHER, inputs, p, row, c, 1, o, n, later);
  for (; row + 4 <= p->r; row += 4) plain_line(kind, 4, inputs, p, row, c, 1, o, n, later);
  for (; row + 2 <= p->r; row += 2) plain_line(kind, 2, inputs, p, row, c, 1, o, n, later);
  if (row < p->r) plain_line(kind, 1, inputs, p, row, c, 1, o, n, later);
}

INLINE void plain_inputs(kind kind, int inputs, const product *p, int64_t c, int64_t o,
                         int64_t end) {
  /* Weights that are asked for lie further on in the row, and in the row after INPUTS others when this
   * one ends. With AVX-512 it is always the latter. */
  int64_t width = end - o, next = INPUTS * p->o, far = LANES == 16 ? width : 64;
  for (; o + LINE <= end; o += LINE)
    plain_lines(kind, inputs, p, c, o, LINE, o + far < end ? far : next + far - width);
  if (o < end) plain_lines(kind, inputs, p, c, o, end - o, next);
}

INLINE void plain_chunk(kind kind, const product *p, int64_t o, int64_t end) {
  int64_t c = 0;
  for (; c + INPUTS <= p->i; c += INPUTS) plain_inputs(kind, INPUTS, p, c, o, end);
  for (; c < p->i; c++) plain_inputs(kind, 1, p, c, o, end);
}

static void plain_outputs(const product *p, int64_t o, int64_t end) {
  if (p->kind == FLOAT32)
    plain_chunk(FLOAT32, p, o, end);
  else
    plain_chunk(BFLOAT16, p, o, end);
}

/* One row and weights (i, o). Without AVX-512 the threads do not divide the outputs but the inputs, in
 * blocks, whose sums are added up in the end: memory is read faster in several places at once, in each
 * of them without gaps. How the inputs are divided depends on their number alone. */

#define BLOCKS 8

INLINE void plain_block(kind kind, const product *p) {
  int64_t step = p->i / PLACES, c = 0, o;
  for (; c < step; c++) {
    for (o = 0; o + LINE <= p->o; o += LINE)
      plain_line(kind, 1, PLACES, p, 0, c, step, o, LINE, 0);
    if (o < p->o) plain_line(kind, 1, PLACES, p, 0, c, step, o, p->o - o, 0);
  }
  for (c *= PLACES; c < p->i; c++)
    for (o = 0; o < p->o; o += LINE) plain_line(kind, 1, 1, p, 0, c, 1, o, p->o - o, 0);
}

#define MOST_WEIGHTS 8

typedef struct {
  void (*run)(const product *p, int64_t o, int64_t end);
  int n;
  int64_t bytes; /* of all weights */
  int64_t chunk; /* outputs of a task, which may be those of several weights */
  float *sums;   /* (BLOCKS, outputs), where tasks are blocks of inputs */
  product parts[MOST_WEIGHTS];
} products;

static void products_task(const void *arguments, int64_t task) {
  const products *all = arguments;
  int64_t start = task * all->chunk, end = start + all->chunk;
  for (const product *p = all->parts; p < all->parts + all->n; p++) {
    if (start < p->o && end > 0) all->run(p, start > 0 ? start : 0, end < p->o ? end : p->o);
    start -= p->o, end -= p->o;
  }
}

/* Adds a product of the rows with a matrix, beside those before. */
static product *add_product(products *all, const XLA_FFI_Buffer *x, const XLA_FFI_Buffer *w,
                            kind type, int64_t outputs) {
  product *p = all->parts + all->n++;
  int64_t bits = type == FLOAT32 ? 32 : type == BFLOAT16 ? 16 : type == INT8 ? 8 : 4;
  *p = (product){.kind = type, .r = x->dims[0], .i = x->dims[1], .o = outputs, .k = 1};
  p->x = x->data, p->w = w->data;
  all->bytes += p->i * outputs * bits / 8;
  return p;
}

/* Runs products in `parts` chunks of outputs for each thread, of at most `most` outputs. */
static void run_products(XLA_FFI_CallFrame *frame, products *all, int64_t parts, int64_t most) {
  XLA_FFI_Buffer *y = result(frame, 0);
  int64_t outputs = y->dims[1], rows = y->dims[0];
  if (all->parts[0].i == 0) memset(y->data, 0, rows * outputs * sizeof(float));
  if (rows * outputs * all->parts[0].i == 0) return;
  float *beside = y->data;
  for (product *p = all->parts; p < all->parts + all->n; beside += p->o, p++)
    p->y = beside, p->stride = outputs;
  int64_t threads = threads_for(frame, (double)all->bytes), chunk = outputs;
  if (threads > 1) chunk = (outputs + parts * threads - 1) / (parts * threads);
  chunk = (chunk < most ? chunk : most) + LINE - 1;
  all->chunk = chunk / LINE * LINE;
  run_tasks(frame, products_task, all, (outputs + all->chunk - 1) / all->chunk, threads);
}

/* Adds up the products of one block of inputs with all weights. */
static void block_task(const void *arguments, int64_t block) {
  const products *all = arguments;
  const product *last = all->parts + all->n - 1;
  int64_t start = last->i * block / BLOCKS, end = last->i * (block + 1) / BLOCKS;
  float *sums = all->sums + block * last->stride;
  for (const product *p = all->parts; p <= last; sums += p->o, p++) {
    product q = *p;
    q.x += start, q.i = end - start, q.y = sums;
    q.w = (const char *)p->w + start * p->o * size_of(p->kind);
    if (p->kind == FLOAT32)
      plain_block(FLOAT32, &q);
    else
      plain_block(BFLOAT16, &q);
  }
}

/* Runs products of one row with weights (i, o) in blocks of inputs; returns whether it did. */
static int run_blocks(XLA_FFI_CallFrame *frame, products *all) {
  XLA_FFI_Buffer *y = result(frame, 0);
  int64_t outputs = y->dims[1];
  float *to = y->data;
  if (LANES == 16 || y->dims[0] != 1 || outputs < 1 || outputs > 8192 ||
      all->parts[0].i < BLOCKS * PLACES || !(all->sums = malloc(BLOCKS * outputs * sizeof(float))))
    return 0;
  for (int n = 0; n < all->n; n++) all->parts[n].stride = outputs;
  run_tasks(frame, block_task, all, BLOCKS, threads_for(frame, (double)all->bytes));
  for (int64_t o = 0; o < outputs; o += LANES) {
    vec sum = {0};
    for (int block = 0; block < BLOCKS; block++)
      sum += numbers(4, all->sums + block * outputs + o, outputs - o);
    store_some(to + o, sum, outputs - o);
  }
  free(all->sums);
  return 1;
}

/* Returns whether there are rows, a result, and weights with `each` arrays. */
static int are_products(const XLA_FFI_CallFrame *frame, int64_t each) {
  int64_t weights = frame->args.size - 1;
  return weights > 0 && weights % each == 0 && weights / each <= MOST_WEIGHTS &&
         frame->rets.size == 1;
}

static int are_rows(const XLA_FFI_Buffer *x, const XLA_FFI_Buffer *y) {
  return is(x, XLA_FFI_DataType_F32, 2) && is(y, XLA_FFI_DataType_F32, 2) &&
         y->dims[0] == x->dims[0];
}

static int have_outputs(const products *all, const XLA_FFI_Buffer *y) {
  int64_t outputs = 0;
  for (int i = 0; i < all->n; i++) outputs += all->parts[i].o;
  return outputs == y->dims[1];
}

XLA_FFI_Error *jaxformers_rows_times(XLA_FFI_CallFrame *frame) {
  if (answers_query(frame)) return NULL;
  if (!are_products(frame, 1)) return refuse(frame, "rows_times takes rows and up to eight weights");
  XLA_FFI_Buffer *x = argument(frame, 0), *y = result(frame, 0);
  products all = {.run = plain_outputs};
  if (!are_rows(x, y)) return refuse(frame, "rows_times takes rows in float32");
  for (int n = 1; n < frame->args.size; n++) {
    XLA_FFI_Buffer *w = argument(frame, n);
    int wide = is(w, XLA_FFI_DataType_F32, 2);
    if (!wide && !is(w, XLA_FFI_DataType_BF16, 2))
      return refuse(frame, "rows_times takes weights in float32 or bfloat16");
    if (w->dims[0] != x->dims[1])
      return refuse(frame, "the shapes of rows_times' arguments do not fit together");
    add_product(&all, x, w, wide ? FLOAT32 : BFLOAT16, w->dims[1]);
  }
  if (!have_outputs(&all, y))
    return refuse(frame, "the shapes of rows_times' arguments do not fit together");
  if (run_blocks(frame, &all)) return NULL;
  /* Long chunks are read fast, and the sums of short ones stay near: 32 KiB of them. */
  int64_t rows = x->dims[0] < 1 ? 1 : x->dims[0] < 8 ? x->dims[0] : 8;
  run_products(frame, &all, 1, 8192 / rows);
  return NULL;
}

/* Copies rows with the 16 even inputs of each 32 before the 16 odd ones. */
static float *split_pairs(const product *p) {
  float *x = malloc(p->r * p->i * sizeof(float) + 1);
  for (int64_t c = 0; x && c < p->r * p->i; c++)
    x[c / 32 * 32 + c % 2 * 16 + c % 32 / 2] = p->x[c];
  return x;
}

XLA_FFI_Error *jaxformers_rows_times_transpose(XLA_FFI_CallFrame *frame) {
  if (answers_query(frame)) return NULL;
  if (!are_products(frame, 3))
    return refuse(frame,
                  "rows_times_transpose takes rows and up to eight weights, scales and offsets");
  XLA_FFI_Buffer *x = argument(frame, 0), *y = result(frame, 0);
  products all = {.run = transposed_outputs};
  float *pairs = NULL;
  if (!are_rows(x, y)) return refuse(frame, "rows_times_transpose takes rows in float32");
  for (int n = 1; n < frame->args.size; n += 3) {
    XLA_FFI_Buffer *w = argument(frame, n), *scale = argument(frame, n + 1);
    XLA_FFI_Buffer *offset = argument(frame, n + 2);
    kind type;
    switch (w->dtype) {
      case XLA_FFI_DataType_F32: type = FLOAT32; break;
      case XLA_FFI_DataType_BF16: type = BFLOAT16; break;
      case XLA_FFI_DataType_S8: type = INT8; break;
      case XLA_FFI_DataType_U8: type = INT4; break;
      default: return refuse(frame, "rows_times_transpose does not take weights of this type");
    }
    if (w->rank != 2 || !is(scale, XLA_FFI_DataType_F32, 2) ||
        !is(offset, XLA_FFI_DataType_F32, 2))
      return refuse(frame, "rows_times_transpose takes matrices, and scales in float32");
    int64_t i = x->dims[1], o = w->dims[0], k = scale->dims[1];
    int64_t multiple = type == INT4 ? 32 : k > 1 ? 16 : 1, added = offset->dims[1];
    int integers = type == INT8 || type == INT4;
    if (w->dims[1] != (type == INT4 ? i / 2 : i) ||
        (integers && (scale->dims[0] != o || k < 1 || i % k || i / k % multiple)) ||
        (added && (offset->dims[0] != o || added != k)))
      return refuse(frame, "the shapes of rows_times_transpose's arguments do not fit together");
    product *p = add_product(&all, x, w, type, o);
    if (integers) p->k = k, p->scale = scale->data, p->offset = added ? offset->data : NULL;
  }
  if (!have_outputs(&all, y))
    return refuse(frame, "the shapes of rows_times_transpose's arguments do not fit together");
  for (int n = 0; n < all.n; n++) {
    if (all.parts[n].kind != INT4) continue;
    if (!pairs && !(pairs = split_pairs(all.parts)))
      return refuse(frame, "rows_times_transpose has no memory left");
    all.parts[n].x = pairs;
  }
  run_products(frame, &all, 4, y->dims[1]);
  free(pairs);
  return NULL;
}
