// The tile kernels for CPUs: kernels/reference.py says what each computes and what every argument means.
//
// One thread owns one row, or a run of columns for their statistic. The loops are plain C++ without branches, so that the compiler turns them into the vector
// instructions of whatever this file is compiled for; CMakeLists.txt compiles it once per instruction set, with ISA
// naming the copy. A null pointer stands for an absent bias or absent ids, softcap = 0 for none.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#define NAME2(base, isa) base##_##isa
#define NAME(base, isa) NAME2(base, isa)
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t CHUNK = 512;  // columns summed in float before they join a double: 2 KB, stays in L1

template <class To, class From>
inline To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp with under 2 ulp of error for x <= 88; 0 below -87.3 (also at -inf); NaN stays NaN.
// 2^n * exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2; polynomial: Cephes expf (Moshier).
inline float fast_exp(float x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  float clamped = x < -87.3f ? -87.3f : x;
  clamped = clamped > 88.f ? 88.f : clamped;
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const float power = bits<float>((bits<int32_t>(shifted) + 127) << 23);  // the magic's own bits leave on the left
  const float y = p * power;
  return x < -87.3f ? 0.f : (x > 88.f ? INF : y);
}

// tanh: a polynomial near 0 (Cephes tanhf, Moshier), 1 - 2 / (exp(2x) + 1) elsewhere.
inline float fast_tanh(float x) {
  const float magnitude = std::fabs(x), x2 = x * x;
  float p = -5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const float small = p * x2 * x + x;
  const float large = 1.f - 2.f / (fast_exp(2.f * magnitude) + 1.f);
  return magnitude < 0.625f ? small : (x < 0.f ? -large : large);
}

// log(1 + u) for u in [0, 1], to the last digits of a tiny u too: 2 atanh(u / (2 + u)), whose series is below
// 2e-9 of it after s^15.
inline float fast_log1p(float u) {
  const float s = u / (2.f + u), s2 = s * s;
  float p = 2.f / 15.f;
  p = p * s2 + 2.f / 13.f;
  p = p * s2 + 2.f / 11.f;
  p = p * s2 + 2.f / 9.f;
  p = p * s2 + 2.f / 7.f;
  p = p * s2 + 2.f / 5.f;
  p = p * s2 + 2.f / 3.f;
  return s * (p * s2 + 2.f);
}

inline float fast_softplus(float y, float e) { return (y > 0.f ? y : 0.f) + fast_log1p(e); }  // e = exp(-|y|)

inline float fast_sigmoid(float y, float e) { return (y < 0.f ? e : 1.f) / (1.f + e); }

struct Features {  // what turns an inner product into a logit
  const float* bias;
  const int64_t* col_id;
  const float* soft;  // column weights of the soft targets
  float scale, softcap;
  float margin;  // of the target's logit
};

struct Row {  // what masks columns of a row, the target excepted
  const int64_t* id;
  const float* limit;
};

// Logits of a run of columns of one row. The target is exempt from masks and has a margin; its caller restores it.
template <bool CAP>
inline void run_logits(const float* dot, int64_t first, int64_t n, const Features& f, Row row, float* z) {
  const float scale = f.scale;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] = dot[first + j] * scale;
  if (f.bias) {
    const float* bias = f.bias + first;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] += bias[j];
  }
  if (CAP) {
    const float cap = f.softcap, inverse = 1.f / f.softcap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] = cap * fast_tanh(z[j] * inverse);
  }
  if (row.limit) {
    const float limit = *row.limit;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] = dot[first + j] * scale > limit ? -INF : z[j];
  }
  if (row.id) {
    const int64_t id = *row.id;
    const int64_t* col_id = f.col_id + first;
    for (int64_t j = 0; j < n; ++j) z[j] = col_id[j] == id ? -INF : z[j];
  }
}

template <bool CAP>
float one_logit(const float* dot, int64_t at, const Features& f) {
  float z;
  run_logits<CAP>(dot, at, 1, f, {}, &z);
  return z;
}

template <bool CAP>
void stats_row(const float* dot, int64_t S, int64_t own, const Features& f, Row row, float& max_state,
               float& sum_state, float& dot_state, float& target_state, float& soft_state, int32_t& above_state) {
  const bool mine = own >= 0 && own < S;
  if (mine) target_state = one_logit<CAP>(dot, own, f);
  const float threshold = target_state;
  const bool masks = row.id || row.limit;
  float z[CHUNK];
  float top = max_state;
  double sum = sum_state, edot = dot_state, soft = soft_state;
  int64_t above = above_state;
  for (int64_t first = 0; first < S; first += CHUNK) {
    const int64_t n = std::min(CHUNK, S - first);
    run_logits<CAP>(dot, first, n, f, row, z);
    if (mine && own >= first && own < first + n) z[own - first] = target_state - f.margin;
    float chunk_top = -INF;
    int32_t chunk_above = 0;
#pragma omp simd reduction(max : chunk_top) reduction(+ : chunk_above)
    for (int64_t j = 0; j < n; ++j) {
      chunk_top = z[j] > chunk_top ? z[j] : chunk_top;
      chunk_above += z[j] > threshold ? 1 : 0;
    }
    above += chunk_above;
    const float next = std::max(top, chunk_top);  // a NaN never wins here; it enters through the sum
    const float safe = next == -INF ? 0.f : next;
    if (next > top) {
      const double lag = top == -INF ? 0. : double(top) - double(next);
      const double decay = top == -INF ? 0. : std::exp(lag);
      edot = (edot + sum * lag) * decay;
      sum *= decay;
    }
    float chunk_sum = 0.f, chunk_dot = 0.f;
#pragma omp simd reduction(+ : chunk_sum, chunk_dot)
    for (int64_t j = 0; j < n; ++j) {
      const float e = fast_exp(z[j] - safe);
      chunk_sum += e;
      chunk_dot += e == 0.f ? 0.f : e * (z[j] - safe);
    }
    sum += chunk_sum;
    edot += chunk_dot;
    if (f.soft) {
      float chunk_soft = 0.f;
#pragma omp simd reduction(+ : chunk_soft)
      for (int64_t j = 0; j < n; ++j) {
        const float weight = f.soft[first + j];
        chunk_soft += weight == 0.f || (masks && z[j] == -INF) ? 0.f : weight * z[j];
      }
      soft += chunk_soft;
    }
    top = next;
  }
  max_state = top;
  sum_state = float(sum);
  dot_state = float(edot);
  soft_state = float(soft);
  above_state = int32_t(above);
}

// What a softmax over the rows adds to the gradient: a[j] exp(z - shift[j]). Where all shifts of rows and columns lie
// within SPAN of `base`, the largest, one exp(z - base) serves both, with scaled[j] = a[j] exp(base - shift[j]).
struct Columns {
  const float *shift, *a, *scaled;
  float base;
};

constexpr float SPAN = 40.f;  // what underflows then is below exp(-47) of its softmax

template <bool CAP>
void grad_row(const float* dot, float* out, int64_t S, int64_t own, const Features& f, Row row, float shift, float a,
              float b, float e, float h, const Columns& columns) {
  if (a == 0.f && b == 0.f && e == 0.f && !columns.a) {
    std::fill(out, out + S, 0.f);
    return;
  }
  const bool mine = own >= 0 && own < S;
  const float target_logit = mine ? one_logit<CAP>(dot, own, f) : 0.f;  // read before `out`, which may be `dot`, is written
  const bool masks = row.id || row.limit;
  float z[CHUNK];
  const float inverse = CAP ? 1.f / f.softcap : 0.f;
  for (int64_t first = 0; first < S; first += CHUNK) {
    const int64_t n = std::min(CHUNK, S - first);
    run_logits<CAP>(dot, first, n, f, row, z);
    if (mine && own >= first && own < first + n) z[own - first] = target_logit - f.margin;
    float* c = out + first;
    if (columns.scaled) {
      const float base = columns.base, *scaled = columns.scaled + first;
      const float of_row = a == 0.f ? 0.f : float(a * std::exp(double(base) - shift));
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {  // where neither has a weight z may be far above the base
        const float factor = of_row + scaled[j];
        c[j] = factor == 0.f ? 0.f : fast_exp(z[j] - base) * factor;
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float p = fast_exp(z[j] - shift);
        c[j] = p == 0.f ? 0.f : (a + h * (z[j] - shift)) * p;
      }
      if (columns.a) {
        const float *shifts = columns.shift + first, *weights = columns.a + first;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) c[j] += weights[j] * fast_exp(z[j] - shifts[j]);
      }
    }
    if (f.soft) {
      const float* soft = f.soft + first;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] -= masks && z[j] == -INF ? 0.f : e * soft[j];
    }
    if (mine && own >= first && own < first + n) c[own - first] -= b;
    if (CAP) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float t = z[j] * inverse;
        c[j] = z[j] == -INF ? 0.f : c[j] * (1.f - t * t);
      }
    }
  }
}

// The least and the largest shift of rows and columns that have a weight.
inline std::pair<float, float> span(const float* shift, const float* a, int64_t R, const float* col_shift,
                                    const float* col_a, int64_t S) {
  float low = INF, high = -INF;
  const auto take = [&](float s, float weight) {
    if (weight == 0.f) return;
    low = s < low ? s : low;
    high = s > high ? s : high;
  };
  for (int64_t r = 0; r < R; ++r) take(shift[r], a[r]);
  for (int64_t j = 0; j < S; ++j) take(col_shift[j], col_a[j]);
  return {low, high};
}

// Merge n <= CHUNK columns of a tile into their running statistic, ROWS rows at a time: those stay in the cache.
constexpr int64_t ROWS = 32;

template <bool CAP>
void stats_columns(const float* dot, int64_t R, int64_t stride, int64_t first, int64_t n, int64_t col0, const int64_t* target,
                   const Features& f, const int64_t* row_id, const float* limit, float* max_state, float* sum_state,
                   float* dot_state) {
  float logits[ROWS * CHUNK], top[CHUNK], chunk_sum[CHUNK], chunk_dot[CHUNK];
  double sum[CHUNK], edot[CHUNK];
  for (int64_t j = 0; j < n; ++j) sum[j] = sum_state[j], edot[j] = dot_state[j];
  for (int64_t start = 0; start < R; start += ROWS) {
    const int64_t rows = std::min(ROWS, R - start);
    std::copy(max_state, max_state + n, top);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = start + i, own = target[r] - col0;
      float* z = logits + i * n;
      run_logits<CAP>(dot + r * stride, first, n, f, {row_id ? row_id + r : nullptr, limit ? limit + r : nullptr}, z);
      if (own >= first && own < first + n) z[own - first] = one_logit<CAP>(dot + r * stride, own, f) - f.margin;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) top[j] = z[j] > top[j] ? z[j] : top[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (top[j] > max_state[j]) {
        const double lag = max_state[j] == -INF ? 0. : double(max_state[j]) - double(top[j]);
        const double decay = max_state[j] == -INF ? 0. : std::exp(lag);
        edot[j] = (edot[j] + sum[j] * lag) * decay;
        sum[j] *= decay;
        max_state[j] = top[j];
      }
      top[j] = top[j] == -INF ? 0.f : top[j];
      chunk_sum[j] = chunk_dot[j] = 0.f;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* z = logits + i * n;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float e = fast_exp(z[j] - top[j]);
        chunk_sum[j] += e;
        chunk_dot[j] += e == 0.f ? 0.f : e * (z[j] - top[j]);
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += chunk_sum[j], edot[j] += chunk_dot[j];
  }
  for (int64_t j = 0; j < n; ++j) sum_state[j] = float(sum[j]), dot_state[j] = float(edot[j]);
}

// The target counts as masked in these loops, and is added apart: its sign is the other one.
void sigmoid_stats_row(const float* dot, int64_t S, int64_t own, const Features& f, Row row, float& sum_state,
                       float& dot_state, float& soft_state) {
  const bool mine = own >= 0 && own < S;
  float y[CHUNK];
  double sum = sum_state, edot = dot_state, soft = soft_state;
  for (int64_t first = 0; first < S; first += CHUNK) {
    const int64_t n = std::min(CHUNK, S - first);
    run_logits<false>(dot, first, n, f, row, y);
    if (mine && own >= first && own < first + n) y[own - first] = -INF;
    const float* d = dot + first;
    float chunk_sum = 0.f, chunk_dot = 0.f, chunk_soft = 0.f;
#pragma omp simd reduction(+ : chunk_sum, chunk_dot, chunk_soft)
    for (int64_t j = 0; j < n; ++j) {
      const float e = fast_exp(-std::fabs(y[j])), g = fast_sigmoid(y[j], e);
      chunk_sum += fast_softplus(y[j], e);
      chunk_soft += g;
      chunk_dot += g * d[j];
    }
    sum += chunk_sum;
    soft += chunk_soft;
    edot += double(chunk_dot) * f.scale;
  }
  if (mine) {
    const float own_y = -one_logit<false>(dot, own, f), e = fast_exp(-std::fabs(own_y)), g = fast_sigmoid(own_y, e);
    sum += fast_softplus(own_y, e);
    soft -= g;
    edot -= double(g) * dot[own] * f.scale;
  }
  sum_state = float(sum);
  dot_state = float(edot);
  soft_state = float(soft);
}

void sigmoid_grad_row(const float* dot, float* out, int64_t S, int64_t own, const Features& f, Row row, float a) {
  if (a == 0.f) {
    std::fill(out, out + S, 0.f);
    return;
  }
  const bool mine = own >= 0 && own < S;
  const float own_y = mine ? -one_logit<false>(dot, own, f) : 0.f;  // read before `out`, which may be `dot`, is written
  float y[CHUNK];
  for (int64_t first = 0; first < S; first += CHUNK) {
    const int64_t n = std::min(CHUNK, S - first);
    run_logits<false>(dot, first, n, f, row, y);
    float* c = out + first;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) c[j] = a * fast_sigmoid(y[j], fast_exp(-std::fabs(y[j])));
  }
  if (mine) out[own] = -a * fast_sigmoid(own_y, fast_exp(-std::fabs(own_y)));
}

}  // namespace

EXPORT void NAME(cosup_tile_stats, ISA)(const float* dot, int64_t R, int64_t S, int64_t stride, float* max, float* sum,
                                        float* edot, float* target_logit, float* softdot, int32_t* above, int64_t col0,
                                        const int64_t* target, const float* scale, const float* bias,
                                        const int64_t* row_id, const int64_t* col_id, float softcap, const float* soft,
                                        float margin, const float* limit, int threads) {
  const Features f{bias, col_id, soft, *scale, softcap, margin * *scale};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < R; ++r) {
    auto* row = softcap != 0.f ? stats_row<true> : stats_row<false>;
    row(dot + r * stride, S, target[r] - col0, f, {row_id ? row_id + r : nullptr, limit ? limit + r : nullptr}, max[r],
        sum[r], edot[r], target_logit[r], softdot[r], above[r]);
  }
}

EXPORT void NAME(cosup_tile_grad, ISA)(const float* dot, float* out, int64_t R, int64_t S, int64_t stride,
                                       const float* shift, const float* a, const float* b, int64_t col0,
                                       const int64_t* target, const float* scale, const float* bias,
                                       const int64_t* row_id, const int64_t* col_id, float softcap, const float* soft,
                                       float margin, const float* limit, const float* e, const float* h,
                                       const float* col_shift, const float* col_a, int threads) {
  const Features f{bias, col_id, soft, *scale, softcap, margin * *scale};
  Columns columns{col_shift, col_a, nullptr, 0.f};
  std::vector<float> scaled;
  if (col_a && !h) {
    const auto [low, high] = span(shift, a, R, col_shift, col_a, S);
    if (high - low <= SPAN) {
      scaled.resize(S);
      for (int64_t j = 0; j < S; ++j) scaled[j] = col_a[j] == 0.f ? 0.f : float(col_a[j] * std::exp(double(high) - col_shift[j]));
      columns.scaled = scaled.data();
      columns.base = high;
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < R; ++r) {
    auto* row = softcap != 0.f ? grad_row<true> : grad_row<false>;
    row(dot + r * stride, out + r * stride, S, target[r] - col0, f,
        {row_id ? row_id + r : nullptr, limit ? limit + r : nullptr}, shift[r], a[r], b[r], e ? e[r] : 0.f,
        h ? h[r] : 0.f, columns);
  }
}

EXPORT void NAME(cosup_column_stats, ISA)(const float* dot, int64_t R, int64_t S, int64_t stride, float* max, float* sum,
                                          float* edot, int64_t col0, const int64_t* target, const float* scale,
                                          const float* bias, const int64_t* row_id, const int64_t* col_id, float softcap,
                                          float margin, const float* limit, int threads) {
  const Features f{bias, col_id, nullptr, *scale, softcap, margin * *scale};
  const int64_t share = (S + threads - 1) / threads, run = std::min(CHUNK, (share + 15) / 16 * 16);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < S; first += run) {
    auto* columns = softcap != 0.f ? stats_columns<true> : stats_columns<false>;
    columns(dot, R, stride, first, std::min(run, S - first), col0, target, f, row_id, limit, max + first, sum + first,
            edot + first);
  }
}

EXPORT void NAME(cosup_sigmoid_stats, ISA)(const float* dot, int64_t R, int64_t S, int64_t stride, float* sum,
                                           float* edot, float* soft, int64_t col0, const int64_t* target,
                                           const float* scale, const float* bias, const int64_t* row_id,
                                           const int64_t* col_id, int threads) {
  const Features f{bias, col_id, nullptr, *scale, 0.f, 0.f};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < R; ++r)
    sigmoid_stats_row(dot + r * stride, S, target[r] - col0, f, {row_id ? row_id + r : nullptr, nullptr}, sum[r],
                      edot[r], soft[r]);
}

EXPORT void NAME(cosup_sigmoid_grad, ISA)(const float* dot, float* out, int64_t R, int64_t S, int64_t stride,
                                          const float* a, int64_t col0, const int64_t* target, const float* scale,
                                          const float* bias, const int64_t* row_id, const int64_t* col_id, int threads) {
  const Features f{bias, col_id, nullptr, *scale, 0.f, 0.f};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < R; ++r)
    sigmoid_grad_row(dot + r * stride, out + r * stride, S, target[r] - col0, f,
                     {row_id ? row_id + r : nullptr, nullptr}, a[r]);
}
