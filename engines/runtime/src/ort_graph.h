/// One ONNX graph of a bundle in ONNX Runtime, and the tensors that it takes.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "manifest.h"

namespace skipvision {

using Shape = std::vector<std::int64_t>;

/// A tensor over memory that outlives it.
Ort::Value view(std::vector<std::int64_t>& data, const Shape& shape);
/// A new tensor of `dtype`, "float" or "float16", uninitialized.
Ort::Value make_tensor(const std::string& dtype, const Shape& shape);
/// The same with these values.
Ort::Value make_tensor(const std::string& dtype, const Shape& shape,
                       const std::vector<float>& data);
/// The values of a float or float16 tensor.
void read_floats(const Ort::Value& tensor, std::vector<float>& values);
Shape shape_of(const Ort::Value& tensor);
/// Bytes of one element of a float or float16 tensor.
std::size_t element_bytes(const Ort::Value& tensor);

/// Throws Error where the library is older than the headers that this was compiled with.
void check_onnxruntime();

/// The error's first line behind `what`, as an Error.
[[noreturn]] void throw_ort_error(const std::string& what, const std::exception& error);

/// Runs `call`; what ONNX Runtime throws becomes an Error that starts with `what`.
template <typename Call>
auto guarded(const std::string& what, Call call) -> decltype(call()) {
  try {
    return call();
  } catch (const Ort::Exception& error) {
    throw_ort_error(what, error);
  }
}

class OrtGraph {
 public:
  using Feeds = std::vector<std::pair<std::string, Ort::Value>>;

  /// Creates the session; `packed` holds what sessions share of their packed weights. Throws Error
  /// that names the file where ONNX Runtime refuses it.
  OrtGraph(const Ort::Env& env, const std::filesystem::path& folder, const GraphInfo& info,
           const Ort::SessionOptions& options, OrtPrepackedWeightsContainer* packed);

  /// The outputs, in the manifest's order.
  std::vector<Ort::Value> run(const Feeds& feeds) const;
  void run(const Ort::IoBinding& binding) const;
  Ort::IoBinding binding() const;
  const GraphInfo& info() const { return *info_; }
  /// The manifest's type of an input; throws Error where it has none such.
  const std::string& input_dtype(const std::string& name) const;

 private:
  std::string file_;
  const GraphInfo* info_;
  mutable Ort::Session session_{nullptr};  // Run is not const, though threads may share a session
};

}  // namespace skipvision
