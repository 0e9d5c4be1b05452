// See infonce_rows.h.

#include "infonce/infonce_rows.h"

#include <limits>

#include "cpu/simd.h"

namespace torchrec_pt {
namespace {

template <typename T>
TORCHREC_PT_INLINE T max_logit_loop(const T* z, const T* shift, int64_t size, T inverse_tau) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < size; ++j) {
    const T s = z[j] * inverse_tau + shift[j];
    highest = s > highest ? s : highest;
  }
  return highest;
}

template <typename T>
TORCHREC_PT_INLINE ExpSums<T> exp_sums_loop(const T* z, const T* shift, int64_t size, T inverse_tau,
                                            T highest) {
  T sum = 0;
  T dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t j = 0; j < size; ++j) {
    const T e = fast_exp(z[j] * inverse_tau + shift[j] - highest);
    sum += e;
    dot += e == 0 ? 0 : e * z[j];  // 0 * -inf would be NaN
  }
  return {sum, dot};
}

template <typename T>
TORCHREC_PT_INLINE ExpSums<T> exp_in_place_loop(T* z, const T* shift, int64_t size, T inverse_tau,
                                                T highest) {
  T sum = 0;
  T dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t j = 0; j < size; ++j) {
    const T e = fast_exp(z[j] * inverse_tau + shift[j] - highest);
    sum += e;
    dot += e == 0 ? 0 : e * z[j];  // 0 * -inf would be NaN
    z[j] = e;
  }
  return {sum, dot};
}

template <typename T>
TORCHREC_PT_INLINE void softmax_loop(T* z, const T* shift, int64_t size, T inverse_tau, T lse,
                                     T grad) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    z[j] = grad * fast_exp(z[j] * inverse_tau + shift[j] - lse);
  }
}

template <typename T>
TORCHREC_PT_INLINE void softmax_both_loop(T* z, const T* shift, const T* column_lse,
                                          const T* column_grad, int64_t size, T inverse_tau, T lse,
                                          T grad) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const T logit = z[j] * inverse_tau;
    z[j] =
        grad * fast_exp(logit + shift[j] - lse) + column_grad[j] * fast_exp(logit - column_lse[j]);
  }
}

template <typename T>
TORCHREC_PT_INLINE void column_max_loop(const T* z, int64_t size, T* highest) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) highest[j] = z[j] > highest[j] ? z[j] : highest[j];
}

template <typename T>
TORCHREC_PT_INLINE void add_column_exps_loop(const T* z, const T* highest, int64_t size,
                                             T inverse_tau, T* sum, T* dot) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const T e = fast_exp((z[j] - highest[j]) * inverse_tau);
    sum[j] += e;
    dot[j] += e == 0 ? 0 : e * z[j];  // 0 * -inf would be NaN
  }
}

template <typename T>
TORCHREC_PT_INLINE void mask_equal_loop(T* z, const int64_t* ids, int64_t size, int64_t id) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    z[j] = ids[j] == id ? -std::numeric_limits<T>::infinity() : z[j];
  }
}

}  // namespace

TORCHREC_PT_CLONES float max_logit(const float* z, const float* shift, int64_t size,
                                   float inverse_tau) {
  return max_logit_loop(z, shift, size, inverse_tau);
}
TORCHREC_PT_CLONES ExpSums<float> exp_sums(const float* z, const float* shift, int64_t size,
                                           float inverse_tau, float highest) {
  return exp_sums_loop(z, shift, size, inverse_tau, highest);
}
TORCHREC_PT_CLONES ExpSums<float> exp_in_place(float* z, const float* shift, int64_t size,
                                               float inverse_tau, float highest) {
  return exp_in_place_loop(z, shift, size, inverse_tau, highest);
}
TORCHREC_PT_CLONES void softmax(float* z, const float* shift, int64_t size, float inverse_tau,
                                float lse, float grad) {
  softmax_loop(z, shift, size, inverse_tau, lse, grad);
}
TORCHREC_PT_CLONES void softmax_both(float* z, const float* shift, const float* column_lse,
                                     const float* column_grad, int64_t size, float inverse_tau,
                                     float lse, float grad) {
  softmax_both_loop(z, shift, column_lse, column_grad, size, inverse_tau, lse, grad);
}
TORCHREC_PT_CLONES void column_max(const float* z, int64_t size, float* highest) {
  column_max_loop(z, size, highest);
}
TORCHREC_PT_CLONES void add_column_exps(const float* z, const float* highest, int64_t size,
                                        float inverse_tau, float* sum, float* dot) {
  add_column_exps_loop(z, highest, size, inverse_tau, sum, dot);
}
TORCHREC_PT_CLONES void mask_equal(float* z, const int64_t* ids, int64_t size, int64_t id) {
  mask_equal_loop(z, ids, size, id);
}

// float64 is for gradcheck: compiled once.
double max_logit(const double* z, const double* shift, int64_t size, double inverse_tau) {
  return max_logit_loop(z, shift, size, inverse_tau);
}
ExpSums<double> exp_sums(const double* z, const double* shift, int64_t size, double inverse_tau,
                         double highest) {
  return exp_sums_loop(z, shift, size, inverse_tau, highest);
}
ExpSums<double> exp_in_place(double* z, const double* shift, int64_t size, double inverse_tau,
                             double highest) {
  return exp_in_place_loop(z, shift, size, inverse_tau, highest);
}
void softmax(double* z, const double* shift, int64_t size, double inverse_tau, double lse,
             double grad) {
  softmax_loop(z, shift, size, inverse_tau, lse, grad);
}
void softmax_both(double* z, const double* shift, const double* column_lse,
                  const double* column_grad, int64_t size, double inverse_tau, double lse,
                  double grad) {
  softmax_both_loop(z, shift, column_lse, column_grad, size, inverse_tau, lse, grad);
}
void column_max(const double* z, int64_t size, double* highest) {
  column_max_loop(z, size, highest);
}
void add_column_exps(const double* z, const double* highest, int64_t size, double inverse_tau,
                     double* sum, double* dot) {
  add_column_exps_loop(z, highest, size, inverse_tau, sum, dot);
}
void mask_equal(double* z, const int64_t* ids, int64_t size, int64_t id) {
  mask_equal_loop(z, ids, size, id);
}

}  // namespace torchrec_pt
