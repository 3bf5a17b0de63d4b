// The two loops that take most of a step's time on a CPU: attention over the stores of a layer, and linear layers for
// few rows. Plain C++ with the vector types of GCC and Clang. cpu_loops.py builds it and documents the shapes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

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
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* at) { return *at; }
inline Lanes load_lanes(const float* at) { return *(const Lanes*)at; }
inline void store(float* at, float value) { *at = value; }

inline float load(const BFloat16* at) {
  const uint32_t bits = uint32_t(at->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline Lanes load_lanes(const BFloat16* at) {
  return (Lanes)(__builtin_convertvector(*(const Halves*)at, Bits) << 16);
}
inline void store(BFloat16* at, float value) {  // round to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  at->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float sum_of(Lanes lanes) {
  float parts[LANES];
  __builtin_memcpy(parts, &lanes, sizeof parts);
  for (int width = LANES / 2; width; width /= 2)
    for (int at = 0; at < width; at++) parts[at] += parts[at + width];
  return parts[0];
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

template <typename T>
float dot(const float* a, const T* b, int64_t size) {
  Lanes sums{};
  int64_t dim = 0;
  for (; dim + LANES <= size; dim += LANES) sums += load_lanes(a + dim) * load_lanes(b + dim);
  float sum = sum_of(sums);
  for (; dim < size; dim++) sum += a[dim] * load(b + dim);
  return sum;
}

// Writes the sums over columns of weight times value, from dimension `dim` on, `vectors` registers at a time.
template <int vectors, typename T>
void weighted_sums(const float* weights, const T* values, int64_t columns, int64_t size, T* sums, int64_t dim = 0) {
  for (; dim + vectors * LANES <= size; dim += vectors * LANES) {
    Lanes parts[vectors]{};
    for (int64_t column = 0; column < columns; column++)
      for (int at = 0; at < vectors; at++)
        parts[at] += weights[column] * load_lanes(values + column * size + dim + at * LANES);
    for (int at = 0; at < vectors; at++)
      for (int lane = 0; lane < LANES; lane++) store(sums + dim + at * LANES + lane, parts[at][lane]);
  }
  if constexpr (vectors > 1) return weighted_sums<vectors / 2>(weights, values, columns, size, sums, dim);
  for (; dim < size; dim++) {
    float sum = 0;
    for (int64_t column = 0; column < columns; column++) sum += weights[column] * load(values + column * size + dim);
    store(sums + dim, sum);
  }
}

// One store of a layer, and the sizes that all its stores share.
template <typename T>
struct Store {
  T *keys, *values;
  float* scores;
  const int64_t* heads;
  const bool* mask;
  const int64_t* slot;
  int64_t num_heads, num_scored, num_prompt, num_slots;
};
struct Layer {
  int64_t batch, kv_heads, groups, head_dim, value_dim, num_stores, num_threads;
};

// False, with nothing written, if a store has a head that the layer does not have, or lacks its slot.
template <typename T>
bool decode(const T* query, const T* new_key, const T* new_value, const Store<T>* stores, float scaling, T* output,
            const Layer* layer) {
  const auto [batch, kv_heads, groups, head_dim, value_dim, num_stores, num_threads] = *layer;
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
    std::vector<float> scaled(head_dim), weights(longest + LANES);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < first_task.back(); number++) {
      const int64_t at = std::upper_bound(first_task.begin(), first_task.end(), number) - first_task.begin() - 1;
      const auto& [keys, values, scores, heads, mask, slot, num_heads, num_scored, num_prompt, num_slots] = stores[at];
      const int64_t length = num_prompt + num_slots, end = num_prompt + *slot;  // columns before `end` hold tokens
      const int64_t padded = (end + LANES) / LANES * LANES;  // whole registers; weights after the last column are 0
      const int64_t task = number - first_task[at], row = task / num_heads, head = task % num_heads;
      const int64_t model_head = row * kv_heads + heads[head];
      T* const own_keys = keys + task * length * head_dim;
      T* const own_values = values + task * length * value_dim;
      for (int64_t dim = 0; dim < head_dim; dim++) own_keys[end * head_dim + dim] = new_key[model_head * head_dim + dim];
      for (int64_t dim = 0; dim < value_dim; dim++)
        own_values[end * value_dim + dim] = new_value[model_head * value_dim + dim];
      for (int64_t group = 0; group < groups; group++) {
        const T* const asking = query + (model_head * groups + group) * head_dim;
        for (int64_t dim = 0; dim < head_dim; dim++) scaled[dim] = load(asking + dim) * scaling;
        for (int64_t column = 0; column < end; column++) {
          const bool is_seen = !mask || mask[row * length + column];
          weights[column] = is_seen ? dot(scaled.data(), own_keys + column * head_dim, head_dim) : -INFINITY;
        }
        weights[end] = dot(scaled.data(), own_keys + end * head_dim, head_dim);
        std::fill(weights.begin() + end + 1, weights.begin() + padded, -INFINITY);
        float highest = weights[end];
        for (int64_t column = 0; column < end; column++) highest = std::fmax(highest, weights[column]);
        Lanes totals{};
        for (int64_t at = 0; at < padded; at += LANES) {
          const Lanes part = exponential(load_lanes(&weights[at]) - highest);
          *(Lanes*)&weights[at] = part;
          totals += part;
        }
        const float total = sum_of(totals);
        for (int64_t at = 0; at < padded; at += LANES) *(Lanes*)&weights[at] /= Lanes{} + total;
        weighted_sums<8>(weights.data(), own_values, end + 1, value_dim, output + (model_head * groups + group) * value_dim);
        if (head < num_scored) {
          float* const received = scores + (row * num_scored + head) * num_slots;
          for (int64_t at = 0; at <= *slot; at++) received[at] += weights[num_prompt + at];
        }
      }
    }
  }
  return true;
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
  return decode(query, new_key, new_value, stores, scaling, output, layer);
}

bool decode_bfloat16(const BFloat16* query, const BFloat16* new_key, const BFloat16* new_value,
                     const Store<BFloat16>* stores, float scaling, BFloat16* output, const Layer* layer) {
  return decode(query, new_key, new_value, stores, scaling, output, layer);
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
