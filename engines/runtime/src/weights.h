/// The decoder's weights in memory once, whatever the number of graphs that use them.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace skipvision {

/// A tensor of an .onnx file that is stored in another file.
struct ExternalTensor {
  std::string name;
  std::string file;  // beside the .onnx file
  std::vector<std::int64_t> shape;
  int dtype = 0;  // onnx.TensorProto.DataType, whose numbers ONNX Runtime shares
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// Those of a graph, read from its protobuf; throws Error, which names `file`, where it is none.
std::vector<ExternalTensor> external_tensors(std::string_view model, const std::string& file);

/// Files mapped into memory, and tensors over them. Must outlive the sessions.
class SharedWeights {
 public:
  SharedWeights();

  /// Gives a session the graph's external tensors without a copy; throws Error where they do not
  /// fit their file.
  ///
  /// Floating-point weights are then read as they lie, for packed ones would be a second copy:
  /// prefill packs as it goes, and decode's products with one row are faster without. Quantized
  /// weights have fast kernels for packed ones only; those are packed once for all sessions.
  void add_to(Ort::SessionOptions& options, const std::filesystem::path& graph);
  OrtPrepackedWeightsContainer* packed() const { return packed_.get(); }

 private:
  struct Mapping {
    std::shared_ptr<void> data;
    std::uint64_t bytes = 0;
  };
  const Mapping& mapping(const std::filesystem::path& file);

  std::map<std::filesystem::path, Mapping> mappings_;
  std::vector<Ort::Value> tensors_;
  std::unique_ptr<OrtPrepackedWeightsContainer, void (*)(OrtPrepackedWeightsContainer*)> packed_;
};

}  // namespace skipvision
