// ncfast._cpu: addresses in, the GIL released, no mathematics. Callers in Python have checked the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/affine_argmax.h"
#include "cpu/class_scatter.h"
#include "cpu/isa.h"
#include "cpu/pair_geometry.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T named(const std::map<std::string, T>& values, const std::string& name) {
  const auto found = values.find(name);
  if (found == values.end()) throw std::invalid_argument("unknown name '" + name + "'");
  return found->second;
}

const std::map<std::string, ncfast::Dtype> kDtypes = {{"float32", ncfast::Dtype::float32},
                                                      {"float64", ncfast::Dtype::float64},
                                                      {"bfloat16", ncfast::Dtype::bfloat16},
                                                      {"float16", ncfast::Dtype::float16}};
const std::map<std::string, ncfast::Precision> kPrecisions = {{"highest", ncfast::Precision::highest},
                                                              {"high", ncfast::Precision::high},
                                                              {"medium", ncfast::Precision::medium}};

#if defined(__x86_64__)
using ncfast::Isa;
const std::map<std::string, std::vector<Isa>> kBodies = {
    {"class_scatter", {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}},
    {"affine_argmax", {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::amx}},
    {"pair_geometry", {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}}};
#else
const std::vector<ncfast::Isa> kPortable = {ncfast::Isa::portable};
const std::map<std::string, std::vector<ncfast::Isa>> kBodies = {
    {"class_scatter", kPortable}, {"affine_argmax", kPortable}, {"pair_geometry", kPortable}};
#endif

ncfast::Isa selected(const std::string& operation) { return ncfast::select(named(kBodies, operation)); }

// Lets Ctrl-C through, a few times a second.
class Interruptible {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + std::chrono::milliseconds(200);
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point next_ =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
};

const std::map<ncfast::Refusal, std::string> kRefusals = {{ncfast::Refusal::none, ""},
                                                          {ncfast::Refusal::label, "label"},
                                                          {ncfast::Refusal::nonfinite, "nonfinite"},
                                                          {ncfast::Refusal::room, "room"}};

enum class Mode {
  whole,     // results anew, with the whole scatter, interruptible
  update,    // class_scatter_update: added, the upper triangle of the scatter
  admitted,  // the same for rows that class_scatter_admit has let wait
};
const std::map<std::string, Mode> kModes = {
    {"whole", Mode::whole}, {"update", Mode::update}, {"admitted", Mode::admitted}};

// Returns what is refused, or "" for nothing.
std::string class_scatter(Address features, const std::string& dtype, int64_t N, int64_t p, int64_t row_bytes,
                          Address labels, int label_size, int64_t label_bytes, int64_t ignore_index,
                          Address shift, int64_t C, const std::string& precision, Address counts,
                          Address sums, Address sumsq, Address scatter, Address radii, int threads,
                          const std::string& mode_name, Address filled) {
  const Mode mode = named(kModes, mode_name);
  // Those that still wait: a signal handler may have read the state, which adds them.
  const int64_t rows = mode == Mode::admitted ? std::min(N, *at<int64_t>(filled)) : N;
  const ncfast::ClassScatter call = {rows,
                                     p,
                                     C,
                                     named(kDtypes, dtype),
                                     at<void>(features),
                                     row_bytes,
                                     at<void>(labels),
                                     label_size,
                                     label_bytes,
                                     ignore_index,
                                     at<void>(shift),
                                     named(kPrecisions, precision),
                                     at<int64_t>(counts),
                                     at<double>(sums),
                                     at<double>(sumsq),
                                     at<double>(scatter),
                                     at<void>(radii),
                                     mode == Mode::whole,
                                     mode == Mode::whole};
  const ncfast::Isa isa = selected("class_scatter");
  py::gil_scoped_release release;
  switch (mode) {
    case Mode::whole:
      return kRefusals.at(ncfast::class_scatter(call, isa, threads, Interruptible()));
    case Mode::admitted:
      ncfast::class_scatter(call, isa, threads, [] {});
      *at<int64_t>(filled) = 0;  // none waits any longer, even if a signal is handled when this returns
      break;
    case Mode::update:
      return kRefusals.at(ncfast::class_scatter_update(call, at<void>(shift), isa, threads));
  }
  return "";
}

// Returns what class_scatter_admit refuses, or "" for nothing.
std::string class_scatter_admit(Address features, const std::string& dtype, int64_t N, int64_t p,
                                int64_t row_bytes, Address labels, int label_size, int64_t label_bytes,
                                int64_t ignore_index, Address shift, int64_t C, int threads,
                                Address residuals, int64_t residual_row_bytes, Address waiting_labels,
                                Address filled, int64_t room) {
  ncfast::ClassScatter call = {};
  call.N = N;
  call.p = p;
  call.C = C;
  call.dtype = named(kDtypes, dtype);
  call.features = at<void>(features);
  call.row_bytes = row_bytes;
  call.labels = at<void>(labels);
  call.label_size = label_size;
  call.label_bytes = label_bytes;
  call.ignore_index = ignore_index;
  const ncfast::WaitingRows waiting = {at<char>(residuals), residual_row_bytes, at<int64_t>(waiting_labels),
                                       at<int64_t>(filled), room};
  const ncfast::Isa isa = selected("class_scatter");
  py::gil_scoped_release release;
  return kRefusals.at(ncfast::class_scatter_admit(call, at<void>(shift), isa, threads, waiting));
}

void affine_argmax(Address features, const std::string& dtype, int64_t N, int64_t p, int64_t row_bytes,
                   Address middle, const std::vector<py::dict>& rules, int threads) {
  std::vector<ncfast::AffineRule> rule;
  for (const py::dict& r : rules) {
    rule.push_back({r["C"].cast<int64_t>(), at<double>(r["weight"].cast<Address>()),
                    at<double>(r["bias"].cast<Address>()), r["weight_slack"].cast<double>(),
                    r["bias_slack"].cast<double>(), at<int64_t>(r["index"].cast<Address>()),
                    at<bool>(r["decided"].cast<Address>())});
  }
  const ncfast::AffineArgmax call = {N,
                                     p,
                                     named(kDtypes, dtype),
                                     at<void>(features),
                                     row_bytes,
                                     at<float>(middle),
                                     static_cast<int>(rule.size()),
                                     rule.data()};
  const ncfast::Isa isa = selected("affine_argmax");
  py::gil_scoped_release release;
  ncfast::affine_argmax(call, isa, threads, Interruptible());
}

void pair_geometry(Address vectors, int64_t C, int64_t p, Address variances, Address statistics,
                   Address nearest_distance, Address nearest_index, int threads) {
  const ncfast::PairGeometry call = {C,
                                     p,
                                     at<double>(vectors),
                                     at<double>(variances),
                                     at<ncfast::PairStatistics>(statistics),
                                     at<double>(nearest_distance),
                                     at<int64_t>(nearest_index)};
  const ncfast::Isa isa = selected("pair_geometry");
  py::gil_scoped_release release;
  ncfast::pair_geometry(call, isa, threads, Interruptible());
}

double etf_error(Address left, Address right, int64_t C, int64_t p, int threads) {
  const ncfast::EtfError call = {C, p, at<double>(left), at<double>(right)};
  const ncfast::Isa isa = selected("pair_geometry");
  py::gil_scoped_release release;
  return ncfast::etf_error(call, isa, threads, Interruptible());
}

void decision_radius(Address weight, Address bias, int64_t C, int64_t p, Address anchors, Address classes,
                     int64_t A, Address radii, bool bound, int threads) {
  const ncfast::DecisionRadius call = {C,
                                       p,
                                       A,
                                       at<double>(weight),
                                       at<double>(bias),
                                       at<double>(anchors),
                                       at<int64_t>(classes),
                                       at<double>(radii)};
  const ncfast::Isa isa = selected("pair_geometry");
  py::gil_scoped_release release;
  (bound ? ncfast::decision_bound : ncfast::decision_radius)(call, isa, threads, Interruptible());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels of ncfast, by address.";
  m.def(
      "isas",
      [] {
        std::vector<std::pair<std::string, bool>> listed;
        for (ncfast::Isa isa : ncfast::kIsas) listed.emplace_back(ncfast::name(isa), ncfast::available(isa));
        return listed;
      },
      "(name, available) of every instruction set there are bodies for, from the plainest to the fastest.");
  m.def(
      "isa", [](const std::string& operation) { return ncfast::name(selected(operation)); }, "operation"_a,
      "The instruction set `operation` runs on; NCFAST_CPU_ISA forces one.");
  m.def(
      "bodies",
      [](const std::string& operation) {
        std::vector<std::string> names;
        for (ncfast::Isa isa : named(kBodies, operation)) {
          if (ncfast::available(isa)) names.emplace_back(ncfast::name(isa));
        }
        return names;
      },
      "operation"_a, "The instruction sets that `operation` can run on here.");
  m.def("class_scatter", &class_scatter, "features"_a, "dtype"_a, "N"_a, "p"_a, "row_bytes"_a, "labels"_a,
        "label_size"_a, "label_bytes"_a, "ignore_index"_a, "shift"_a, "C"_a, "precision"_a, "counts"_a,
        "sums"_a, "sumsq"_a, "scatter"_a, "radii"_a, "threads"_a, "mode"_a, "filled"_a);
  m.def("class_scatter_admit", &class_scatter_admit, "features"_a, "dtype"_a, "N"_a, "p"_a, "row_bytes"_a,
        "labels"_a, "label_size"_a, "label_bytes"_a, "ignore_index"_a, "shift"_a, "C"_a, "threads"_a,
        "residuals"_a, "residual_row_bytes"_a, "waiting_labels"_a, "filled"_a, "room"_a);
  m.def("affine_argmax", &affine_argmax, "features"_a, "dtype"_a, "N"_a, "p"_a, "row_bytes"_a, "middle"_a,
        "rules"_a, "threads"_a);
  m.def("pair_geometry", &pair_geometry, "vectors"_a, "C"_a, "p"_a, "variances"_a, "statistics"_a,
        "nearest_distance"_a, "nearest_index"_a, "threads"_a);
  m.def("etf_error", &etf_error, "left"_a, "right"_a, "C"_a, "p"_a, "threads"_a);
  m.def("decision_radius", &decision_radius, "weight"_a, "bias"_a, "C"_a, "p"_a, "anchors"_a, "classes"_a,
        "A"_a, "radii"_a, "bound"_a, "threads"_a);
}
