/* C interface of the KVPrune kernel: keep the chosen positions of one layer's keys and values. */
#ifndef SKIPVISION_KV_PRUNE_H
#define SKIPVISION_KV_PRUNE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Status of skipvision_kv_prune: 0, one of these, or a positive cudaError_t of the launch. */
#define SKIPVISION_KV_PRUNE_OK 0
#define SKIPVISION_KV_PRUNE_BAD_ARGUMENT (-1) /* a size, a stride or struct_bytes is wrong, or a pointer is null */
#define SKIPVISION_KV_PRUNE_MISALIGNED (-2)   /* a pointer is not a multiple of its element's size */
#define SKIPVISION_KV_PRUNE_OVERLAP (-3)      /* memory overlaps in a way that is not one of the in-place layouts */
#define SKIPVISION_KV_PRUNE_TOO_LARGE (-4)    /* a tensor has 2^63 bytes or more, or a row 2^31 */

/*
 * One layer's K and V. Every field has 8 bytes, so that there is no padding; pointers are device pointers.
 *
 *   key_out[b, h, k, :]   = key[b, h, keep_index[b, k], :]
 *   value_out[b, h, k, :] = value[b, h, keep_index[b, k], :]
 *
 * key, value        [batch, heads, sequence, row_bytes] contiguous
 * keep_index        [batch, kept] int64, contiguous, strictly ascending in each row, in [0, sequence). Other
 *                   content is undefined behaviour (compile with SKIPVISION_KV_PRUNE_CHECK to trap on it).
 * key_out, value_out  row (b, h, k) starts ((b * heads + h) * output_head_rows + k) * row_bytes bytes in. Rows from
 *                   kept to output_head_rows are left as they are.
 *
 * An output may be its own input (key_out == key, value_out == value) in two layouts:
 *   view    output_head_rows == sequence: each head keeps its place and holds the kept rows first
 *   packed  output_head_rows == kept: the front of the buffer is a contiguous [batch, heads, kept, row_bytes]
 * Any other overlap of an output with the rest is refused. Two outputs that interleave in one buffer count as
 * overlapping.
 */
typedef struct skipvision_kv_prune_params {
  int64_t struct_bytes;     /* sizeof(skipvision_kv_prune_params): a caller of another layout is refused */
  int64_t batch;            /* B >= 0 */
  int64_t heads;            /* H >= 0, key/value heads */
  int64_t sequence;         /* S >= 0 */
  int64_t kept;             /* K, 0 <= K <= S */
  int64_t row_bytes;        /* Dh * element_bytes, below 2^31 */
  int64_t element_bytes;    /* 2 (float16, bfloat16) or 4 (float32) */
  int64_t output_head_rows; /* rows between two heads of an output, >= kept */
  const void* key;
  const void* value;
  const int64_t* keep_index;
  void* key_out;
  void* value_out;
} skipvision_kv_prune_params;

/*
 * Start the copy of K and V, as one kernel, on a stream of the current device; does not wait for it.
 *
 * params  read before the call returns. With nothing to copy no kernel starts and its pointers may be null.
 * stream  a cudaStream_t; null is the default stream.
 * Returns a status as above.
 */
int skipvision_kv_prune(const skipvision_kv_prune_params* params, void* stream);

/* What a status means, in one line; never null, static memory. */
const char* skipvision_kv_prune_error(int status);

/* "1 (skipvision-export X.Y.Z)": the version of the op and of this interface, then the package's. Static memory. */
const char* skipvision_kv_prune_version(void);

#ifdef __cplusplus
}
#endif

#endif
