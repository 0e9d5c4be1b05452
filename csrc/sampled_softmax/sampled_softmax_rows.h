// The vectorized loops of sampled_softmax on the CPU: over a block of gathered rows, and over their
// logits.

#pragma once

#include <cstdint>

namespace torchrec_pt {

// z_j = query . row_j
void dots(const float* query, const float* const* rows, int64_t num, int64_t dim, float* z);
void dots(const double* query, const double* const* rows, int64_t num, int64_t dim, double* z);

// sum += sum_j weight_j row_j
void add_rows(const float* weight, const float* const* rows, int64_t num, int64_t dim, float* sum);
void add_rows(const double* weight, const double* const* rows, int64_t num, int64_t dim,
              double* sum);

// s_j becomes s_j / tau + shift_j; returns the largest of them and of `highest`.
float logits(float* s, const float* shift, int64_t num, float inverse_tau, float highest);
double logits(double* s, const double* shift, int64_t num, double inverse_tau, double highest);

// e_j = exp(s_j - highest); returns their sum.
float exps(const float* s, int64_t num, float highest, float* e);
double exps(const double* s, int64_t num, double highest, double* e);

// s_j becomes scale exp(s_j - highest).
void scaled_exps(float* s, int64_t num, float highest, float scale);
void scaled_exps(double* s, int64_t num, double highest, double scale);

}  // namespace torchrec_pt
