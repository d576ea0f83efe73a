/// The graphs of a bundle in ONNX Runtime (skipvision_export/runtime/generation.py, kv_cache.py).
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backend.h"
#include "batch.h"
#include "ort_graph.h"
#include "ort_sequence.h"
#include "weights.h"

namespace skipvision {

struct OrtOptions {
  /// Within one operator; 0 lets ONNX Runtime choose.
  int threads = 0;
  /// false gives each session its own copy of the weights, packed for its kernels.
  bool share_weights = true;
  /// false creates each session when it first runs, as that of padded prefill always is.
  bool create_now = true;
};

class OrtBackend : public Backend {
 public:
  /// `manifest` must outlive it.
  OrtBackend(const std::filesystem::path& folder, const Manifest& manifest,
             const OrtOptions& options);

  std::unique_ptr<Sequence> prefill(const std::vector<ModelInput>& inputs) const override;
  /// The same, without a thing done for decode.
  Prefilled run_prefill(const std::vector<ModelInput>& inputs) const;

 private:
  /// The session of one graph.
  const OrtGraph& graph(const std::string& name) const;
  std::unique_ptr<OrtGraph> load(const std::string& name) const;
  /// The name of the graph that prefills rows with or without padding on the left.
  std::string prefill_name(bool padded) const;
  bool has(const std::string& name) const { return manifest_.graphs.count(name) > 0; }
  /// Features of pictures that have as many crops each, in one run.
  Ort::Value encode(const std::vector<ModelInput>& inputs) const;
  /// Of any pictures, in their order.
  Ort::Value encode_all(const std::vector<ModelInput>& inputs) const;
  Ort::Value embed(PromptBatch& batch, Ort::Value features) const;

  const std::filesystem::path folder_;
  const Manifest& manifest_;
  const bool share_weights_;
  Ort::Env env_;
  Ort::SessionOptions options_;
  std::unique_ptr<SharedWeights> weights_;
  std::string decode_name_;
  mutable std::mutex creating_;
  mutable std::map<std::string, std::unique_ptr<OrtGraph>> graphs_;
};

}  // namespace skipvision
