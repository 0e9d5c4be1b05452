// The module torchrec_pt._C. Operators register themselves (one folder each); what is here is
// the module and what it says about its own build.

#include <pybind11/pybind11.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/library.h>

#include <string>

namespace py = pybind11;

TORCH_LIBRARY(torchrec_pt, m) {}

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_flags"] = TORCHREC_PT_CXX_FLAGS;
  info["cuda_archs"] = TORCHREC_PT_CUDA_ARCHS;
  info["torch_version"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of torchrec_pt; importing it registers torch.ops.torchrec_pt";
  m.def("build_info", &build_info,
        "Compiler, C++ flags, CUDA architectures (or \"none\") and torch of this build.");
}
