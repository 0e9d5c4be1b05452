// The vectorized loops of infonce over one row of logits on the CPU, or one row's share of the
// columns' sums.
//
//   z_j = q . k_j,  s_j = z_j / tau + shift_j;  a masked z_j is -inf

#pragma once

#include <cstdint>

namespace torchrec_pt {

template <typename T>
struct ExpSums {
  T sum;  // sum_j exp(s_j - highest)
  T dot;  // sum_j exp(s_j - highest) z_j
};

// max_j s_j
float max_logit(const float* z, const float* shift, int64_t size, float inverse_tau);
double max_logit(const double* z, const double* shift, int64_t size, double inverse_tau);

ExpSums<float> exp_sums(const float* z, const float* shift, int64_t size, float inverse_tau,
                        float highest);
ExpSums<double> exp_sums(const double* z, const double* shift, int64_t size, double inverse_tau,
                         double highest);

// The same, and z_j becomes exp(s_j - highest).
ExpSums<float> exp_in_place(float* z, const float* shift, int64_t size, float inverse_tau,
                            float highest);
ExpSums<double> exp_in_place(double* z, const double* shift, int64_t size, double inverse_tau,
                             double highest);

// z_j becomes grad * exp(s_j - lse).
void softmax(float* z, const float* shift, int64_t size, float inverse_tau, float lse, float grad);
void softmax(double* z, const double* shift, int64_t size, double inverse_tau, double lse,
             double grad);

// z_j becomes grad * exp(s_j - lse) + column_grad_j * exp(z_j / tau - column_lse_j).
void softmax_both(float* z, const float* shift, const float* column_lse, const float* column_grad,
                  int64_t size, float inverse_tau, float lse, float grad);
void softmax_both(double* z, const double* shift, const double* column_lse,
                  const double* column_grad, int64_t size, double inverse_tau, double lse,
                  double grad);

// highest_j becomes at least z_j.
void column_max(const float* z, int64_t size, float* highest);
void column_max(const double* z, int64_t size, double* highest);

// e_j = exp((z_j - highest_j) / tau) is added to sum_j, and e_j z_j to dot_j.
void add_column_exps(const float* z, const float* highest, int64_t size, float inverse_tau,
                     float* sum, float* dot);
void add_column_exps(const double* z, const double* highest, int64_t size, double inverse_tau,
                     double* sum, double* dot);

// z_j becomes -inf where ids_j == id.
void mask_equal(float* z, const int64_t* ids, int64_t size, int64_t id);
void mask_equal(double* z, const int64_t* ids, int64_t size, int64_t id);

}  // namespace torchrec_pt
