// See sampled_softmax_rows.h.

#include "sampled_softmax/sampled_softmax_rows.h"

#include "cpu/simd.h"

namespace torchrec_pt {
namespace {

// Four rows at a time: their sums do not wait for each other, and share the loads of the query.
template <typename T>
TORCHREC_PT_INLINE void dots_loop(const T* query, const T* const* rows, int64_t num, int64_t dim,
                                  T* z) {
  int64_t j = 0;
  for (; j + 4 <= num; j += 4) {
    const T *a = rows[j], *b = rows[j + 1], *c = rows[j + 2], *d = rows[j + 3];
    T za = 0, zb = 0, zc = 0, zd = 0;
#pragma omp simd reduction(+ : za, zb, zc, zd)
    for (int64_t i = 0; i < dim; ++i) {
      za += query[i] * a[i];
      zb += query[i] * b[i];
      zc += query[i] * c[i];
      zd += query[i] * d[i];
    }
    z[j] = za, z[j + 1] = zb, z[j + 2] = zc, z[j + 3] = zd;
  }
  for (; j < num; ++j) {
    const T* a = rows[j];
    T za = 0;
#pragma omp simd reduction(+ : za)
    for (int64_t i = 0; i < dim; ++i) za += query[i] * a[i];
    z[j] = za;
  }
}

// Four rows at a time, but one after the other to each sum: its bits do not depend on which rows
// are added in one call.
template <typename T>
TORCHREC_PT_INLINE void add_rows_loop(const T* weight, const T* const* rows, int64_t num,
                                      int64_t dim, T* sum) {
  int64_t j = 0;
  for (; j + 4 <= num; j += 4) {
    const T *a = rows[j], *b = rows[j + 1], *c = rows[j + 2], *d = rows[j + 3];
    const T wa = weight[j], wb = weight[j + 1], wc = weight[j + 2], wd = weight[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
      sum[i] = sum[i] + wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
    }
  }
  for (; j < num; ++j) {
    const T* a = rows[j];
    const T wa = weight[j];
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) sum[i] += wa * a[i];
  }
}

template <typename T>
TORCHREC_PT_INLINE T logits_loop(T* s, const T* shift, int64_t num, T inverse_tau, T highest) {
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < num; ++j) {
    s[j] = s[j] * inverse_tau + shift[j];
    highest = s[j] > highest ? s[j] : highest;
  }
  return highest;
}

template <typename T>
TORCHREC_PT_INLINE T exps_loop(const T* s, int64_t num, T highest, T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < num; ++j) {
    e[j] = fast_exp(s[j] - highest);
    sum += e[j];
  }
  return sum;
}

template <typename T>
TORCHREC_PT_INLINE void scaled_exps_loop(T* s, int64_t num, T highest, T scale) {
#pragma omp simd
  for (int64_t j = 0; j < num; ++j) s[j] = scale * fast_exp(s[j] - highest);
}

}  // namespace

TORCHREC_PT_CLONES void dots(const float* query, const float* const* rows, int64_t num, int64_t dim,
                             float* z) {
  dots_loop(query, rows, num, dim, z);
}
TORCHREC_PT_CLONES void add_rows(const float* weight, const float* const* rows, int64_t num,
                                 int64_t dim, float* sum) {
  add_rows_loop(weight, rows, num, dim, sum);
}
TORCHREC_PT_CLONES float logits(float* s, const float* shift, int64_t num, float inverse_tau,
                                float highest) {
  return logits_loop(s, shift, num, inverse_tau, highest);
}
TORCHREC_PT_CLONES float exps(const float* s, int64_t num, float highest, float* e) {
  return exps_loop(s, num, highest, e);
}
TORCHREC_PT_CLONES void scaled_exps(float* s, int64_t num, float highest, float scale) {
  scaled_exps_loop(s, num, highest, scale);
}

// float64 is for gradcheck: compiled once.
void dots(const double* query, const double* const* rows, int64_t num, int64_t dim, double* z) {
  dots_loop(query, rows, num, dim, z);
}
void add_rows(const double* weight, const double* const* rows, int64_t num, int64_t dim,
              double* sum) {
  add_rows_loop(weight, rows, num, dim, sum);
}
double logits(double* s, const double* shift, int64_t num, double inverse_tau, double highest) {
  return logits_loop(s, shift, num, inverse_tau, highest);
}
double exps(const double* s, int64_t num, double highest, double* e) {
  return exps_loop(s, num, highest, e);
}
void scaled_exps(double* s, int64_t num, double highest, double scale) {
  scaled_exps_loop(s, num, highest, scale);
}

}  // namespace torchrec_pt
