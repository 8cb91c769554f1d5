/* Attention of few queries to many keys, of which one row of a cache is one.
 *
 *   queries (b, n, t, h), keys (b, g, s, h), values (b, g, s, j)    float32 or bfloat16
 *   allowed (b or 1, n or 1, t or 1, s)                              booleans
 *   bias    (b or 1, n or 1, t or 1, s)                              float32, or of no elements
 *   result  (b, n, t, j)                                             the type of the queries
 *
 * Keys and values may lack axes of size 1, as loops carry them, so `heads` says what g is.
 *
 * All sums are float32. Keys are read in blocks, and blocks that no query may attend to are not
 * read at all. Each block gives sums relative to its own largest score, which are added at the end
 * (Dao et al. 2023, Flash-Decoding). How the keys are divided depends on s alone, so the result
 * depends neither on the number of threads nor on the other rows of the batch. */
#include "common.h"

#define BLOCK 512                  /* keys at a time, a multiple of 16 */
#define ROWS (LANES == 16 ? 4 : 3) /* queries at a time, by the number of registers */
#define MOST 512                   /* the most features of a head */

typedef struct {
  XLA_FFI_DataType type;
  int64_t b, n, t, h, g, s, j, blocks;
  const void *q, *k, *v;
  const uint8_t *allowed;
  const float *bias;
  int64_t allowed_dims[3], bias_dims[3]; /* of b, n and t; 1 stands for all */
  float softcap;
  float *sums; /* (b, n, t, blocks, j + 2): weighted values, total weight, largest score */
  void *result;
} attention;

/* Returns the numbers that belong to one query: of all keys, or of none. */
INLINE const void *row_of(const void *x, size_t size, const int64_t *dims, const attention *a,
                          int64_t b, int64_t n, int64_t t) {
  int64_t i = dims[0] == 1 ? 0 : b;
  i = i * dims[1] + (dims[1] == 1 ? 0 : n);
  i = i * dims[2] + (dims[2] == 1 ? 0 : t);
  return (const char *)x + i * a->s * size;
}

/* exp(x) for x <= 0, to about one unit in the last place; 0 far below. A polynomial of degree 5
 * on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes' expf, Moshier 1992). */
INLINE vec exponential(vec x) {
  const vec low = splat(-87.0f);
  ivec tiny = x < low;
  x = (vec)(((ivec)x & ~tiny) | ((ivec)low & tiny));
  vec shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2**23 rounds to integers */
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return (vec)((ivec)(p * (vec)power) & ~tiny);
}

/* Computes the scores of `rows` queries with `keys` keys from i on: with four, or with one. */
INLINE void scores_with(int bf16, int rows, int keys, const attention *a, const float *q,
                        int64_t width, const char *k, int64_t i, float scores[ROWS][BLOCK]) {
  int size = bf16 ? 2 : 4;
  vec acc[ROWS][4];
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < keys; b++) acc[r][b] = (vec){0};
  for (int64_t c = 0; c < width; c += LANES)
    for (int b = 0; b < keys; b++) {
      const char *key = k + (i + b) * a->h * size;
      if (c * size % 64 == 0) ask_for(key + c * size);
      vec x = numbers(size, key + c * size, a->h - c);
      for (int r = 0; r < rows; r++) acc[r][b] += x * load(q + r * width + c);
    }
  for (int r = 0; r < rows; r++) {
    if (keys == 4)
      store_sums(scores[r] + i, acc[r]);
    else
      scores[r][i] = sum(acc[r][0]);
  }
}

/* Computes the scores of `rows` queries with the keys from `first` to `last` of a block, and asks
 * for their values. */
INLINE void scores_of(int bf16, int rows, const attention *a, const float *q, int64_t width,
                      const char *k, const char *v, int64_t first, int64_t last,
                      float scores[ROWS][BLOCK]) {
  int64_t size = bf16 ? 2 : 4, i = first;
  for (; i + 4 <= last; i += 4) {
    for (int64_t c = 0; c < 4 * a->j * size; c += 64)
      __builtin_prefetch(v + i * a->j * size + c, 0, 2);
    scores_with(bf16, rows, 4, a, q, width, k, i, scores);
  }
  for (; i < last; i++) scores_with(bf16, rows, 1, a, q, width, k, i, scores);
}

/* Adds up the values from `first` to `last` of a block, with the weights of `rows` queries. */
INLINE void mix(int bf16, int rows, const attention *a, const char *v, int64_t first,
                int64_t last, float weights[ROWS][BLOCK], float *sums[ROWS]) {
  int size = bf16 ? 2 : 4;
  for (int64_t c = 0; c < a->j; c += 2 * LANES) {
    vec acc[ROWS][2];
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (vec){0};
    for (int64_t i = first; i < last; i++) {
      const char *value = v + (i * a->j + c) * size;
      vec x = numbers(size, value, a->j - c);
      vec y = numbers(size, value + LANES * size, a->j - c - LANES);
      for (int r = 0; r < rows; r++) {
        acc[r][0] += x * weights[r][i];
        acc[r][1] += y * weights[r][i];
      }
    }
    for (int r = 0; r < rows; r++) {
      store_some(sums[r] + c, acc[r][0], a->j - c);
      store_some(sums[r] + c + LANES, acc[r][1], a->j - c - LANES);
    }
  }
}

/* Turns the scores of one query into weights; gives their total and the largest score. Whole vectors
 * are weighed, and those of their numbers that are no scores count as hidden. */
INLINE void weigh(const attention *a, const uint8_t *allowed, const float *bias, int64_t first,
                  int64_t last, float *scores, float *total, float *top) {
  const vec none = splat(-INFINITY);
  vec highest = none, sums = {0};
  ivec broken = {0};
  first = first / LANES * LANES;
  for (int64_t i = first; i < last; i += LANES) {
    int64_t n = last - i;
    vec x = load(scores + i);
    if (a->softcap > 0)
      for (int c = 0; c < LANES; c++) x[c] = a->softcap * tanhf(x[c] / a->softcap);
    if (bias) x += numbers(4, bias + i, n);
    ivec seen = numbers(1, allowed + i, n) != 0;
    broken |= seen & (x != x);
    x = (vec)(((ivec)x & seen) | ((ivec)none & ~seen));
    store(scores + i, x);
    ivec more = x > highest;
    highest = (vec)(((ivec)x & more) | ((ivec)highest & ~more));
  }
  float largest = -INFINITY;
  int any = 0;
  for (int c = 0; c < LANES; c++) {
    largest = highest[c] > largest ? highest[c] : largest;
    any |= broken[c];
  }
  any |= largest == INFINITY; /* infinity - infinity is NaN */
  float around = largest == -INFINITY ? 0 : largest;
  for (int64_t i = first; i < last; i += LANES) {
    vec x = exponential(load(scores + i) - around);
    store(scores + i, x);
    sums += x;
  }
  *total = any ? NAN : sum(sums);
  *top = largest;
}

INLINE void attend_block(int bf16, const attention *a, int64_t b, int64_t g, int64_t block) {
  int64_t size = bf16 ? 2 : 4, start = block * BLOCK, group = a->n / a->g * a->t;
  int64_t keys = a->s - start < BLOCK ? a->s - start : BLOCK;
  int64_t width = (a->h + LANES - 1) / LANES * LANES;
  const char *k = (const char *)a->k + ((b * a->g + g) * a->s + start) * a->h * size;
  const char *v = (const char *)a->v + ((b * a->g + g) * a->s + start) * a->j * size;
  float q[ROWS * MOST], scores[ROWS][BLOCK], scale = 1 / sqrtf((float)a->h);
  for (int64_t from = 0; from < group; from += ROWS) {
    int rows = group - from < ROWS ? (int)(group - from) : ROWS;
    const uint8_t *allowed[ROWS];
    float *sums[ROWS];
    int64_t first = keys, last = 0;
    for (int r = 0; r < rows; r++) {
      int64_t n = g * (a->n / a->g) + (from + r) / a->t, t = (from + r) % a->t;
      int64_t query = (b * a->n + n) * a->t + t, i = 0, end = keys;
      allowed[r] = row_of(a->allowed, 1, a->allowed_dims, a, b, n, t);
      allowed[r] += start;
      sums[r] = a->sums + (query * a->blocks + block) * (a->j + 2);
      while (i < end && !allowed[r][i]) i++;
      while (end > i && !allowed[r][end - 1]) end--;
      if (i < end) first = i < first ? i : first, last = end > last ? end : last;
      const char *x = (const char *)a->q + query * a->h * size;
      for (int64_t c = 0; c < width; c++) {
        float y = c >= a->h ? 0 : bf16 ? from_bf16(((const uint16_t *)x)[c]) : ((const float *)x)[c];
        q[r * width + c] = y * scale;
      }
    }
    if (first >= last) {
      for (int r = 0; r < rows; r++) {
        memset(sums[r], 0, (a->j + 1) * sizeof(float));
        sums[r][a->j + 1] = -INFINITY;
      }
      continue;
    }
    if (rows == 1)
      scores_of(bf16, 1, a, q, width, k, v, first, last, scores);
    else if (rows == 2)
      scores_of(bf16, 2, a, q, width, k, v, first, last, scores);
    else if (rows == 3)
      scores_of(bf16, 3, a, q, width, k, v, first, last, scores);
    else
      scores_of(bf16, ROWS, a, q, width, k, v, first, last, scores);
    for (int r = 0; r < rows; r++) {
      int64_t n = g * (a->n / a->g) + (from + r) / a->t, t = (from + r) % a->t;
      const float *bias = a->bias ? row_of(a->bias, 4, a->bias_dims, a, b, n, t) : NULL;
      weigh(a, allowed[r], bias ? bias + start : NULL, first, last, scores[r], &sums[r][a->j],
            &sums[r][a->j + 1]);
    }
    if (rows == 1)
      mix(bf16, 1, a, v, first, last, scores, sums);
    else if (rows == 2)
      mix(bf16, 2, a, v, first, last, scores, sums);
    else if (rows == 3)
      mix(bf16, 3, a, v, first, last, scores, sums);
    else
      mix(bf16, ROWS, a, v, first, last, scores, sums);
  }
}

static void attend_task(const void *arguments, int64_t task) {
  const attention *a = arguments;
  int64_t block = task % a->blocks, g = task / a->blocks % a->g, b = task / a->blocks / a->g;
  if (a->type == XLA_FFI_DataType_BF16)
    attend_block(1, a, b, g, block);
  else
    attend_block(0, a, b, g, block);
}

/* Adds up the sums of the blocks of each query, and divides by the total weight. */
static void finish(const attention *a) {
  int64_t j = a->j;
  for (int64_t query = 0; query < a->b * a->n * a->t; query++) {
    float *sums = a->sums + query * a->blocks * (j + 2), top = -INFINITY;
    for (int64_t i = 0; i < a->blocks; i++) {
      float x = sums[i * (j + 2) + j + 1];
      top = x > top ? x : top;
    }
    for (int64_t i = 0; i < a->blocks && a->blocks > 1; i++) {
      float *block = sums + i * (j + 2), factor = expf(block[j + 1] - top);
      if (block[j + 1] == -INFINITY) factor = 0;
      for (int64_t c = 0; c <= j; c++) {
        float x = factor == 0 && block[j] == block[j] ? 0 : factor * block[c];
        sums[c] = i ? sums[c] + x : x;
      }
    }
    for (int64_t c = 0; c < j; c++) { /* without any key the weights are 0 */
      float y = sums[j] == 0 ? 0 : sums[c] / sums[j];
      if (a->type == XLA_FFI_DataType_BF16)
        ((uint16_t *)a->result)[query * j + c] = to_bf16(y);
      else
        ((float *)a->result)[query * j + c] = y;
    }
  }
}

/* Returns whether an array (x, y, z, s) fits these scores, with 1 for all along the first three. */
static int fits(const XLA_FFI_Buffer *x, const attention *a, int64_t dims[3]) {
  const int64_t want[3] = {a->b, a->n, a->t};
  for (int i = 0; i < 3; i++) {
    dims[i] = x->dims[i];
    if (dims[i] != want[i] && dims[i] != 1) return 0;
  }
  return x->dims[3] == a->s;
}

static int64_t elements(const XLA_FFI_Buffer *x) {
  int64_t n = 1;
  for (int64_t i = 0; i < x->rank; i++) n *= x->dims[i];
  return n;
}

XLA_FFI_Error *jaxformers_attend(XLA_FFI_CallFrame *frame) {
  if (answers_query(frame)) return NULL;
  if (frame->args.size != 5 || frame->rets.size != 1)
    return refuse(frame, "attend takes queries, keys, values, booleans and a bias");
  XLA_FFI_Buffer *q = argument(frame, 0), *k = argument(frame, 1), *v = argument(frame, 2);
  XLA_FFI_Buffer *allowed = argument(frame, 3), *bias = argument(frame, 4), *y = result(frame, 0);
  const float *softcap = attribute(frame, "softcap", XLA_FFI_DataType_F32);
  const int64_t *heads = attribute(frame, "heads", XLA_FFI_DataType_S64);
  if (!softcap || !heads) return refuse(frame, "attend needs the attributes softcap and heads");
  attention a = {.type = q->dtype, .softcap = *softcap, .g = *heads};
  if ((a.type != XLA_FFI_DataType_F32 && a.type != XLA_FFI_DataType_BF16) ||
      !is(q, a.type, 4) || k->dtype != a.type || v->dtype != a.type || !is(y, a.type, 4) ||
      !is(allowed, XLA_FFI_DataType_PRED, 4) || !is(bias, XLA_FFI_DataType_F32, 4))
    return refuse(frame, "attend takes arrays of four axes in float32 or in bfloat16");
  a.b = q->dims[0], a.n = q->dims[1], a.t = q->dims[2], a.h = q->dims[3];
  a.s = allowed->dims[3], a.j = y->dims[3];
  a.q = q->data, a.k = k->data, a.v = v->data, a.allowed = allowed->data, a.result = y->data;
  a.blocks = (a.s + BLOCK - 1) / BLOCK;
  int biased = bias->dims[3] > 0;
  a.bias = biased ? bias->data : NULL;
  if (a.g < 1 || a.n % a.g || a.h < 1 || a.h > MOST || a.s < 1 ||
      elements(k) != a.b * a.g * a.s * a.h || elements(v) != a.b * a.g * a.s * a.j ||
      y->dims[0] != a.b || y->dims[1] != a.n || y->dims[2] != a.t ||
      !fits(allowed, &a, a.allowed_dims) || (biased && !fits(bias, &a, a.bias_dims)))
    return refuse(frame, "the shapes of attend's arguments do not fit together");
  int64_t queries = a.b * a.n * a.t;
  if (queries * a.j == 0) return NULL;
  a.sums = malloc(queries * a.blocks * (a.j + 2) * sizeof(float));
  if (!a.sums) return refuse(frame, "attend has no memory left");
  double cost = (double)queries * a.s * (a.h + a.j); /* a multiplication is about a byte of L2 */
  run_tasks(frame, attend_task, &a, a.b * a.g * a.blocks, threads_for(frame, cost));
  finish(&a);
  free(a.sums);
  return NULL;
}
