/* What the operations of this folder share: vectors, threads, and the checks of their arguments.
 *
 * The code is C11 with vectors of as many floats as a register has: 16 with AVX-512, 8 with AVX2,
 * and 4 elsewhere. GCC keeps longer ones in memory. Each operation is a handler of XLA's foreign
 * function interface. It returns an error for arguments that it does not take, and it never trusts
 * a shape. */
#ifndef JAXFORMERS_COMMON_H
#define JAXFORMERS_COMMON_H

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec x) { *(loose_vec *)p = x; }

/* Loads of narrower types. GCC takes a vector of bytes apart number by number, so these alone are
 * written for each processor. The 16 bits of a bfloat16 are the upper half of a float. A byte holds
 * two numbers of four bits. */
#if defined(__AVX512F__)
INLINE vec load_bf16(const void *p) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
}
INLINE vec load_int8(const void *p) {
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
INLINE void load_int4(const void *p, vec *low, vec *high) {
  __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(p));
  *low = (vec)_mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
  *high = (vec)_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4));
}
#elif defined(__AVX2__)
INLINE vec load_bf16(const void *p) {
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
}
INLINE vec load_int8(const void *p) {
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
INLINE void load_int4(const void *p, vec *low, vec *high) {
  __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p));
  *low = (vec)_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
  *high = (vec)_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4));
}
#else
INLINE vec load_bf16(const void *p) {
  const uint16_t *x = p;
  ivec y;
  for (int i = 0; i < LANES; i++) y[i] = (int32_t)((uint32_t)x[i] << 16);
  return (vec)y;
}
INLINE vec load_int8(const void *p) {
  const int8_t *x = p;
  ivec y;
  for (int i = 0; i < LANES; i++) y[i] = x[i];
  return __builtin_convertvector(y, vec);
}
INLINE void load_int4(const void *p, vec *low, vec *high) {
  const uint8_t *x = p;
  ivec y;
  for (int i = 0; i < LANES; i++) y[i] = x[i];
  *low = __builtin_convertvector(y & 15, vec), *high = __builtin_convertvector(y >> 4, vec);
}
#endif

INLINE vec whole(int size, const void *p) {
  return size == 4 ? load(p) : size == 2 ? load_bf16(p) : load_int8(p);
}

/* Returns numbers of 4, 2 or 1 bytes: float32, bfloat16 or int8. There are n of them, and zeros
 * after them if n is less than LANES. */
INLINE vec numbers(int size, const void *p, int64_t n) {
  if (n >= LANES) return whole(size, p);
  if (n <= 0) return (vec){0};
  _Alignas(4) char some[4 * LANES] = {0};
  memcpy(some, p, n * size);
  return whole(size, some);
}

/* Stores the first n numbers, or all of them if n is more than LANES. */
INLINE void store_some(float *p, vec x, int64_t n) {
  if (n >= LANES)
    store(p, x);
  else if (n > 0)
    memcpy(p, &x, n * sizeof(float));
}

/* Asks for numbers that are read later: from memory, and then from the second cache. The processor
 * itself does not look beyond a page, and to the first cache it brings fewer lines at a time. */
INLINE void ask_for(const char *p) {
  __builtin_prefetch(p + 8192, 0, 2);
  __builtin_prefetch(p + 1024);
}

typedef float quarter __attribute__((vector_size(16)));

INLINE quarter quarter_sums(vec x) {
#if LANES == 16
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                           (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
#elif LANES == 8
  __m256 y = (__m256)x;
#endif
#if LANES > 4
  return (quarter)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#else
  return x;
#endif
}
INLINE float sum(vec x) {
  quarter y = quarter_sums(x);
  return (y[0] + y[2]) + (y[1] + y[3]);
}

#ifdef __clang__
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) \
  __builtin_shuffle(x, y, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

/* Stores the sums of four vectors, each as `sum` adds it. */
INLINE void store_sums(float *p, const vec x[4]) {
  quarter a = quarter_sums(x[0]), b = quarter_sums(x[1]);
  quarter c = quarter_sums(x[2]), d = quarter_sums(x[3]);
  quarter ab = PICK(a, b, 0, 4, 1, 5) + PICK(a, b, 2, 6, 3, 7);
  quarter cd = PICK(c, d, 0, 4, 1, 5) + PICK(c, d, 2, 6, 3, 7);
  quarter all = PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
  memcpy(p, &all, sizeof all);
}

INLINE float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even, as XLA does */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Threads: the one of the call, and some of XLA's own pool. Tasks are numbered. Each thread takes
 * those of its own range one after the other, so that it reads weights that follow each other, and
 * then those that are left of the other ranges. The call never waits for a thread to begin, so that
 * a pool without a free thread only makes it slower. */

typedef struct work {
  void (*run)(const void *arguments, int64_t task);
  const void *arguments;
  int64_t tasks, threads;
  _Atomic int64_t joined, done;
  _Atomic int references;
  _Atomic int64_t next[]; /* of the range of each thread */
} work;

INLINE int64_t start_of(const work *w, int64_t range) { return w->tasks * range / w->threads; }

static void take_tasks(work *w) {
  int64_t me = atomic_fetch_add(&w->joined, 1);
  for (int64_t i = 0; i < w->threads; i++) {
    int64_t range = (me + i) % w->threads, end = start_of(w, range + 1);
    for (int64_t task; (task = atomic_fetch_add(&w->next[range], 1)) < end;) {
      w->run(w->arguments, task);
      atomic_fetch_add(&w->done, 1);
    }
  }
}
static void forget(work *w) {
  if (atomic_fetch_sub(&w->references, 1) == 1) free(w);
}
static void help(void *w) {
  take_tasks(w);
  forget(w);
}

/* Returns whether there is an error, which belongs to the caller and is destroyed. */
static int failed(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                        .error = error};
  frame->api->XLA_FFI_Error_Destroy(&destroy);
  return 1;
}

/* Returns over how many threads work is worth dividing that one of them needs `cost` bytes for. */
static int64_t threads_for(XLA_FFI_CallFrame *frame, double cost) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args ask = {.struct_size =
                                                XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                            .ctx = frame->ctx,
                                            .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&ask);
  if (failed(frame, error)) return 1;
  int64_t most = (int64_t)(cost / 65536) + 1;
  return threads < most ? threads : most;
}

static void run_tasks(XLA_FFI_CallFrame *frame, void (*run)(const void *, int64_t),
                      const void *arguments, int64_t tasks, int64_t threads) {
  threads = threads < tasks ? threads : tasks;
  work *w = threads > 1 ? malloc(sizeof(work) + threads * sizeof(w->next[0])) : NULL;
  if (!w) {
    for (int64_t i = 0; i < tasks; i++) run(arguments, i);
    return;
  }
  w->run = run, w->arguments = arguments, w->tasks = tasks, w->threads = threads;
  for (int64_t i = 0; i < threads; i++) atomic_init(&w->next[i], start_of(w, i));
  atomic_init(&w->joined, 0);
  atomic_init(&w->done, 0);
  atomic_init(&w->references, (int)threads);
  for (int64_t i = 1; i < threads; i++) {
    XLA_FFI_ThreadPool_Schedule_Args ask = {.struct_size =
                                                XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                            .ctx = frame->ctx,
                                            .task = help,
                                            .data = w};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&ask);
    if (failed(frame, error)) forget(w);
  }
  take_tasks(w);
  for (int spins = 0; atomic_load(&w->done) < tasks; spins++)
    if (spins > 2000) sched_yield();
  forget(w);
}

/* Arguments. */

INLINE XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *f, int i) { return f->args.args[i]; }
INLINE XLA_FFI_Buffer *result(XLA_FFI_CallFrame *f, int i) { return f->rets.rets[i]; }

static XLA_FFI_Error *refuse(XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

INLINE int is(const XLA_FFI_Buffer *x, XLA_FFI_DataType type, int64_t rank) {
  return x->dtype == type && x->rank == rank;
}

/* Returns a scalar attribute of a type, or NULL if there is none. */
INLINE void *attribute(XLA_FFI_CallFrame *frame, const char *name, XLA_FFI_DataType type) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    XLA_FFI_ByteSpan *given = frame->attrs.names[i];
    if (given->len != strlen(name) || memcmp(given->ptr, name, given->len)) continue;
    if (frame->attrs.types[i] != XLA_FFI_AttrType_SCALAR) return NULL;
    XLA_FFI_Scalar *x = frame->attrs.attrs[i];
    return x->dtype == type ? x->value : NULL;
  }
  return NULL;
}

/* Returns whether this call only asks which version of the interface the handler speaks. */
static int answers_query(XLA_FFI_CallFrame *frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata)
    return 0;
  XLA_FFI_Metadata *m = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
  m->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  m->api_version.extension_start = NULL;
  m->api_version.major_version = XLA_FFI_API_MAJOR;
  m->api_version.minor_version = XLA_FFI_API_MINOR;
  m->traits = 0;
  return 1;
}

#endif
