/* Calls the operations in C with random arguments, right and wrong ones, for sanitizers.
 *
 * Each array has exactly its own memory, so that a read beyond it is found. Threads of its own
 * stand for XLA's pool; some of its calls fail. Compiled with the sources in its include path. */
#include <pthread.h>
#include <stdio.h>

#include "attention.c"
#include "matrices.c"
#include "products.c"

static unsigned long state = 88172645463325252ul;
static int64_t draw(int64_t low, int64_t high) { /* low <= x < high */
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return low + (int64_t)(state % (unsigned long)(high - low));
}

static int errors, destroyed;
static XLA_FFI_Error *create(XLA_FFI_Error_Create_Args *args) {
  if (!args->message[0]) abort();
  errors++;
  return (XLA_FFI_Error *)&errors;
}
static void destroy(XLA_FFI_Error_Destroy_Args *args) { destroyed += args->error != NULL; }

typedef struct {
  XLA_FFI_Task *task;
  void *data;
} job;
static pthread_t threads[4096];
static int started;
static void *run_job(void *x) {
  job j = *(job *)x;
  free(x);
  j.task(j.data);
  return NULL;
}
static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
  if (draw(0, 5) == 0 || started == 4096) return (XLA_FFI_Error *)&errors;
  job *j = malloc(sizeof(job));
  j->task = args->task, j->data = args->data;
  pthread_create(&threads[started++], NULL, run_job, j);
  return NULL;
}
static XLA_FFI_Error *num_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
  if (draw(0, 10) == 0) return (XLA_FFI_Error *)&errors;
  *args->num_threads = draw(1, 5);
  return NULL;
}

static XLA_FFI_Buffer *array(XLA_FFI_DataType type, int64_t rank, const int64_t *dims) {
  XLA_FFI_Buffer *x = calloc(1, sizeof(XLA_FFI_Buffer));
  int64_t n = 1, size = 4;
  x->dims = malloc(rank * sizeof(int64_t) + 1);
  for (int64_t i = 0; i < rank; i++) n *= x->dims[i] = dims[i];
  if (type == XLA_FFI_DataType_BF16) size = 2;
  if (type == XLA_FFI_DataType_S8 || type == XLA_FFI_DataType_U8 || type == XLA_FFI_DataType_PRED)
    size = 1;
  x->dtype = type, x->rank = rank, x->data = malloc(n * size + (n * size == 0));
  for (int64_t i = 0; i < n; i++) {
    if (type == XLA_FFI_DataType_F32) ((float *)x->data)[i] = draw(-99, 100) / 33.0f;
    if (size == 2) ((uint16_t *)x->data)[i] = to_bf16(draw(-99, 100) / 33.0f);
    if (size == 1)
      ((uint8_t *)x->data)[i] = type == XLA_FFI_DataType_PRED ? draw(0, 2) : draw(0, 256);
  }
  return x;
}
static void release(XLA_FFI_Buffer *x) { free(x->dims), free(x->data), free(x); }

/* Sometimes changes a size, the type or the number of axes of one of some arrays. */
static void spoil(XLA_FFI_Buffer **arrays, int n) {
  int i = (int)draw(0, n);
  int64_t dims[5] = {0}, rank = arrays[i]->rank;
  memcpy(dims, arrays[i]->dims, rank * sizeof(int64_t));
  XLA_FFI_DataType type = arrays[i]->dtype;
  const XLA_FFI_DataType types[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                    XLA_FFI_DataType_S8, XLA_FFI_DataType_S32};
  int64_t kind = draw(0, 4);
  if (kind == 0) dims[draw(0, rank)] = draw(0, 40);
  if (kind == 1) type = types[draw(0, 4)];
  if (kind == 2) dims[rank] = draw(0, 3), rank++;
  if (kind == 3) rank--;
  release(arrays[i]);
  arrays[i] = array(type, rank, dims);
}

static int64_t one_or(int64_t n) { return draw(0, 2) ? n : 1; }

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 1000, fine = 0, units = jaxformers_matrix_units();
  XLA_FFI_Api api = {.XLA_FFI_Error_Create = create,
                     .XLA_FFI_Error_Destroy = destroy,
                     .XLA_FFI_ThreadPool_Schedule = schedule,
                     .XLA_FFI_ThreadPool_NumThreads = num_threads};
  for (int round = 0; round < rounds; round++) {
    XLA_FFI_Buffer *args[9 + 3 * 8], *y, *scratch;
    int64_t n = 0, what = draw(0, units ? 5 : 3), none[] = {0};
    int64_t weights = draw(0, 9) ? draw(1, 4) : 9; /* nine are too many */
    int64_t left = draw(0, 2), right = draw(0, 2);
    scratch = array(XLA_FFI_DataType_U8, 1, none);
    XLA_FFI_DataType wide = draw(0, 2) ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_BF16;
    XLA_FFI_Handler *handler;
    float softcap = draw(0, 2) * 5.0f;
    int64_t heads = draw(1, 4), r = draw(0, 18), i = draw(0, 90), o = draw(0, 90);
    if (what == 0) {
      int64_t b = draw(0, 4), group = draw(1, 6), t = draw(1, 6), h = draw(1, 70), j = draw(0, 70);
      int64_t s = draw(0, 4) ? draw(1, 70) : draw(500, 1100), all = heads * group;
      int64_t q[] = {b, all, t, h}, k[] = {b, heads, s, h}, v[] = {b, heads, s, j};
      int64_t allowed[] = {one_or(b), one_or(all), one_or(t), s}, out[] = {b, all, t, j};
      int64_t bias[] = {one_or(b), one_or(all), one_or(t), draw(0, 2) * s};
      args[n++] = array(wide, 4, q), args[n++] = array(wide, 4, k), args[n++] = array(wide, 4, v);
      args[n++] = array(XLA_FFI_DataType_PRED, 4, allowed);
      args[n++] = array(XLA_FFI_DataType_F32, 4, bias), y = array(wide, 4, out);
      handler = jaxformers_attend;
    } else if (what == 1) {
      int64_t x[] = {r, i}, w[] = {i, o}, out[] = {r, 0};
      args[n++] = array(XLA_FFI_DataType_F32, 2, x);
      for (; n <= weights; out[1] += w[1], w[1] = draw(0, 90)) {
        args[n++] = array(wide, 2, w);
        if (draw(0, 4) == 0) wide = XLA_FFI_DataType_F32;
      }
      y = array(XLA_FFI_DataType_F32, 2, out), handler = jaxformers_rows_times;
    } else if (what > 2) {
      int64_t b = draw(0, 4), m = draw(0, 140), k = draw(0, 8) ? draw(0, 140) : draw(1000, 2200);
      int64_t x[] = {b, left ? k : m, left ? m : k}, w[] = {b, right ? o : k, right ? k : o};
      int64_t out[] = {b, m, o}, strips = ((m < o ? m : o) + 31) / 32;
      int64_t bytes[] = {b * strips * ((k + 31) / 32) * 6144};
      args[n++] = array(wide, 3, x);
      args[n++] = array(draw(0, 3) ? wide : XLA_FFI_DataType_S8, 3, w);
      release(scratch), scratch = array(XLA_FFI_DataType_U8, 1, bytes);
      y = array(XLA_FFI_DataType_F32, 3, out), handler = jaxformers_product;
    } else {
      int64_t k = draw(1, 4), bits = draw(0, 4), j = 0;
      const XLA_FFI_DataType types[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                        XLA_FFI_DataType_S8, XLA_FFI_DataType_U8};
      i = bits == 3 ? 32 * k * draw(0, 12) : k > 1 ? 16 * k * draw(0, 12) : i;
      int64_t x[] = {r, i}, out[] = {r, 0};
      args[n++] = array(XLA_FFI_DataType_F32, 2, x);
      for (; j < weights; j++, out[1] += o, o = draw(0, 90)) {
        int64_t w[] = {o, bits == 3 ? i / 2 : i}, scale[] = {o, k}, offset[] = {o, draw(0, 2) * k};
        args[n++] = array(types[bits], 2, w), args[n++] = array(XLA_FFI_DataType_F32, 2, scale);
        args[n++] = array(XLA_FFI_DataType_F32, 2, offset);
        if (bits > 1 && i % 64 == 0 && i && k <= 2) bits = draw(2, 4); /* eight and four bits */
      }
      y = array(XLA_FFI_DataType_F32, 2, out), handler = jaxformers_rows_times_transpose;
    }
    if (draw(0, 2)) spoil(args, (int)n);
    if (draw(0, 8) == 0) spoil(&y, 1);
    if (what > 2 && draw(0, 8) == 0) spoil(&scratch, 1);
    XLA_FFI_Scalar numbers[] = {{XLA_FFI_DataType_S64, &heads},
                                {XLA_FFI_DataType_F32, &softcap},
                                {XLA_FFI_DataType_S64, &left},
                                {XLA_FFI_DataType_S64, &right}};
    XLA_FFI_ByteSpan names[] = {{"heads", 5}, {"softcap", 7}, {"left", 4}, {"right", 5}};
    XLA_FFI_AttrType kinds[4] = {XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_SCALAR,
                                 XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_SCALAR};
    XLA_FFI_ByteSpan *name_of[] = {&names[0], &names[1], &names[2], &names[3]};
    void *attrs[] = {&numbers[0], &numbers[1], &numbers[2], &numbers[3]}, *rets[] = {y, scratch};
    XLA_FFI_CallFrame frame = {.api = &api};
    frame.args.size = draw(0, 50) ? n : n - 1, frame.args.args = (void **)args;
    frame.rets.size = what > 2 ? 2 : 1, frame.rets.rets = rets;
    frame.attrs.size = draw(0, 50) ? 4 : 1, frame.attrs.types = kinds;
    frame.attrs.names = name_of, frame.attrs.attrs = attrs;
    fine += handler(&frame) == NULL;
    while (started) pthread_join(threads[--started], NULL);
    for (int64_t a = 0; a < n; a++) release(args[a]);
    release(y), release(scratch);
  }
  printf("%d of %d calls were answered, %d were refused\n", fine, rounds, errors);
  return fine < rounds / 4 || errors < rounds / 8;
}
