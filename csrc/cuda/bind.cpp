// ncfast._cuda: addresses and a stream in, nothing waited for. Callers in Python have checked the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/certify.h"
#include "cuda/class_moments.h"
#include "cuda/class_scatter.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

ncfast::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return ncfast::Dtype::float32;
  if (name == "float64") return ncfast::Dtype::float64;
  if (name == "bfloat16") return ncfast::Dtype::bfloat16;
  if (name == "float16") return ncfast::Dtype::float16;
  throw std::invalid_argument("unknown name '" + name + "'");
}

ncfast::ClassMoments class_moments(int64_t N, int64_t p, int64_t C, const std::string& dtype,
                                   Address features, int64_t row_bytes, Address labels, int label_size,
                                   int64_t label_bytes, int64_t ignore_index, Address shift, Address counts,
                                   Address sums, Address sumsq, Address radii) {
  return {N,
          p,
          C,
          dtype_of(dtype),
          at<void>(features),
          row_bytes,
          at<void>(labels),
          label_size,
          label_bytes,
          ignore_index,
          at<void>(shift),
          at<int64_t>(counts),
          at<double>(sums),
          at<double>(sumsq),
          at<void>(radii)};
}

ncfast::ClassScatter class_scatter(const ncfast::ClassMoments& moments, int planes, Address scatter) {
  return {moments, planes, at<double>(scatter)};
}

ncfast::Certify certify(int64_t N, int64_t C, Address radii, int radius_size, Address labels, int label_size,
                        int64_t label_bytes, Address gap, Address first, Address second, double scale,
                        double offset, Address undecided, Address counts) {
  return {N,          C,           at<void>(radii),        radius_size,        at<void>(labels),
          label_size, label_bytes, at<double>(gap),        at<double>(first),  at<double>(second),
          scale,      offset,      at<int64_t>(undecided), at<int64_t>(counts)};
}

template <class Call, std::vector<ncfast::Launch> (*make)(const Call&, void*)>
std::vector<ncfast::Launch> plan(const Call& call, Address workspace) {
  return make(call, at<void>(workspace));
}

template <class Call, ncfast::Carver (*carve)(const Call&)>
int64_t workspace(const Call& call) {
  return carve(call).used();
}

template <class Call, ncfast::Carver (*carve)(const Call&)>
std::vector<std::pair<int64_t, int64_t>> parts(const Call& call) {
  std::vector<std::pair<int64_t, int64_t>> list;
  const ncfast::Carver carver = carve(call);
  for (const ncfast::Carver::Part& part : carver.parts()) list.emplace_back(part.start, part.bytes);
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of ncfast, by address: a call is described, planned and run.";
  py::class_<ncfast::ClassMoments>(m, "ClassMoments");
  py::class_<ncfast::ClassScatter>(m, "ClassScatter");
  py::class_<ncfast::Certify>(m, "Certify");
  m.def("class_moments", &class_moments, "N"_a, "p"_a, "C"_a, "dtype"_a, "features"_a, "row_bytes"_a,
        "labels"_a, "label_size"_a, "label_bytes"_a, "ignore_index"_a, "shift"_a, "counts"_a, "sums"_a,
        "sumsq"_a, "radii"_a);
  m.def("class_scatter", &class_scatter, "moments"_a, "planes"_a, "scatter"_a);
  m.def(
      "class_scatter_shared",
      [](const std::string& dtype, int planes) {
        return ncfast::class_scatter_shared(dtype_of(dtype), planes);
      },
      "dtype"_a, "planes"_a, "Bytes of shared memory that a block takes.");
  m.def("certify", &certify, "N"_a, "C"_a, "radii"_a, "radius_size"_a, "labels"_a, "label_size"_a,
        "label_bytes"_a, "gap"_a, "first"_a, "second"_a, "scale"_a, "offset"_a, "undecided"_a, "counts"_a);

  m.def("refuses", &ncfast::refuses, "device"_a,
        "Why a device cannot run these kernels (no machine code for it, an old driver), or None.");

  const char* bytes = "Bytes of device memory that `plan` needs.";
  m.def("workspace", &workspace<ncfast::ClassMoments, ncfast::class_moments_workspace>, "call"_a, bytes);
  m.def("workspace", &workspace<ncfast::ClassScatter, ncfast::class_scatter_workspace>, "call"_a, bytes);
  m.def("workspace", &workspace<ncfast::Certify, ncfast::certify_workspace>, "call"_a, bytes);
  const char* list = "Its parts as (first byte, bytes), by which tests bound accesses.";
  m.def("parts", &parts<ncfast::ClassMoments, ncfast::class_moments_workspace>, "call"_a, list);
  m.def("parts", &parts<ncfast::ClassScatter, ncfast::class_scatter_workspace>, "call"_a, list);
  m.def("parts", &parts<ncfast::Certify, ncfast::certify_workspace>, "call"_a, list);

  py::class_<ncfast::Launch>(m, "Launch")
      .def_readonly("kernel", &ncfast::Launch::kernel)
      .def_readonly("grid", &ncfast::Launch::grid)
      .def_readonly("block", &ncfast::Launch::block)
      .def_readonly("shared", &ncfast::Launch::shared)
      .def_property_readonly("parameters", [](const ncfast::Launch& launch) {
        return py::bytes(launch.parameters.data(), launch.parameters.size());
      });
  const char* about = "The kernels to launch; needs no GPU.";
  m.def("plan", &plan<ncfast::ClassMoments, ncfast::class_moments_plan>, "call"_a, "workspace"_a, about);
  m.def("plan", &plan<ncfast::ClassScatter, ncfast::class_scatter_plan>, "call"_a, "workspace"_a, about);
  m.def("plan", &plan<ncfast::Certify, ncfast::certify_plan>, "call"_a, "workspace"_a, about);
  m.def(
      "run",
      [](const std::vector<ncfast::Launch>& plan, int device, Address stream) {
        py::gil_scoped_release release;
        ncfast::run(plan, device, at<void>(stream));
      },
      "plan"_a, "device"_a, "stream"_a, "Enqueue a plan on a stream of the device.");
}
