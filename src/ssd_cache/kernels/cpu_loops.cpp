// The loops that take most of a step's time on a CPU: attention over the stores of a layer, evictions, and linear layers
// for few rows. Plain C++ with the vector types of GCC and Clang. cpu_loops.py builds it and documents the shapes.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <climits>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// LANES: floats in a vector register. ROWS: rows whose sums fit into registers together with a panel's weights.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PANEL = 16;  // outputs of a linear layer computed together
constexpr int64_t AHEAD = 2048;  // prefetch distance in floats; see `multiply`

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// What K and V are stored in: float, BFloat16, or codes of 8 bits, which a scale of the token multiplies.
struct BFloat16 {
  uint16_t bits;
  BFloat16(uint32_t bits = 0) : bits((uint16_t)bits) {}
};
struct Int8 {
  static constexpr float largest = 127;
  int8_t bits;
  Int8(uint32_t bits = 0) : bits((int8_t)bits) {}
};
struct Float8 {  // float8_e4m3fn: a sign, 4 bits of exponent, 3 of mantissa
  static constexpr float largest = 448;
  int8_t bits;
  Float8(uint32_t bits = 0) : bits((int8_t)bits) {}
};

inline Lanes load_lanes(const float* at) { return *(const Lanes*)at; }
inline Lanes load_lanes(const BFloat16* at) {
  return (Lanes)(__builtin_convertvector(*(const Halves*)at, Bits) << 16);
}
inline Integers load_bytes(const void* at) {
#if defined(__AVX512F__)  // GCC 12 needs ten instructions for the vector types' own conversion
  return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
  return __builtin_convertvector(*(const Bytes*)at, Integers);
#endif
}
inline Lanes load_lanes(const Int8* at) { return __builtin_convertvector(load_bytes(at), Lanes); }
inline Lanes load_lanes(const Float8* at) {
  const Integers bits = load_bytes(at);
  const Integers size = (bits & 0x7f) << 20, sign = bits & (int32_t)0x80000000;
  const Lanes normal = (Lanes)(size + (120 << 23)), subnormal = (Lanes)(size + (121 << 23)) - 0x1p-6f;
  return (Lanes)(sign | (size < 1 << 23 ? (Integers)subnormal : (Integers)normal));
}

// Loads `size` numbers, at most LANES, and zeros after them.
template <typename T>
inline Lanes load_some(const T* at, int64_t size) {
  if (size >= LANES) return load_lanes(at);
  T padded[LANES]{};
  std::copy_n(at, size, padded);
  return load_lanes(padded);
}

inline Lanes rounded(Lanes numbers, float*) { return numbers; }
inline Bits rounded(Lanes numbers, BFloat16*) {  // to nearest, ties to even, as the others
  const Bits bits = (Bits)numbers;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline Bits rounded(Lanes numbers, Int8*) { return (Bits)(numbers + 0x1.8p23f); }  // the lowest bits are the integer
inline Bits rounded(Lanes numbers, Float8*) {
  const Bits size = (Bits)numbers & 0x7fffffff, sign = (Bits)numbers >> 24 & 0x80;
  const Bits normal = (size - (120 << 23) + 0x7ffff + (size >> 20 & 1)) >> 20, subnormal = (Bits)((Lanes)size + 0x1p14f);
  return sign | (size < 121 << 23 ? subnormal & 0x7f : size < 0x43f00000 ? normal : Bits{} + 0x7f);
}

// Writes the first `size` of these numbers, or all.
template <typename T>
inline void store_some(T* at, Lanes numbers, int64_t size) {
  const auto parts = rounded(numbers, at);
  for (int lane = 0; lane < std::min<int64_t>(LANES, size); lane++) at[lane] = T(parts[lane]);
}

inline float sum_of(Lanes lanes) {
  Quad quads[LANES / 4];
  __builtin_memcpy(quads, &lanes, sizeof quads);
  for (int at = 1; at < LANES / 4; at++) quads[0] += quads[at];
  return (quads[0][0] + quads[0][1]) + (quads[0][2] + quads[0][3]);
}

// e^x of numbers that are not positive, within 1.2e-7 of each result; 0 below -87.3, where float32 has subnormal numbers
// only. x is n * ln 2 + r, and e^r a polynomial (that of the Cephes library).
inline Lanes exponential(Lanes x) {
  const Lanes shift = Lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
  const Lanes shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Lanes sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  const Lanes power = (Lanes)(((Bits)shifted << 23) + 0x3f800000);  // 2^n
  return (Lanes)((Bits)(sum * power) & ~(Bits)(x < -87.3f));
}

// Logits of consecutive tokens: products of their keys and a query, which is padded with zeros to whole registers.
template <typename T>
void dots(const float* query, const T* keys, const float* scales, int64_t columns, int64_t size, float* logits) {
  for (int64_t column = 0; column < columns; column++, keys += size) {
    Lanes sums{};
    int64_t dim = 0;
    for (; dim + LANES <= size; dim += LANES) sums += load_lanes(query + dim) * load_lanes(keys + dim);
    if (dim < size) sums += load_lanes(query + dim) * load_some(keys + dim, size - dim);
    logits[column] = scales ? sum_of(sums) * scales[column] : sum_of(sums);
  }
}

// Adds to `sums` the products of weights and values: of `vectors` registers, or of the last numbers, if there are none.
template <int vectors, typename T>
inline void add_values(const float* weights, const T* values, const float* scales, int64_t columns, int64_t size,
                       int64_t left, Lanes* sums) {
  for (int64_t column = 0; column < columns; column++, values += size) {
    const float weight = scales ? weights[column] * scales[column] : weights[column];
    if constexpr (vectors == 0)
      sums[0] += weight * load_some(values, left);
    else
      for (int at = 0; at < vectors; at++) sums[at] += weight * load_lanes(values + at * LANES);
  }
}

// One store of a layer, and the sizes that all its stores share. Without codes, the slots are columns of keys and values
// after the prompt.
template <typename T>
struct Store {
  T *keys, *values;
  float* scores;
  const int64_t* heads;
  const bool* mask;
  const int64_t* slot;
  void* key_codes;
  float* key_scales;
  void* value_codes;
  float* value_scales;
  int64_t num_heads, num_scored, num_prompt, num_slots;
};
struct Layer {
  int64_t batch, kv_heads, groups, head_dim, value_dim, num_stores, kv_dtype, num_threads;
};

// K or V of one head: the prompt, and slots of type T, or of codes with a scale each.
template <typename T, typename Slot>
struct States {
  T* prompt;
  Slot* slots;
  float* scales = nullptr;
  int64_t num_prompt, size;

  States(T* states, void* codes, float* all_scales, int64_t num_prompt, int64_t num_slots, int64_t size, int64_t task)
      : num_prompt(num_prompt), size(size) {
    if constexpr (std::is_same_v<T, Slot>) {
      prompt = states + task * (num_prompt + num_slots) * size;
      slots = prompt + num_prompt * size;
    } else {
      prompt = states + task * num_prompt * size;
      slots = (Slot*)codes + task * num_slots * size;
      scales = all_scales + task * num_slots;
    }
  }

  // Writes a token; codes and scale are those of `quantize` in eight_bits.py.
  void write(int64_t slot, const T* states) {
    Slot* const to = slots + slot * size;
    if constexpr (std::is_same_v<T, Slot>) {
      std::copy_n(states, size, to);
    } else {
      Integers highest{};  // compared as integers, NaN is above all numbers
      for (int64_t dim = 0; dim < size; dim += LANES) {
        const Integers part = (Integers)load_some(states + dim, size - dim) & 0x7fffffff;
        highest = part > highest ? part : highest;
      }
      for (int lane = 1; lane < LANES; lane++) highest[0] = std::max(highest[0], highest[lane]);
      const float scale = ((Lanes)highest)[0] / Slot::largest;
      scales[slot] = scale < FLT_MIN ? FLT_MIN : scale;  // a NaN stays
      for (int64_t dim = 0; dim < size; dim += LANES)
        store_some(to + dim, load_some(states + dim, size - dim) / scales[slot], size - dim);
    }
  }
};

// Writes the sums over tokens of weight times value, from dimension `dim` on, `vectors` registers at a time.
template <int vectors, typename T, typename Slot>
void weighted_sums(const float* weights, const States<T, Slot>& values, int64_t stored, T* output, int64_t dim = 0) {
  constexpr int count = std::max(vectors, 1);
  const int64_t size = values.size;
  for (; dim < size && dim + vectors * LANES <= size; dim += count * LANES) {
    Lanes sums[count]{};
    add_values<vectors>(weights, values.prompt + dim, nullptr, values.num_prompt, size, size - dim, sums);
    add_values<vectors>(weights + values.num_prompt, values.slots + dim, values.scales, stored, size, size - dim, sums);
    for (int at = 0; at < count; at++) store_some(output + dim + at * LANES, sums[at], size - dim - at * LANES);
  }
  if constexpr (vectors > 0) weighted_sums<vectors / 2>(weights, values, stored, output, dim);
}

// False, with nothing written, if a store has a head that the layer does not have, or lacks its slot.
template <typename Slot, typename T>
bool decode(const T* query, const T* new_key, const T* new_value, const Store<T>* stores, float scaling, T* output,
            const Layer* layer) {
  const auto [batch, kv_heads, groups, head_dim, value_dim, num_stores, kv_dtype, num_threads] = *layer;
  std::vector<int64_t> first_task{0};  // of each store; a task is a row and a head
  int64_t longest = 0;
  for (int64_t at = 0; at < num_stores; at++) {
    const Store<T>& store = stores[at];
    for (int64_t head = 0; head < store.num_heads; head++)
      if (store.heads[head] < 0 || store.heads[head] >= kv_heads) return false;
    if (*store.slot < 0 || *store.slot >= store.num_slots) return false;
    first_task.push_back(first_task.back() + batch * store.num_heads);
    longest = std::max(longest, store.num_prompt + *store.slot + 1);
  }
  if (batch == 0) return true;  // without rows, the number of columns is unbounded
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scaled(head_dim + LANES), weights(longest + LANES);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < first_task.back(); number++) {
      const int64_t at = std::upper_bound(first_task.begin(), first_task.end(), number) - first_task.begin() - 1;
      const Store<T>& store = stores[at];
      const int64_t num_prompt = store.num_prompt, num_slots = store.num_slots, slot = *store.slot;
      const int64_t stored = slot + 1, end = num_prompt + stored;
      const int64_t padded = (end + LANES - 1) / LANES * LANES;  // whole registers; weights after the last column are 0
      const int64_t task = number - first_task[at], row = task / store.num_heads, head = task % store.num_heads;
      const int64_t model_head = row * kv_heads + store.heads[head];
      States<T, Slot> keys(store.keys, store.key_codes, store.key_scales, num_prompt, num_slots, head_dim, task);
      States<T, Slot> values(store.values, store.value_codes, store.value_scales, num_prompt, num_slots, value_dim, task);
      keys.write(slot, new_key + model_head * head_dim);
      values.write(slot, new_value + model_head * value_dim);
      for (int64_t group = 0; group < groups; group++) {
        const T* const asking = query + (model_head * groups + group) * head_dim;
        for (int64_t dim = 0; dim < head_dim; dim += LANES)
          *(Lanes*)&scaled[dim] = load_some(asking + dim, head_dim - dim) * scaling;
        dots(scaled.data(), keys.prompt, nullptr, num_prompt, head_dim, weights.data());
        dots(scaled.data(), keys.slots, keys.scales, stored, head_dim, weights.data() + num_prompt);
        for (int64_t column = 0; store.mask && column < end - 1; column++)  // the token itself is always seen
          if (!store.mask[row * (num_prompt + num_slots) + column]) weights[column] = -INFINITY;
        std::fill(weights.begin() + end, weights.begin() + padded, -INFINITY);
        Lanes most = load_lanes(weights.data());
        for (int64_t at = LANES; at < padded; at += LANES) {
          const Lanes part = load_lanes(&weights[at]);
          most = part > most ? part : most;
        }
        const float highest = *std::max_element((float*)&most, (float*)(&most + 1));
        Lanes totals{};
        for (int64_t at = 0; at < padded; at += LANES) {
          const Lanes part = exponential(load_lanes(&weights[at]) - highest);
          *(Lanes*)&weights[at] = part;
          totals += part;
        }
        const float total = sum_of(totals);
        for (int64_t at = 0; at < padded; at += LANES) *(Lanes*)&weights[at] /= Lanes{} + total;
        if (head < store.num_scored) {
          float* const received = store.scores + (row * store.num_scored + head) * num_slots;
          for (int64_t at = 0; at < stored; at++) received[at] += weights[num_prompt + at];
        }
        weighted_sums<8>(weights.data(), values, stored, output + (model_head * groups + group) * value_dim);
      }
    }
  }
  return true;
}

template <typename T>
bool decode_into(const T* query, const T* new_key, const T* new_value, const Store<T>* stores, float scaling, T* output,
                 const Layer* layer) {
  constexpr decltype(&decode<T, T>) loops[] = {decode<T, T>, decode<Int8, T>, decode<Float8, T>};
  return loops[layer->kv_dtype](query, new_key, new_value, stores, scaling, output, layer);
}

// The tensors of a store whose slots are full, and one eviction; the sizes of K and V are bytes of a slot.
struct Eviction {
  const uint32_t* ranks;  // the bits of floats
  int64_t num_semantic, num_seen, first_new, num_threads;
  int32_t* positions;
  float *received, *scales[2];
  char* states[2];
  int64_t batch, num_heads, num_scored, num_slots, num_prompt, num_evict, num_recent, num_sinks, sizes[2];
  // A learned score of the semantic heads, or null: weights of K and V, and the tables for places of a grid.
  const float *weights[2], *row_table, *column_table;
  int64_t num_rows, num_columns, is_bfloat16;
};

// Writes the ranks of a head's tokens by the learned score, and the worth of those from slot `first_new` on.
template <typename T>
void rank_by_score(const Eviction& given, int64_t row, int64_t head, float* ranks) {
  const int64_t num_slots = given.num_slots, task = row * given.num_heads + head;
  const int64_t num_rows = given.num_rows, num_columns = given.num_columns;
  float* const worth = given.received + (row * given.num_scored + head) * num_slots;
  for (int part = 0; part < 2; part++) {
    const int64_t size = given.sizes[part] / sizeof(T);
    const T* const states = (const T*)given.states[part] + (task * (given.num_prompt + num_slots) + given.num_prompt) * size;
    const float* const weights = given.weights[part] + head * size;
    for (int64_t at = given.first_new; at < num_slots; at++) {
      Lanes sums{};
      for (int64_t dim = 0; dim < size; dim += LANES)
        sums += load_some(weights + dim, size - dim) * load_some(states + at * size + dim, size - dim);
      worth[at] = part ? worth[at] + sum_of(sums) : sum_of(sums);
    }
  }
  const int32_t columns = (int32_t)num_columns;  // 64 bits take several times as long to divide
  const int32_t now = (int32_t)std::min(given.num_seen / num_columns, num_rows - 1);  // past the end, the last row
  const float* const by_row = given.row_table + (head * num_rows + now) * num_rows;
  const float* const by_column = given.column_table + head * num_rows * num_columns;
  const int32_t* const positions = given.positions + task * num_slots;
  for (int64_t at = 0; at < num_slots; at++) {
    const int32_t row_of_token = positions[at] / columns, column = positions[at] - row_of_token * columns;
    const int32_t token_row = std::min(row_of_token, now);
    ranks[at] = by_row[token_row] + by_column[(now - token_row) * columns + column] + worth[at];
  }
}

// A number for each slot, in the order in which slots are emptied: by rank or age, and of equal ranks the older first.
inline int64_t order_of(const Eviction& given, int64_t position, const uint32_t* rank) {
  int64_t first = position < given.num_sinks ? given.num_seen : position;
  if (rank) {
    const bool is_spared = position >= given.num_seen - given.num_recent || position < given.num_sinks;
    const uint32_t bits = is_spared ? 0x7f800000 : *rank == 0x80000000 ? 0 : *rank;  // infinity; -0.0 equals 0.0
    if ((bits & 0x7fffffff) > 0x7f800000)
      first = INT32_MAX;  // NaN is above all numbers
    else
      first = (int32_t)(bits >> 31 ? bits ^ 0x7fffffff : bits);  // integers in the order of the numbers
  }
  return first * (int64_t(1) << 32) + position;
}

// Evicts from one head of one row: the survivors in the slots that are freed move to the victims' places before these.
void evict_head(const Eviction& given, int64_t row, int64_t head, int64_t* order, int64_t* sorted, float* scores) {
  const auto [num_heads, num_slots, num_evict] = std::tuple(given.num_heads, given.num_slots, given.num_evict);
  const int64_t task = row * num_heads + head, first_free = num_slots - num_evict;
  int32_t* const positions = given.positions + task * num_slots;
  const uint32_t* ranks = nullptr;
  if (head < given.num_semantic && given.row_table) {
    (given.is_bfloat16 ? rank_by_score<BFloat16> : rank_by_score<float>)(given, row, head, scores);
    ranks = (const uint32_t*)scores;
  } else if (head < given.num_semantic) {
    ranks = given.ranks + (row * given.num_semantic + head) * num_slots;
  }
  float* const received =
      head < given.num_scored ? given.received + (row * given.num_scored + head) * num_slots : nullptr;
  for (int64_t at = 0; at < num_slots; at++)
    sorted[at] = order[at] = order_of(given, positions[at], ranks ? ranks + at : nullptr);
  std::nth_element(sorted, sorted + num_evict - 1, sorted + num_slots);
  const int64_t last = sorted[num_evict - 1];  // no two numbers are equal
  int64_t place = 0;
  for (int64_t from = first_free; from < num_slots; from++) {
    if (order[from] <= last) continue;
    while (order[place] > last) place++;
    positions[place] = positions[from];
    if (received) received[place] = received[from];
    for (int part = 0; part < 2; part++) {
      const int64_t size = given.sizes[part];
      char* const states = given.states[part] + (task * (given.num_prompt + num_slots) + given.num_prompt) * size;
      std::memcpy(states + place * size, states + from * size, size);
      if (float* const scales = given.scales[part]) scales[task * num_slots + place] = scales[task * num_slots + from];
    }
    place++;
  }
  for (int64_t at = 0; at < num_evict; at++) positions[first_free + at] = int32_t(given.num_seen + at);
  if (received) std::fill_n(received + first_free, num_evict, 0.0f);
}

// Weights come from memory, and hardware prefetching stops at the end of each page. So weights are prefetched far ahead
// into the L2 cache; the states fill L1.
template <int rows>
void multiply(const float* states, const float* panel, const float* bias, float* output, int64_t in, int64_t out) {
  constexpr int vectors = PANEL / LANES;
  Lanes sums[rows][vectors];
  for (auto& row : sums)
    for (int at = 0; at < vectors; at++) row[at] = bias ? load_lanes(bias + at * LANES) : Lanes{};
  for (int64_t column = 0; column < in; column++, panel += PANEL) {
    Lanes weights[vectors];
    for (int at = 0; at < vectors; at++) weights[at] = load_lanes(panel + at * LANES);
    __builtin_prefetch(panel + AHEAD, 0, 2);
    for (int row = 0; row < rows; row++)
      for (int at = 0; at < vectors; at++) sums[row][at] += states[column * rows + row] * weights[at];
  }
  for (int row = 0; row < rows; row++)
    for (int at = 0; at < vectors; at++) *(Lanes*)(output + row * out + at * LANES) = sums[row][at];
}

// `multiply` for the last `left` rows, fewer than ROWS.
template <int rows>
void multiply_last(int64_t left, const float* states, const float* panel, const float* bias, float* output,
                   int64_t in, int64_t out) {
  if (left == rows) return multiply<rows>(states, panel, bias, output, in, out);
  if constexpr (rows > 1) multiply_last<rows - 1>(left, states, panel, bias, output, in, out);
}

}  // namespace

// Python checks sizes, dtypes and devices before each call; this file checks heads and slots.
extern "C" {

bool decode_float32(const float* query, const float* new_key, const float* new_value, const Store<float>* stores,
                    float scaling, float* output, const Layer* layer) {
  return decode_into(query, new_key, new_value, stores, scaling, output, layer);
}

bool decode_bfloat16(const BFloat16* query, const BFloat16* new_key, const BFloat16* new_value,
                     const Store<BFloat16>* stores, float scaling, BFloat16* output, const Layer* layer) {
  return decode_into(query, new_key, new_value, stores, scaling, output, layer);
}

void evict(const Eviction* given) {
#pragma omp parallel num_threads(given->num_threads)
  {
    std::vector<int64_t> order(given->num_slots), sorted(given->num_slots);
    std::vector<float> scores(given->num_slots);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < given->batch * given->num_heads; task++)
      evict_head(*given, task / given->num_heads, task % given->num_heads, order.data(), sorted.data(), scores.data());
  }
}

// `packed` is a weight `[out, in]` in the layout `[out / PANEL, in, PANEL]`.
void linear(const float* states, const float* packed, const float* bias, float* output, int64_t num_rows, int64_t in,
            int64_t out, int64_t num_threads) {
  // copy of the states in blocks of ROWS rows, each block stored column by column
  std::vector<float> turned(num_rows * in);
  for (int64_t first = 0; first < num_rows; first += ROWS) {
    const int64_t rows = std::min<int64_t>(num_rows - first, ROWS);
    for (int64_t row = 0; row < rows; row++)
      for (int64_t column = 0; column < in; column++)
        turned[first * in + column * rows + row] = states[(first + row) * in + column];
  }
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t at = 0; at < out; at += PANEL) {
    const float* const panel = packed + at * in;
    const float* const shift = bias ? bias + at : nullptr;
    int64_t row = 0;
    for (; row + ROWS <= num_rows; row += ROWS)
      multiply<ROWS>(&turned[row * in], panel, shift, output + row * out + at, in, out);
    if (row < num_rows)
      multiply_last<ROWS - 1>(num_rows - row, &turned[row * in], panel, shift, output + row * out + at, in, out);
  }
}
}
