/* Products of b pairs of matrices, by the matrix units of processors that have them (AMX).
 *
 *   left     (b, m, k), or (b, k, m) if `left` is 1     float32 or bfloat16
 *   right    (b, k, n), or (b, n, k) if `right` is 1    float32, bfloat16 or int8
 *   result   (b, m, n)                                  float32
 *   scratch  bytes, as many as the smaller matrices need when packed
 *
 * The units multiply numbers in bfloat16 and add the products in float32. A number in float32 is
 * the sum of three numbers in bfloat16, without a rest, and one in int8 is a bfloat16. Of the nine
 * products of two such sums the three smallest are left out, which lie below the last digit of
 * float32.
 *
 * Both matrices of a pair are packed in strips of 32 rows of `left` or columns of `right`. Each
 * task packs a block of the larger one, which stays in the cache of its thread, and multiplies it
 * with all of the smaller one. That is packed before, in the scratch; small ones of many pairs are
 * packed by each task. */
#include "common.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 1024 /* the bytes of a tile: 16 rows of 16 pairs of bfloat16 */
#define SIDE 32   /* the rows of a strip, and the inputs of a step */
#define MOST_INPUTS 1024
#define STRIPS 4              /* strips of the smaller matrix that are packed in one task */
#define BLOCK_BYTES (1 << 20) /* bytes of a packed block, which leave room in a cache of 2 MiB */

typedef struct {
  const char *data;
  int64_t outer;   /* rows of `left`, or columns of `right` */
  int64_t stride;  /* numbers from one row in memory to the next */
  int64_t numbers; /* in one matrix */
  int size, right;
  int across; /* whether numbers beside each other in memory have the same k */
} matrix;

typedef struct {
  matrix whole, parts;
  int64_t m, n, k, start, steps; /* SIDE * steps inputs are taken at a time, from `start` on */
  int64_t block, blocks;         /* strips of `parts` in a task, and tasks of a pair */
  float *y;
  char *packed; /* all of `whole`, or NULL if tasks pack it */
} matmul;

static _Thread_local _Alignas(64) char own[BLOCK_BYTES];

static int64_t strips_of(int64_t outer) { return (outer + SIDE - 1) / SIDE; }
static int64_t tasks_of(int64_t strips) { return (strips + STRIPS - 1) / STRIPS; }
INLINE int planes_of(const matrix *x) { return x->size == 4 ? 3 : 1; }
static int64_t strip_bytes(const matmul *p, const matrix *x) {
  return p->steps * planes_of(x) * 2 * TILE;
}

/* Returns n numbers of a row from a column on, and zeros after them. */
INLINE vec numbers_of(int size, const matrix *x, int64_t row, int64_t column, int64_t n) {
  return numbers(size, x->data + (row * x->stride + column) * size, n);
}

/* Returns pairs of the upper halves of numbers, and takes these halves from the numbers. */
INLINE ivec take_pairs(vec *first, vec *second) {
  ivec a = (ivec)*first & (int32_t)0xffff0000, b = (ivec)*second & (int32_t)0xffff0000;
  *first -= (vec)a, *second -= (vec)b;
  return b | (ivec)_mm512_srli_epi32((__m512i)a, 16);
}

/* Transposes squares of 2 * s numbers by an exchange of their quarters. */
INLINE void exchange(ivec x[LANES], int s) {
  ivec lower, upper;
  for (int j = 0; j < LANES; j++) {
    lower[j] = j & s ? LANES + (j ^ s) : j;
    upper[j] = j & s ? LANES + j : j ^ s;
  }
  for (int i = 0; i < LANES; i++) {
    if (i & s) continue;
    __m512i a = (__m512i)x[i], b = (__m512i)x[i | s];
    x[i] = (ivec)_mm512_permutex2var_epi32(a, (__m512i)lower, b);
    x[i | s] = (ivec)_mm512_permutex2var_epi32(a, (__m512i)upper, b);
  }
}

/* Packs 16 rows or columns of 32 inputs in one tile per plane. Input j is paired with j + 16. */
INLINE void pack_tile(int size, int planes, int across, int turned, const matrix *x, int64_t outer,
                      int64_t k, int64_t end, char *tile) {
  ivec tiles[3][LANES];
  int64_t width = x->outer - outer;
  for (int i = 0; i < LANES; i++) {
    vec first, second;
    int64_t row = across ? k + i + SIDE : outer + i, column = across ? outer : k + SIDE;
    const char *next = x->data + (row * x->stride + column) * size;
    __builtin_prefetch(next);
    __builtin_prefetch(next + LANES * size * (across ? x->stride : 1));
    if (across) {
      first = numbers_of(size, x, k + i, outer, k + i < end ? width : 0);
      second = numbers_of(size, x, k + i + LANES, outer, k + i + LANES < end ? width : 0);
    } else {
      first = numbers_of(size, x, outer + i, k, i < width ? end - k : 0);
      second = numbers_of(size, x, outer + i, k + LANES, i < width ? end - k - LANES : 0);
    }
    for (int plane = 0; plane < planes; plane++) tiles[plane][i] = take_pairs(&first, &second);
  }
  for (int plane = 0; plane < planes; plane++) {
    if (turned) {
      exchange(tiles[plane], 8);
      exchange(tiles[plane], 4);
      exchange(tiles[plane], 2);
      exchange(tiles[plane], 1);
    }
    memcpy(tile + plane * 2 * TILE, tiles[plane], TILE);
  }
}

/* Packs strips. One holds, for each 32 inputs and each plane, the tiles of two times 16 rows or
 * columns. What lies beside each other in memory is read one after the other. */
INLINE void pack_strips_of(int size, int across, int turned, const matmul *p, const matrix *x,
                           int64_t first, int64_t last, char *packed) {
  int planes = size == 4 ? 3 : 1;
  int64_t strips = last - first, many = across ? p->steps : strips;
  int64_t end = p->start + SIDE * p->steps < p->k ? p->start + SIDE * p->steps : p->k;
  for (int64_t i = 0; i < many; i++)
    for (int64_t j = 0; j < strips * p->steps / many; j++) {
      int64_t step = across ? i : j, strip = across ? j : i;
      char *tiles = packed + (strip * p->steps + step) * planes * 2 * TILE;
      int64_t outer = (first + strip) * SIDE, k = p->start + step * SIDE;
      pack_tile(size, planes, across, turned, x, outer, k, end, tiles);
      pack_tile(size, planes, across, turned, x, outer + LANES, k, end, tiles + TILE);
    }
}

INLINE void pack_strips_with(int size, const matmul *p, const matrix *x, int64_t first,
                             int64_t last, char *packed) {
  /* A tile of `left` has a row for each row, one of `right` has a row for each pair of inputs. */
  if (x->right && x->across) pack_strips_of(size, 1, 0, p, x, first, last, packed);
  if (x->right && !x->across) pack_strips_of(size, 0, 1, p, x, first, last, packed);
  if (!x->right && x->across) pack_strips_of(size, 1, 1, p, x, first, last, packed);
  if (!x->right && !x->across) pack_strips_of(size, 0, 0, p, x, first, last, packed);
}

static void pack_strips(const matmul *p, const matrix *x, int64_t first, int64_t last,
                        char *packed) {
  if (x->size == 4) pack_strips_with(4, p, x, first, last, packed);
  if (x->size == 2) pack_strips_with(2, p, x, first, last, packed);
  if (x->size == 1) pack_strips_with(1, p, x, first, last, packed);
}

/* Returns the matrices of one of the pairs. */
static matmul pair_of(const matmul *p, int64_t pair) {
  matmul one = *p;
  one.whole.data += pair * p->whole.numbers * p->whole.size;
  one.parts.data += pair * p->parts.numbers * p->parts.size;
  one.y += pair * p->m * p->n;
  if (p->packed) one.packed += pair * strips_of(p->whole.outer) * strip_bytes(p, &p->whole);
  return one;
}

static void pack_task(const void *arguments, int64_t task) {
  const matmul *p = arguments;
  int64_t strips = strips_of(p->whole.outer), tasks = tasks_of(strips);
  int64_t first = task % tasks * STRIPS, last = first + STRIPS;
  matmul one = pair_of(p, task / tasks);
  pack_strips(&one, &one.whole, first, last < strips ? last : strips,
              one.packed + first * strip_bytes(p, &p->whole));
}

/* Written out, because some compilers lose what their own functions for tiles load. */
#define LOAD(tile, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(p), "r"(stride) : "memory")
#define STORE(tile, p, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(p), "r"(stride) : "memory")
#define MULTIPLY(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

/* Multiplies a plane of `left` with one of `right`; -1 is the plane that is loaded already. */
#define MULTIPLY_PLANES(left, right)                              \
  do {                                                            \
    if (left >= 0) LOAD(4, a + left * 2 * TILE, packed);          \
    if (left >= 0) LOAD(5, a + left * 2 * TILE + TILE, packed);   \
    if (right >= 0) LOAD(6, b + right * 2 * TILE, packed);        \
    if (right >= 0) LOAD(7, b + right * 2 * TILE + TILE, packed); \
    MULTIPLY(0, 4, 6);                                            \
    MULTIPLY(1, 4, 7);                                            \
    MULTIPLY(2, 5, 6);                                            \
    MULTIPLY(3, 5, 7);                                            \
  } while (0)

/* Multiplies two packed strips. Tiles 0 to 3 are the sums, to which small products come first. */
INLINE void multiply_strips(int planes, int others, const char *a, const char *b, int64_t steps,
                            float *y, int64_t stride) {
  const int64_t packed = 64; /* bytes of a row of a tile */
  char *lower = (char *)y + LANES * stride;
  __asm__ volatile("tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3");
  for (; steps; steps--, a += planes * 2 * TILE, b += others * 2 * TILE) {
    if (planes == 3) MULTIPLY_PLANES(2, 0);
    if (planes == 3) MULTIPLY_PLANES(1, -1);
    if (planes == 3 && others == 3) MULTIPLY_PLANES(-1, 1);
    if (planes == 3 && others == 3) MULTIPLY_PLANES(0, -1);
    if (planes == 3 && others == 3) MULTIPLY_PLANES(-1, 2);
    if (planes == 3 && others == 3) MULTIPLY_PLANES(-1, 0);
    if (planes == 3 && others == 1) MULTIPLY_PLANES(0, -1);
    if (planes == 1) MULTIPLY_PLANES(0, 0);
  }
  STORE(0, y, stride);
  STORE(1, y + LANES, stride);
  STORE(2, lower, stride);
  STORE(3, lower + 64, stride);
}

static void multiply_to(int planes, int others, const char *a, const char *b, int64_t steps,
                        float *y, int64_t stride) {
  if (planes == 1 && others == 1) multiply_strips(1, 1, a, b, steps, y, stride);
  if (planes == 3 && others == 1) multiply_strips(3, 1, a, b, steps, y, stride);
  if (planes == 3 && others == 3) multiply_strips(3, 3, a, b, steps, y, stride);
}

/* Computes 32 rows and columns of the result, or those that there are. Sums of some inputs are
 * added to those of the inputs before: in one long sum the small products of planes would be lost. */
static void multiply_into(const matmul *p, const char *a, const char *b, int64_t row,
                          int64_t column) {
  const matrix *left = p->whole.right ? &p->parts : &p->whole;
  const matrix *right = p->whole.right ? &p->whole : &p->parts;
  float sums[SIDE][SIDE], *y = p->y + row * p->n + column;
  int64_t rows = p->m - row < SIDE ? p->m - row : SIDE;
  int64_t columns = p->n - column < SIDE ? p->n - column : SIDE;
  int planes = planes_of(left), others = planes_of(right), first = p->start == 0;
  if (first && rows == SIDE && columns == SIDE) {
    multiply_to(planes, others, a, b, p->steps, y, 4 * p->n);
    return;
  }
  multiply_to(planes, others, a, b, p->steps, sums[0], sizeof sums[0]);
  for (int64_t i = 0; i < rows; i++, y += p->n)
    for (int64_t j = 0; j < columns; j++) y[j] = first ? sums[i][j] : y[j] + sums[i][j];
}

static void multiply_task(const void *arguments, int64_t task) {
  const matmul *all = arguments, one = pair_of(all, task / all->blocks), *p = &one;
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } tiles = {.palette = 1};
  for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
  int64_t first = task % p->blocks * p->block, end = strips_of(p->parts.outer);
  int64_t bytes = strip_bytes(p, &p->parts), of_whole = strip_bytes(p, &p->whole);
  int64_t others = strips_of(p->whole.outer);
  const char *packed = p->packed ? p->packed : own;
  char *block = p->packed ? own : own + others * of_whole;
  end = first + p->block < end ? first + p->block : end;
  if (!p->packed) pack_strips(p, &p->whole, 0, others, own);
  pack_strips(p, &p->parts, first, end, block);
  for (int64_t w = 0; w < others; w++)
    for (int64_t i = first; i < end; i++) {
      const char *whole = packed + w * of_whole, *part = block + (i - first) * bytes;
      if (p->whole.right)
        multiply_into(p, part, whole, i * SIDE, w * SIDE);
      else
        multiply_into(p, whole, part, w * SIDE, i * SIDE);
    }
  __asm__ volatile("tilerelease");
}

static int permitted;

/* Asks the system for the use of the units, and returns whether it is granted. */
int jaxformers_matrix_units(void) {
  const long request_permission = 0x1023, tile_data = 18;
  return permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static XLA_FFI_Error *multiply(XLA_FFI_CallFrame *frame, matmul *p, int64_t pairs,
                               int64_t scratch) {
  int64_t chunks = (p->k + MOST_INPUTS - 1) / MOST_INPUTS;
  p->steps = strips_of((p->k + chunks - 1) / chunks);
  int64_t strips = strips_of(p->parts.outer), others = strips_of(p->whole.outer);
  int64_t bytes = others * strip_bytes(p, &p->whole), room = BLOCK_BYTES;
  if (pairs > 1 && bytes <= BLOCK_BYTES / 2)
    p->packed = NULL, room -= bytes;
  else if (scratch < pairs * bytes)
    return refuse(frame, "the scratch of product is too small");
  int64_t threads = threads_for(frame, (double)pairs * p->m * p->n * p->k / 64);
  int64_t most = room / strip_bytes(p, &p->parts), parts = 4 * threads / pairs + 1;
  p->block = threads > 1 ? (strips + parts - 1) / parts : strips;
  p->block = p->block < most ? p->block : most;
  p->blocks = (strips + p->block - 1) / p->block;
  for (p->start = 0; p->start < p->k; p->start += SIDE * p->steps) {
    if (p->packed) run_tasks(frame, pack_task, p, pairs * tasks_of(others), threads);
    run_tasks(frame, multiply_task, p, pairs * p->blocks, threads);
  }
  return NULL;
}

static int bytes_of(XLA_FFI_DataType type) {
  return type == XLA_FFI_DataType_F32    ? 4
         : type == XLA_FFI_DataType_BF16 ? 2
                                         : type == XLA_FFI_DataType_S8;
}
#else
int jaxformers_matrix_units(void) { return 0; }
#endif

XLA_FFI_Error *jaxformers_product(XLA_FFI_CallFrame *frame) {
  if (answers_query(frame)) return NULL;
#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
  if (!permitted) return refuse(frame, "the matrix units of this processor may not be used");
  const int64_t *left = attribute(frame, "left", XLA_FFI_DataType_S64);
  const int64_t *right = attribute(frame, "right", XLA_FFI_DataType_S64);
  if (frame->args.size != 2 || frame->rets.size != 2 || !left || !right)
    return refuse(frame, "product takes two matrices, and whether each one is transposed");
  XLA_FFI_Buffer *a = argument(frame, 0), *b = argument(frame, 1);
  XLA_FFI_Buffer *y = result(frame, 0), *scratch = result(frame, 1);
  int size = bytes_of(a->dtype), other = bytes_of(b->dtype);
  if (size < 2 || other == 0 || size < other || a->rank != 3 || b->rank != 3 ||
      !is(y, XLA_FFI_DataType_F32, 3) || !is(scratch, XLA_FFI_DataType_U8, 1))
    return refuse(frame,
                  "product takes matrices, the right one of no wider type than the left one");
  matmul p = {.y = y->data, .packed = scratch->data};
  int64_t pairs = a->dims[0];
  p.m = a->dims[1 + (*left != 0)], p.k = a->dims[2 - (*left != 0)];
  p.n = b->dims[2 - (*right != 0)];
  if (b->dims[1 + (*right != 0)] != p.k || b->dims[0] != pairs || y->dims[0] != pairs ||
      y->dims[1] != p.m || y->dims[2] != p.n)
    return refuse(frame, "the shapes of product's arguments do not fit together");
  if (p.k == 0) memset(p.y, 0, pairs * p.m * p.n * sizeof(float));
  if (pairs * p.m * p.n * p.k == 0) return NULL;
  matrix x = {a->data, p.m, a->dims[2], p.m * p.k, size, 0, *left != 0};
  matrix w = {b->data, p.n, b->dims[2], p.k * p.n, other, 1, *right == 0};
  p.whole = p.m < p.n ? x : w, p.parts = p.m < p.n ? w : x;
  return multiply(frame, &p, pairs, scratch->dims[0]);
#else
  return refuse(frame, "this processor has no matrix units");
#endif
}
