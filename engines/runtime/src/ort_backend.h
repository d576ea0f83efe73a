/// The graphs of a bundle in ONNX Runtime (skipvision_export/runtime/generation.py, kv_cache.py).
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>

#include "backend.h"
#include "batch.h"
#include "ort_graph.h"
#include "weights.h"

namespace skipvision {

class OrtBackend : public Backend {
 public:
  /// Creates the sessions; `manifest` must outlive it. threads: 0 lets ONNX Runtime choose.
  OrtBackend(const std::filesystem::path& folder, const Manifest& manifest, int threads);

  std::unique_ptr<Sequence> prefill(const std::vector<ModelInput>& inputs) const override;

 private:
  std::unique_ptr<OrtGraph> load(const std::string& name) const;
  std::unique_ptr<OrtGraph> load_decoder(const std::string& name) const;
  /// The graph that prefills rows with or without padding on the left.
  const OrtGraph& prefill_graph(bool padded) const;
  Ort::Value encode(const std::vector<ModelInput>& inputs) const;
  Ort::Value embed(PromptBatch& batch, Ort::Value features) const;

  const std::filesystem::path folder_;
  const Manifest& manifest_;
  Ort::Env env_;
  Ort::SessionOptions options_;
  std::unique_ptr<SharedWeights> weights_;
  std::unique_ptr<OrtGraph> vision_, embed_, prefill_, decode_;
  mutable std::mutex creating_;
  mutable std::unique_ptr<OrtGraph> padded_prefill_;  // created when a batch first needs it
  bool shared_cache_ = false;
};

}  // namespace skipvision
