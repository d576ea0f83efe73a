/// The graphs of a bundle in ONNX Runtime (skipvision_export/runtime/generation.py, kv_cache.py).
#pragma once

#include <filesystem>
#include <memory>

#include "backend.h"
#include "ort_graph.h"
#include "weights.h"

namespace skipvision {

class OrtBackend : public Backend {
 public:
  /// Creates the four sessions; `manifest` must outlive it. threads: 0 lets ONNX Runtime choose.
  OrtBackend(const std::filesystem::path& folder, const Manifest& manifest, int threads);

  std::unique_ptr<Sequence> prefill(const ModelInput& input) const override;

 private:
  Ort::Value embed(const ModelInput& input, Ort::Value features) const;

  const Manifest& manifest_;
  Ort::Env env_;
  std::unique_ptr<SharedWeights> weights_;
  std::unique_ptr<OrtGraph> vision_, embed_, prefill_, decode_;
  bool shared_cache_ = false;
};

}  // namespace skipvision
