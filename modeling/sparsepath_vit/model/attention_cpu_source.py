# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The attention kernel for CPUs, in C: one pass over the keys of a tile, with queries side by side in vectors.

It is flash attention turned by ninety degrees. A vector holds one number of 16 queries (8 with AVX2, 4 with NEON), and
keys come one after the other from where the packed tokens are, however ragged their runs: nothing is gathered, masked
or filled up, and the softmax needs no sum across a vector. Logits and probabilities of a few keys stay in the first
cache. In bfloat16 products are of pairs and summed in float32; only probabilities and output are rounded.
"""

from .attention_cpu_vectors import VECTORS

# Of one call of the kernel: name and type in C. `attention_cpu.py` fills them in. Strides are in bytes.
CALL_FIELDS = (
    ("query", "const char *"),  # (queries, heads, head_dim), see `first_query`
    ("key", "const char *"),  # (M, heads, head_dim), as the value
    ("value", "const char *"),
    ("output", "char *"),  # as the query
    ("log_weights", "const float *"),  # (M,) base 2, or NULL
    ("logsumexp", "float *"),  # (heads, num_globals) natural, of the first image's global tokens
    ("tiles", "const int64_t *"),  # (num_tiles, tile_columns), see `tile_table`
    ("context_key", "const char *"),  # (entries, heads, head_dim), as the value; NULL without context tokens
    ("context_value", "const char *"),
    ("context_log_weights", "const float *"),  # (entries,) base 2
    ("context_places", "const int64_t *"),  # (entries, 3): row of key and value, block row, block column
    ("context_offsets", "const int64_t *"),  # (images + 1,): where the entries of an image start
    ("mean_query", "const char *"),  # (images, heads, head_dim) contiguous, or NULL
    ("of_mean", "float *"),  # (images, heads, head_dim) contiguous, what the mean queries get from all tokens
    ("query_stride", "int64_t"),
    ("query_head_stride", "int64_t"),
    ("key_stride", "int64_t"),
    ("key_head_stride", "int64_t"),
    ("value_stride", "int64_t"),
    ("value_head_stride", "int64_t"),
    ("output_stride", "int64_t"),
    ("output_head_stride", "int64_t"),
    ("context_key_stride", "int64_t"),
    ("context_key_head_stride", "int64_t"),
    ("context_value_stride", "int64_t"),
    ("context_value_head_stride", "int64_t"),
    ("num_heads", "int64_t"),
    ("head_dim", "int64_t"),
    ("num_globals", "int64_t"),
    ("first_query", "int64_t"),  # packed index of the query after the first image's global tokens
    ("num_tiles", "int64_t"),
    ("tile_columns", "int64_t"),
    ("neighbor_radius", "int64_t"),
    ("writes_of_mean", "int64_t"),  # whether tiles without block row write `of_mean`
    ("is_bfloat16", "int64_t"),
    ("factor", "double"),  # on the logits, in powers of two
)
MAX_HEAD_DIM = 128
MULTIPLE_OF_HEAD_DIM = 4  # of dimensions that are summed up at once

_STRUCTURE = "".join(f"  {kind} {name};\n" for name, kind in CALL_FIELDS)

# A pass has at most 4 vectors of queries, and with the mean query of its block 5: so 4 x 5 sums fit the 32 registers of
# AVX-512, and 2 x 5 the 16 of AVX2. 128 keys at a time keep logits and values in 96 kB, and no time is lost by it
# (measured with 64 to 640 keys).
SOURCE = (
    VECTORS
    + f"""
#define DIMENSIONS {MULTIPLE_OF_HEAD_DIM}
#define MAX_HEAD_DIM {MAX_HEAD_DIM}
#define MAX_VECTORS 5
#define MAX_QUERIES (4 * LANES)
#define CHUNK 128

typedef struct {{
{_STRUCTURE}}} Call;
"""
    + r"""
/* Columns of a tile. */
enum { START, END, IMAGE, NUM_BLOCK_COLUMNS, BLOCK_ROW, BLOCK_COLUMN, LAST_BLOCK_COLUMN, RUNS };

/* What one thread works with. Vectors of queries lie side by side: [key or dimension][vector]. */
typedef struct {
  Floats queries[MAX_HEAD_DIM * MAX_VECTORS];
  Floats logits[CHUNK * MAX_VECTORS];
  Floats output[MAX_HEAD_DIM * MAX_VECTORS];
  Floats most[MAX_VECTORS], total[MAX_VECTORS];
  uint32_t value_pairs[CHUNK / 2 * MAX_HEAD_DIM];
  const char *keys[CHUNK + KEYS], *values[CHUNK + 1];
  float log_weights[CHUNK];
} Memory;

/* Some queries of one tile, for one head. */
typedef struct {
  const Call *call;
  const int64_t *tile;
  int64_t head, first, count;
  int has_mean_query;
} Pass;

/* Where in the keys of a tile a pass is. */
typedef struct {
  int64_t run, token, entry;
} Position;

/* The next keys of a tile, at most CHUNK of them; how many there are. */
static int next_keys(Memory *memory, const Pass *pass, Position *position) {
  const Call *call = pass->call;
  const int64_t *tile = pass->tile;
  int number = 0;
  for (; position->run < call->tile_columns; position->run += 2) {
    const int64_t end = tile[position->run + 1];
    if (position->token < tile[position->run]) position->token = tile[position->run];
    for (; position->token < end && number < CHUNK; position->token++, number++) {
      memory->keys[number] = call->key + position->token * call->key_stride + pass->head * call->key_head_stride;
      memory->values[number] =
          call->value + position->token * call->value_stride + pass->head * call->value_head_stride;
      memory->log_weights[number] = call->log_weights ? call->log_weights[position->token] : 0.0f;
    }
    if (position->token < end) return number;
    position->token = 0;
  }
  if (!call->context_key || tile[BLOCK_ROW] < 0) return number;
  for (; position->entry < call->context_offsets[tile[IMAGE] + 1] && number < CHUNK; position->entry++) {
    const int64_t *place = call->context_places + 3 * position->entry;
    const int64_t down = place[1] - tile[BLOCK_ROW], right = place[2] - tile[BLOCK_COLUMN];
    const float log_weight = call->context_log_weights[position->entry];
    const int is_near = llabs(down) <= call->neighbor_radius && llabs(right) <= call->neighbor_radius;
    if (is_near || isinf(log_weight)) continue; /* of an empty cell there is none */
    memory->keys[number] =
        call->context_key + place[0] * call->context_key_stride + pass->head * call->context_key_head_stride;
    memory->values[number] =
        call->context_value + place[0] * call->context_value_stride + pass->head * call->context_value_head_stride;
    memory->log_weights[number++] = log_weight;
  }
  return number;
}

/* The row of a packed token among the queries. */
INLINE int64_t query_row(const Call *call, int64_t token) {
  return token < call->first_query ? token : token - call->first_query + call->num_globals;
}

INLINE void fill_queries(Memory *memory, const Pass *pass, int vectors, int is_bfloat16) {
  const Call *call = pass->call;
  uint32_t *numbers = (uint32_t *)memory->queries; /* floats, or pairs of bfloat16 of two dimensions */
  const int64_t words = is_bfloat16 ? call->head_dim / 2 : call->head_dim;
  for (int64_t query = 0; query < vectors * LANES; query++) {
    const int64_t row = query_row(call, pass->first + (query < pass->count ? query : pass->count - 1));
    const char *place = call->query + row * call->query_stride + pass->head * call->query_head_stride;
    if (pass->has_mean_query && query == pass->count)
      place = call->mean_query + (pass->tile[IMAGE] * call->num_heads + pass->head) * words * 4;
    for (int64_t word = 0; word < words; word++)
      numbers[word * MAX_VECTORS * LANES + query] = pair_at(place + 4 * word);
  }
}

/* Products of queries with keys [start, start + KEYS). */
INLINE void multiply_keys(Memory *memory, int64_t head_dim, int start, int vectors, int is_bfloat16) {
  Floats sums[KEYS][MAX_VECTORS] = {0};
  const int64_t words = is_bfloat16 ? head_dim / 2 : head_dim;
  for (int64_t word = 0; word < words; word++) {
    const Floats *queries = memory->queries + word * MAX_VECTORS;
    for (int key = 0; key < KEYS; key++) {
      const uint32_t number = pair_at(memory->keys[start + key] + 4 * word);
      for (int vector = 0; vector < vectors; vector++)
        sums[key][vector] = multiply_add(sums[key][vector], queries[vector], number, is_bfloat16);
    }
  }
  for (int key = 0; key < KEYS; key++)
    for (int vector = 0; vector < vectors; vector++)
      memory->logits[(start + key) * MAX_VECTORS + vector] = sums[key][vector];
}

/* Logits become probabilities, those in bfloat16 in pairs of keys; what was summed up before is scaled anew. */
INLINE void take_softmax(Memory *memory, double factor, int number, Floats *rescaling, int vectors, int is_bfloat16) {
  Floats most[MAX_VECTORS];
  for (int vector = 0; vector < vectors; vector++) most[vector] = memory->most[vector];
  for (int key = 0; key < number; key++)
    for (int vector = 0; vector < vectors; vector++) {
      Floats *logits = memory->logits + key * MAX_VECTORS + vector;
      *logits = *logits * (float)factor + memory->log_weights[key];
      most[vector] = larger(*logits, most[vector]);
    }
  for (int vector = 0; vector < vectors; vector++) {
    rescaling[vector] = power_of_two(memory->most[vector] - most[vector]);
    memory->most[vector] = most[vector];
    memory->total[vector] *= rescaling[vector];
  }
  for (int key = 0; key < number; key++)
    for (int vector = 0; vector < vectors; vector++) {
      Floats *logits = memory->logits + key * MAX_VECTORS + vector;
      *logits = power_of_two(*logits - most[vector]);
      memory->total[vector] += *logits;
    }
  if (!is_bfloat16) return;
  if (number % 2) /* beside the last key there is nothing */
    for (int vector = 0; vector < vectors; vector++) memory->logits[number * MAX_VECTORS + vector] = all(0.0f);
  for (int key = 0; key < number; key += 2)
    for (int vector = 0; vector < vectors; vector++) {
      const Floats *logits = memory->logits + key * MAX_VECTORS + vector;
      memory->logits[key / 2 * MAX_VECTORS + vector] = rounded_pairs(logits[0], logits[MAX_VECTORS]);
    }
}

/* Values of two keys each, side by side: [pair][dimension]. */
INLINE void fill_value_pairs(Memory *memory, int64_t head_dim, int number) {
  memory->values[number] = memory->values[number - 1];
  for (int pair = 0; pair < (number + 1) / 2; pair++) {
    const uint16_t *first = (const uint16_t *)memory->values[2 * pair];
    const uint16_t *second = (const uint16_t *)memory->values[2 * pair + 1];
    uint32_t *pairs = memory->value_pairs + pair * MAX_HEAD_DIM;
    for (int64_t dimension = 0; dimension < head_dim; dimension++)
      pairs[dimension] = (uint32_t)first[dimension] | (uint32_t)second[dimension] << 16;
  }
}

/* Adds what dimensions [start, start + DIMENSIONS) get from the values. */
INLINE void multiply_values(
    Memory *memory, int64_t start, int number, const Floats *rescaling, int vectors, int is_bfloat16) {
  Floats sums[DIMENSIONS][MAX_VECTORS];
  Floats *output = memory->output + start * MAX_VECTORS;
  for (int dimension = 0; dimension < DIMENSIONS; dimension++)
    for (int vector = 0; vector < vectors; vector++)
      sums[dimension][vector] = output[dimension * MAX_VECTORS + vector] * rescaling[vector];
  for (int key = 0; key < (is_bfloat16 ? (number + 1) / 2 : number); key++) {
    const Floats *probabilities = memory->logits + key * MAX_VECTORS;
    const char *values = is_bfloat16 ? (const char *)(memory->value_pairs + key * MAX_HEAD_DIM) : memory->values[key];
    for (int dimension = 0; dimension < DIMENSIONS; dimension++) {
      const uint32_t value = pair_at(values + 4 * (start + dimension));
      for (int vector = 0; vector < vectors; vector++)
        sums[dimension][vector] = multiply_add(sums[dimension][vector], probabilities[vector], value, is_bfloat16);
    }
  }
  for (int dimension = 0; dimension < DIMENSIONS; dimension++)
    for (int vector = 0; vector < vectors; vector++)
      output[dimension * MAX_VECTORS + vector] = sums[dimension][vector];
}

/* Divides by the totals, corrects by the mean query and writes. */
INLINE void finish(Memory *memory, const Pass *pass, int vectors, int is_bfloat16) {
  const Call *call = pass->call;
  const int is_global = pass->tile[BLOCK_ROW] < 0;
  const float *numbers = (const float *)memory->output; /* [dimension][query] */
  const float *total = (const float *)memory->total, *most = (const float *)memory->most;
  const int64_t row_of_mean = pass->tile[IMAGE] * call->num_heads + pass->head;
  float *of_mean = pass->has_mean_query ? call->of_mean + row_of_mean * call->head_dim : NULL;
  for (int64_t dimension = 0; dimension < call->head_dim; dimension++) {
    Floats *output = memory->output + dimension * MAX_VECTORS;
    for (int vector = 0; vector < vectors; vector++) output[vector] /= memory->total[vector];
    if (!of_mean) continue;
    const float attended = numbers[dimension * MAX_VECTORS * LANES + pass->count];
    if (is_global) of_mean[dimension] = attended;
    else
      for (int vector = 0; vector < vectors; vector++) output[vector] += of_mean[dimension] - attended;
  }
  for (int64_t query = 0; query < pass->count; query++) {
    const int64_t row = query_row(call, pass->first + query);
    char *place = call->output + row * call->output_stride + pass->head * call->output_head_stride;
    for (int64_t dimension = 0; dimension < call->head_dim; dimension++) {
      const float number = numbers[dimension * MAX_VECTORS * LANES + query];
      if (is_bfloat16) ((uint16_t *)place)[dimension] = to_bfloat16(number);
      else ((float *)place)[dimension] = number;
    }
    if (is_global && row < call->num_globals)
      call->logsumexp[pass->head * call->num_globals + row] = (most[query] + log2f(total[query])) * 0.69314718f;
  }
}

INLINE void attend_queries(Memory *memory, const Pass *pass, int vectors, int is_bfloat16) {
  const int64_t head_dim = pass->call->head_dim;
  Position position = {RUNS, 0, pass->call->context_key ? pass->call->context_offsets[pass->tile[IMAGE]] : 0};
  fill_queries(memory, pass, vectors, is_bfloat16);
  for (int vector = 0; vector < vectors; vector++) {
    memory->most[vector] = all(-__builtin_inff());
    memory->total[vector] = all(0.0f);
  }
  memset(memory->output, 0, head_dim * MAX_VECTORS * sizeof(Floats));
  for (int number; (number = next_keys(memory, pass, &position));) {
    Floats rescaling[MAX_VECTORS];
    for (int key = 0; key < KEYS; key++) memory->keys[number + key] = memory->keys[number - 1];
    for (int key = 0; key < number; key += KEYS) multiply_keys(memory, head_dim, key, vectors, is_bfloat16);
    take_softmax(memory, pass->call->factor, number, rescaling, vectors, is_bfloat16);
    if (is_bfloat16) fill_value_pairs(memory, head_dim, number);
    for (int64_t dimension = 0; dimension < head_dim; dimension += DIMENSIONS)
      multiply_values(memory, dimension, number, rescaling, vectors, is_bfloat16);
  }
  finish(memory, pass, vectors, is_bfloat16);
}

/* The compiler makes a kernel for each of these numbers of vectors, and of each type. */
INLINE void attend_vectors(Memory *memory, const Pass *pass, int vectors, int is_bfloat16) {
  if (vectors == 1) attend_queries(memory, pass, 1, is_bfloat16);
  else if (vectors == 2) attend_queries(memory, pass, 2, is_bfloat16);
  else if (vectors <= 4) attend_queries(memory, pass, 4, is_bfloat16);
  else attend_queries(memory, pass, 5, is_bfloat16);
}

/* What the threads share: each takes the next tile and head until there is none. */
typedef struct {
  const Call *call;
  int64_t next;
  int has_failed;
} Work;

static void take_part(void *argument) {
  Work *work = argument;
  const Call *call = work->call;
  Memory *memory = aligned_alloc(64, (sizeof(Memory) + 63) / 64 * 64);
  if (!memory) {
    work->has_failed = 1;
    return;
  }
  const int64_t num_items = call->num_tiles * call->num_heads;
  for (int64_t item; (item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < num_items;) {
    const int64_t *tile = call->tiles + item / call->num_heads * call->tile_columns;
    Pass pass = {call, tile, item % call->num_heads, 0, 0, 0};
    pass.has_mean_query = call->mean_query && (tile[BLOCK_ROW] >= 0 || call->writes_of_mean);
    for (pass.first = tile[START]; pass.first < tile[END]; pass.first += MAX_QUERIES) {
      pass.count = tile[END] - pass.first < MAX_QUERIES ? tile[END] - pass.first : MAX_QUERIES;
      const int vectors = (pass.count + pass.has_mean_query + LANES - 1) / LANES;
      if (TAKES_BFLOAT16 && call->is_bfloat16) attend_vectors(memory, &pass, vectors, 1);
      else attend_vectors(memory, &pass, vectors, 0);
    }
  }
  free(memory);
}

int takes_bfloat16(void) { return TAKES_BFLOAT16; }

/* `run` is OpenMP's own start of its threads, those that torch uses. 0 where all was done. */
int attend(const Call *call, void (*run)(void (*)(void *), void *, unsigned, unsigned), unsigned num_threads) {
  Work work = {call, 0, 0};
  if (num_threads > 1) run(take_part, &work, num_threads, 0);
  else take_part(&work);
  return work.has_failed;
}
"""
)
