/// `engines.json`: what a folder of engines is (skipvision_export/tensorrt/manifest.py).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "manifest.h"

namespace skipvision {

using Sizes = std::vector<std::int64_t>;

/// The smallest and the largest shape of an input in a profile.
struct SizeRange {
  Sizes low, high;

  bool holds(const Sizes& sizes) const;
};

struct EngineInfo {
  std::string graph;
  std::filesystem::path file;
  FileInfo size_and_hash;
  std::string builder_version;
  std::int64_t plugin_layers = 0;
  std::vector<TensorInfo> inputs, outputs;  // types by TensorRT's names
  std::vector<std::map<std::string, SizeRange>> profiles;

  /// TensorRT's name of the type of an input or output; throws Error where it has none such.
  const std::string& dtype(const std::string& tensor) const;
  /// An input of int64; throws Error where it is none.
  TensorInfo integers(const std::string& input) const;
  /// The first profile that takes all these inputs, -1 where none does.
  int find_profile(const std::map<std::string, Sizes>& inputs) const;
  /// The same; throws Error that names the input.
  int choose_profile(const std::map<std::string, Sizes>& inputs) const;
  /// The largest size of an input's axis in any profile.
  std::int64_t largest(const std::string& input, std::size_t axis) const;
};

struct EnginesManifest {
  std::filesystem::path folder;
  bool version_compatible = false;
  bool holds_plugin = false;  // the plugin's library is inside the engines
  std::map<std::string, EngineInfo> engines;

  /// Reads a folder's manifest; throws Error with the file's name and the field, or where the
  /// engines are not of the bundle in the folder `bundle`.
  static EnginesManifest load(const std::filesystem::path& folder,
                              const std::filesystem::path& bundle);

  /// Checks that every engine is there, whole and, with `hashes`, unaltered; throws Error.
  void verify(bool hashes) const;
  const EngineInfo& engine(const std::string& graph) const;
  bool has_plugin_layers() const;
};

}  // namespace skipvision
